"""What a chip could reach: FLOPs and bytes of one denoising step by part. Modelled, not measured.

    python scripts/roofline.py CONFIG --chip "M4 Max" --tflops 16
    python scripts/roofline.py CONFIG --bandwidth 400 --tflops 10 --context 8192 --steps 16

CONFIG is a config.json or the directory of one. A part takes as long as the slower of computing and
moving bytes; parts do not overlap; both rates are the chip's peaks, which no program reaches.
Assumed: experts are chosen uniformly and independently, so that 256 tokens touch
E (1 - (1 - k/E)^256) of E experts; weights, cache and vocabulary-sized arrays are moved once for
each use; activations of hidden width are not counted. Self-conditioning counts unquantized FLOPs.
"""

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

from mlx_diffgemma.errors import Error
from mlx_diffgemma.model.config import Config

# GB/s of unified memory, the largest configuration, as in Apple's technical specifications of the
# Macs (support.apple.com/specs) and its announcements. TFLOPS are float32 figures that Apple gave,
# or that are reported for the largest GPU; for M3 and later Apple gives none: --tflops.
CHIPS: dict[str, tuple[float, float | None]] = {
    "M1": (68, 2.6),
    "M1 Pro": (200, 5.2),
    "M1 Max": (400, 10.4),
    "M1 Ultra": (800, 21),
    "M2": (100, 3.6),
    "M2 Pro": (200, 6.8),
    "M2 Max": (400, 13.6),
    "M2 Ultra": (800, 27.2),
    "M3": (100, None),
    "M3 Pro": (150, None),
    "M3 Max": (400, None),
    "M3 Ultra": (819, None),
    "M4": (120, None),
    "M4 Pro": (273, None),
    "M4 Max": (546, None),
    "M5": (153, None),
    "M5 Pro": (307, None),
    "M5 Max": (614, None),
}


@dataclass(frozen=True)
class Part:
    """What one part of a pass computes and moves."""

    name: str
    flops: float
    bytes: float

    def seconds(self, bandwidth: float, tflops: float) -> float:
        return max(self.flops / tflops / 1e12, self.bytes / bandwidth / 1e9)


def stored(weights: float, bits: float) -> float:
    """Bytes of weights; below 16 bits with a bfloat16 scale and bias per 64."""
    return weights * (bits + (0.5 if bits < 16 else 0)) / 8


def touched(experts: int, top_k: int, tokens: int) -> float:
    """Experts that at least one token chooses, expected."""
    return experts * (1 - (1 - top_k / experts) ** tokens)


def layers(config: Config, context: int, bits: float, expert_bits: float) -> list[Part]:
    """All layers, for one canvas behind a context."""
    rows, hidden = config.canvas_length, config.hidden_size
    projections = scores = cache = 0.0
    for layer in config.layers:
        queries = config.num_attention_heads * layer.head_dim
        keys = layer.num_key_value_heads * layer.head_dim
        projections += hidden * (2 * queries + (1 if layer.window is None else 2) * keys)
        held = context if layer.window is None else min(context, layer.window - 1)
        scores += 2 * 2 * rows * (held + rows) * queries
        cache += 2 * 2 * keys * (held + rows)
    count = len(config.layers)
    dense = count * 3 * hidden * config.intermediate_size
    router = count * hidden * config.num_experts
    expert = 3 * hidden * config.moe_intermediate_size
    chosen = touched(config.num_experts, config.top_k_experts, rows)
    return [
        Part("attention, projections", 2 * rows * projections, stored(projections, bits)),
        Part("attention, scores and cache", scores, cache),
        Part("dense MLP", 2 * rows * dense, stored(dense, bits)),
        Part("router", 2 * rows * router, stored(router, bits)),
        Part(
            "experts",
            2 * rows * config.top_k_experts * count * expert,
            stored(count * chosen * expert, expert_bits),
        ),
    ]


def step(
    config: Config, context: int, bits: float, expert_bits: float, vocabulary_gb: float
) -> list[Part]:
    """One denoising step."""
    rows, hidden = config.canvas_length, config.hidden_size
    table = config.vocab_size * hidden
    mlp = 3 * hidden * config.intermediate_size
    return [
        *layers(config, context, bits, expert_bits),
        Part("head", 2 * rows * table, stored(table, bits)),
        Part("sampler, vocabulary arrays", 0, vocabulary_gb * 1e9),
        Part("self-conditioning", 2 * rows * (table + mlp), stored(table + mlp, bits)),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", type=Path)
    parser.add_argument("--chip", choices=CHIPS, help="public figures; for M3 and later --tflops")
    parser.add_argument("--bandwidth", type=float, help="GB/s")
    parser.add_argument("--tflops", type=float)
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--bits", type=float, default=8, help="of all but experts")
    parser.add_argument("--expert-bits", type=float, default=4)
    parser.add_argument("--steps", type=int, default=48, help="of a canvas")
    parser.add_argument(
        "--vocabulary-gb",
        type=float,
        default=0.54,
        help="vocabulary-sized arrays a step moves, as count_kernels.py counts; "
        "0.54 is one float32 copy written and read [%(default)s]",
    )
    arguments = parser.parse_args()
    bandwidth, tflops = CHIPS.get(arguments.chip, (None, None))
    bandwidth, tflops = arguments.bandwidth or bandwidth, arguments.tflops or tflops
    if bandwidth is None or tflops is None:
        missing = "--tflops" if bandwidth else "--chip, or --bandwidth and --tflops"
        print(f"error: needs {missing}", file=sys.stderr)
        raise SystemExit(2)
    path = arguments.config
    try:
        config = Config.from_dict(
            json.loads((path / "config.json" if path.is_dir() else path).read_text())
        )
    except (OSError, ValueError, Error) as error:
        print(f"error: {path}: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    parts = step(
        config, arguments.context, arguments.bits, arguments.expert_bits, arguments.vocabulary_gb
    )
    print(
        f"Modelled, not measured: {arguments.chip or 'a chip'}, {bandwidth:g} GB/s, {tflops:g} "
        f"TFLOPS; context {arguments.context}, {arguments.bits:g} bits, experts "
        f"{arguments.expert_bits:g}; uniform routing touches "
        f"{touched(config.num_experts, config.top_k_experts, config.canvas_length):.1f} of "
        f"{config.num_experts} experts.\n"
    )
    print("| part | GFLOP | GB | compute ms | bandwidth ms | bound by |\n|---|---|---|---|---|---|")
    for part in parts:
        compute = part.flops / tflops / 1e9
        move = part.bytes / bandwidth / 1e6
        print(
            f"| {part.name} | {part.flops / 1e9:.1f} | {part.bytes / 1e9:.3f} | {compute:.1f} | "
            f"{move:.1f} | {'compute' if compute > move else 'bandwidth'} |"
        )
    seconds = sum(part.seconds(bandwidth, tflops) for part in parts)
    print(
        f"| sum | {sum(p.flops for p in parts) / 1e9:.1f} | "
        f"{sum(p.bytes for p in parts) / 1e9:.3f} | | {seconds * 1e3:.1f} in all | |"
    )
    commit = sum(
        part.seconds(bandwidth, tflops)
        for part in layers(config, arguments.context, arguments.bits, arguments.expert_bits)
    )
    canvas = arguments.steps * seconds + commit
    print(
        f"\n{1 / seconds:.2f} steps/s; a canvas of {arguments.steps} steps, encoded once "
        f"({commit * 1e3:.0f} ms): {config.canvas_length / canvas:.1f} tokens/s"
    )


if __name__ == "__main__":
    main()
