"""Count what ranks that share a model exchange in a denoising step, and model how long steps take;
and what ranks that learn together exchange in an update of the weights.

    python scripts/count_exchanges.py
    python scripts/count_exchanges.py --chips "M4 Max,M3 Ultra" --context 1024

Counted: collectives and bytes of a step over a canvas of 256 in bfloat16, of two narrow layers, as
all have the same; what is as wide as the model is counted at its real width. Nothing is computed
together: one rank counts what it would send.
Modelled, not measured: a step is the roofline's (`roofline.py`: peaks, which no program reaches, so
that links look slower beside it than they are), divided as the widest rank's experts are; then each
collective takes a latency, and moves 2 (n - 1) / n of its bytes over a link, as a ring does.
"""

import argparse
from typing import Any

import mlx.core as mx
from make_checkpoint import config
from roofline import CHIPS, header, row
from roofline_model import Assumed, Chip, seconds, step

from mlx_diffgemma import GenerationConfig, PromptCache
from mlx_diffgemma.checkpoint.adapter import AdapterConfig, add_adapter, trained
from mlx_diffgemma.diffusion.decoding import drive
from mlx_diffgemma.diffusion.denoise import denoise
from mlx_diffgemma.diffusion.draws import SeededDraws, sub_block
from mlx_diffgemma.distributed.share import Share
from mlx_diffgemma.model.config import Config
from mlx_diffgemma.model.diffusion_gemma import DiffusionGemma
from mlx_diffgemma.model.part import cut_model
from mlx_diffgemma.training.exchange import summed

# Narrow where it does not matter for what is exchanged.
NARROW: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 64,
    "head_dim": 16,
    "global_head_dim": 16,
    "intermediate_size": 256,
    "moe_intermediate_size": 256,
    "num_experts": 8,
}

# GB/s of a link, and seconds that a collective takes beside its bytes: figures of others for JACCL
# with MLX_METAL_FAST_SYNCH=1 and without, and for TCP over Thunderbolt.
LINKS = {
    "jaccl, fast fence": (6.5, 20e-6),
    "jaccl": (6.5, 200e-6),
    "TCP ring": (3.0, 500e-6),
}


class Counting:
    """A group of one rank, which takes the others for its like.

    Arrays `narrow` wide count as if they were `wide`.
    """

    def __init__(self, size: int, narrow: int, wide: int):
        self._size, self._narrow, self._wide = size, narrow, wide
        self.exchanged: list[int] = []

    def sum(self, x: mx.array) -> mx.array:
        stretched = self._wide if x.shape[-1] == self._narrow else x.shape[-1]
        self.exchanged.append(x.nbytes // x.shape[-1] * stretched)
        return x

    def gather(self, x: mx.array) -> mx.array:
        self.exchanged.append(x.nbytes)
        return mx.stack([x] * self._size)


def exchanged(layers: int, size: int) -> list[int]:
    """Bytes of each collective of the second of three steps."""
    given = Config.from_dict(config(layers, text=NARROW))
    group = Counting(size, given.hidden_size, Config.from_dict(config(1)).hidden_size)
    part = cut_model(given, Share(0, size, group), lambda path: 1, sub_block(given.vocab_size))
    model = DiffusionGemma(given, GenerationConfig(max_denoising_steps=3), part)
    model.set_dtype(mx.bfloat16)
    prompt_cache = PromptCache(model)
    prompt_cache.read([5, 6, 7])
    draws = SeededDraws(0, given.vocab_size)
    counts = []
    for _ in drive(model, denoise(model, prompt_cache.cache, model.generation, draws)):
        counts.append(len(group.exchanged))
    return group.exchanged[counts[0] : counts[1]]


def of_all(size: int) -> list[int]:
    """The same of the real model's thirty layers."""
    one, two = exchanged(1, size), exchanged(2, size)
    layer = len(two) - len(one)
    # Behind the first, of self-conditioning, come the layers'.
    return [*two[: 1 + layer], *two[1 : 1 + layer] * 28, *two[1 + layer :]]


def of_an_update(adapter: AdapterConfig) -> list[int]:
    """Bytes of each collective in which the real model's gradients are summed, and the losses."""
    model = DiffusionGemma(Config.from_dict(config(30)), GenerationConfig())
    add_adapter(model, adapter)
    gradients = {name: mx.zeros(each.shape) for name, each in trained(model).items()}
    group = Counting(2, -1, 0)
    share = Share(0, 2, group)
    share.sums(*[mx.zeros(())] * 3)
    summed(share, gradients)
    return group.exchanged


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--chips", default="M4 Pro,M4 Max,M3 Ultra")
    parser.add_argument("--context", type=int, default=1024)
    arguments = parser.parse_args()
    real = Config.from_dict(config(30))
    found = {size: of_all(size) for size in (2, 4)}
    header("ranks", "collectives a step", "MB a step", "largest MB")
    for size, each in found.items():
        row(size, len(each), f"{sum(each) / 1e6:.1f}", f"{max(each) / 1e6:.2f}")
    print()
    header("learning", "collectives an update", "MB an update", "largest MB")
    for rank in (8, 16):
        each = of_an_update(AdapterConfig(rank=rank))
        told = f"LoRA, rank {rank}", len(each), f"{sum(each) / 1e6:.1f}", f"{max(each) / 1e6:.1f}"
        row(*told)
    print(f"\nModelled, not measured: milliseconds a step, context {arguments.context}.\n")
    header("chip", "1", *(f"{size}, {link}" for size in found for link in LINKS))
    assumed = Assumed(bits=8, expert_bits=4, vocabulary_gb=2.15)
    for name in arguments.chips.split(","):
        bandwidth, tflops = CHIPS[name]
        assert tflops, f"the peak of {name} is not known"
        parts = step(real, assumed, arguments.context, real.canvas_length)
        alone = seconds(parts, Chip(name, bandwidth, tflops))
        cells = [f"{alone * 1e3:.0f}"]
        for size, each in found.items():
            cut = [cut_model(real, Share(i, size), lambda path: 64, 512) for i in range(size)]
            share = max(len(part.layers[0].expert) for part in cut) / real.moe_intermediate_size
            for speed, latency in LINKS.values():
                moved = 2 * (size - 1) / size * sum(each) / speed / 1e9
                spent = share * alone + len(each) * latency + moved
                cells.append(f"{spent * 1e3:.0f} ({alone / spent:.2f}x)")
        row(name, *cells)


if __name__ == "__main__":
    main()
