"""What a chip could reach: FLOPs and bytes of denoising steps by part. Modelled, not measured.

    python scripts/roofline.py CONFIG --chip "M4 Max"
    python scripts/roofline.py CONFIG --bandwidth 400 --tflops 10 --context 8192 --steps 16
    python scripts/roofline.py CONFIG --positions 256,128,64,32
    python scripts/roofline.py CONFIG --recorded FILE FILE --stretch 2.5

CONFIG is a config.json or the directory of one. A part takes as long as the slower of computing and
moving bytes; parts do not overlap; both rates are the chip's peaks, which no program reaches.
Assumed: experts are chosen uniformly and independently, so that 256 tokens touch
E (1 - (1 - k/E)^256) of E experts; weights, cache and vocabulary-sized arrays are moved once for
each use; activations of hidden width are not counted. Self-conditioning counts unquantized FLOPs.

`--positions` models steps that decode so many positions of a canvas, on all chips: keys and values
of the others are read, not computed. `--recorded` takes the shares of the canvas that the steps of
real canvases decoded, a list for each: JSON such as [[1, 1, 0.25, 1]]. Shares of a smaller canvas
are taken as shares of this one, and all canvases of an answer as the average one. It models answers
beside the same backbone decoding token by token, which reads the experts of one token, the cache
and the head. Neither side counts reading the prompt; a canvas is encoded when another follows it.
Narrow products do not reach a chip's peak: what fewer positions gain is an upper bound.
"""

import argparse
import math
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

from roofline_model import Answers, Assumed, Chip, ahead, encoding, seconds, step, token, touched

from mlx_diffgemma.arguments import is_number
from mlx_diffgemma.errors import Error
from mlx_diffgemma.files import parse_json, read_text
from mlx_diffgemma.model.config import Config

# GB/s of unified memory, the largest configuration, as in Apple's technical specifications of the
# Macs (support.apple.com/specs) and its announcements. TFLOPS are float32 figures that Apple gave,
# or that are reported for the largest GPU. For M3 and M4 Apple gives none: cores x 128 lanes x 2 x
# the reported clocks, 1.398 and 1.678 GHz; other sources say up to a seventh more or less. M5 has
# units for matrix products, whose rate these figures do not tell: --tflops.
CHIPS: dict[str, tuple[float, float | None]] = {
    "M1": (68, 2.6),
    "M1 Pro": (200, 5.2),
    "M1 Max": (400, 10.4),
    "M1 Ultra": (800, 21),
    "M2": (100, 3.6),
    "M2 Pro": (200, 6.8),
    "M2 Max": (400, 13.6),
    "M2 Ultra": (800, 27.2),
    "M3": (100, 3.6),
    "M3 Pro": (150, 6.4),
    "M3 Max": (400, 14.3),
    "M3 Ultra": (819, 28.6),
    "M4": (120, 4.3),
    "M4 Pro": (273, 8.6),
    "M4 Max": (546, 17.2),
    "M5": (153, None),
    "M5 Pro": (307, None),
    "M5 Max": (614, None),
}

# Canvases up to whose end it is looked for the length from which diffusion is ahead.
MOST_CANVASES = 8


class RecordError(Error):
    """A file that holds no shares of canvases."""


def read_shares(path: Path) -> list[list[float]]:
    """Shares of the canvas that steps decoded, a list for each canvas.

    Raises:
        RecordError: the file cannot be read, or holds anything else.
    """
    try:
        value = parse_json(read_text(path, RecordError))
    except ValueError as error:
        raise RecordError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, list) or not value:
        raise RecordError(f"{path} is not a list of canvases, each a list of shares")
    for i, canvas in enumerate(value):
        if not isinstance(canvas, list) or not canvas:
            raise RecordError(f"{path}: canvas {i} is not a list of shares")
        for share in canvas:
            if not is_number(share) or not 0 < share <= 1:
                raise RecordError(f"{path}: canvas {i} has a share that is not above 0, at most 1")
    return value


def passes_of(shares: list[list[float]], length: int, stretch: float) -> dict[int, float]:
    """How many passes over each number of positions a canvas takes, on average, if it takes
    `stretch` times as many as recorded."""
    # Without the rounding, 0.1 of 640 would be 65 positions.
    rows = (math.ceil(round(share * length, 6)) for canvas in shares for share in canvas)
    return {each: stretch * times / len(shares) for each, times in sorted(Counter(rows).items())}


# What is printed -------------------------------------------------------------------------------


def row(*cells: object) -> None:
    print("| " + " | ".join(map(str, cells)) + " |")


def header(*cells: str) -> None:
    row(*cells)
    print("|" + "---|" * len(cells))


def print_parts(config: Config, assumed: Assumed, chip: Chip, context: int, steps: int) -> None:
    """One step on one chip, part by part, and a canvas of so many."""
    rows = config.canvas_length
    parts = step(config, assumed, context, rows)
    experts = touched(config.num_experts, config.top_k_experts, rows)
    print(
        f"{chip.name}, {chip.bandwidth:g} GB/s, {chip.tflops:g} TFLOPS; {rows} positions touch "
        f"{experts:.1f} of {config.num_experts} experts.\n"
    )
    header("part", "GFLOP", "GB", "compute ms", "bandwidth ms", "bound by")
    for part in parts:
        compute = part.flops / chip.tflops / 1e9
        move = part.bytes / chip.bandwidth / 1e6
        bound = "compute" if compute > move else "bandwidth"
        figures = f"{part.flops / 1e9:.1f}", f"{part.bytes / 1e9:.3f}"
        row(part.name, *figures, f"{compute:.1f}", f"{move:.1f}", bound)
    spent = seconds(parts, chip)
    figures = f"{sum(p.flops for p in parts) / 1e9:.1f}", f"{sum(p.bytes for p in parts) / 1e9:.3f}"
    row("sum", *figures, "", f"{spent * 1e3:.1f} in all", "")
    commit = seconds(encoding(config, assumed, context), chip)
    print(
        f"\n{1 / spent:.2f} steps/s; a canvas of {steps} steps, encoded once "
        f"({commit * 1e3:.0f} ms): {config.canvas_length / (steps * spent + commit):.1f} tokens/s"
    )


def print_positions(
    config: Config,
    assumed: Assumed,
    chips: list[Chip],
    context: int,
    positions: list[int],
    concentration: float,
) -> None:
    """What steps over so many positions do, and their milliseconds on each chip."""
    other = replace(assumed, concentration=concentration)
    routing = f"popularity 1/rank^{concentration:g}"
    header("positions", "GFLOP", "experts touched", "GB", f"experts, {routing}", f"GB, {routing}")
    for rows in positions:
        cells = []
        for one in (assumed, other):
            experts = touched(config.num_experts, config.top_k_experts, rows, one.concentration)
            moved = sum(part.bytes for part in step(config, one, context, rows)) / 1e9
            cells += [f"{experts:.1f}", f"{moved:.2f}"]
        flops = sum(part.flops for part in step(config, assumed, context, rows))
        row(rows, f"{flops / 1e9:.0f}", *cells)
    length = config.canvas_length
    print(f"\nMilliseconds a step, uniform routing (in brackets: {routing}):\n")
    header("chip", *map(str, positions), "a token", f"steps of {length} in {length} tokens' time")
    for chip in chips:
        single = seconds(token(config, assumed, context), chip)
        whole = seconds(step(config, assumed, context, length), chip)
        cells = []
        for rows in positions:
            a, b = (seconds(step(config, one, context, rows), chip) for one in (assumed, other))
            cells.append(f"{a * 1e3:.0f} ({b * 1e3:.0f})")
        row(chip.name, *cells, f"{single * 1e3:.1f}", f"{length * single / whole:.1f}")


def print_answers(answers: Answers, chips: list[Chip], lengths: list[int]) -> None:
    """Tokens per second of answers, by chip, and what would make both equally fast."""
    length, steps = answers.config.canvas_length, sum(answers.passes.values())
    most = max(MOST_CANVASES, math.ceil(max(lengths) / length))
    asked = (f"{each} tokens" for each in lengths)
    header("chip", "one by one", *asked, "ahead from", "as fast with")
    for chip in chips:
        diffusion, single = answers.compare(chip, most)
        rates = [f"{each / diffusion[each - 1]:.1f}" for each in lengths]
        first = ahead(diffusion, single)
        crossover = "never" if first is None else f"{first} tokens"
        ratio = single[length - 1] / diffusion[length - 1]
        alone = f"{length / single[length - 1]:.1f}"
        row(chip.name, alone, *rates, crossover, f"{steps * ratio:.1f} steps")
    print(
        f"\nOne by one: an answer of {length} tokens. Never: in no answer up to {most * length}. "
        "As fast with: so many such steps take as long as a canvas's tokens one by one.\n"
    )


def print_recorded(answers: Answers, chips: list[Chip], lengths: list[int], name: str) -> None:
    """Answers whose canvases take the passes given."""
    length = answers.config.canvas_length
    work = sum(rows * times for rows, times in answers.passes.items()) / length
    print(
        f"{name}: {sum(answers.passes.values()):.1f} steps a canvas decode {work:.2f} canvases' "
        "positions. Tokens/s of answers:\n"
    )
    print_answers(answers, chips, lengths)


# What is asked for -----------------------------------------------------------------------------


def numbers(text: str) -> list[int]:
    """Whole numbers above 0, separated by commas."""
    found = [int(part) for part in text.split(",")]
    if min(found) < 1:
        raise ValueError
    return found


def an_object(value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError("it is not a JSON object")
    return value


def whole(text: str) -> int:
    """One such number."""
    (number,) = numbers(text)
    return number


def positive(text: str) -> float:
    number = float(text)
    if not 0 < number < math.inf:
        raise ValueError
    return number


def exponent(text: str) -> float:
    number = float(text)
    if not 0 <= number <= 4:
        raise ValueError
    return number


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", type=Path)
    parser.add_argument("--chip", choices=CHIPS, help="public figures; for M5 --tflops")
    parser.add_argument("--bandwidth", type=positive, help="GB/s")
    parser.add_argument("--tflops", type=positive)
    parser.add_argument("--context", type=int, default=4096, help="tokens [%(default)s]")
    parser.add_argument("--bits", type=positive, default=8, help="of all but experts")
    parser.add_argument("--expert-bits", type=positive, default=4)
    parser.add_argument("--steps", type=whole, default=48, help="of a canvas [%(default)s]")
    parser.add_argument("--positions", type=numbers, metavar="P,...", help="of a step")
    parser.add_argument(
        "--concentration",
        type=exponent,
        default=1.0,
        help="other routing that --positions shows: popularity 1/rank to this power [%(default)s]",
    )
    parser.add_argument(
        "--recorded", type=Path, nargs="+", metavar="FILE", help="shares that steps decoded"
    )
    parser.add_argument(
        "--stretch", type=positive, default=1, help="times as many steps as recorded [%(default)s]"
    )
    parser.add_argument(
        "--answers", type=numbers, metavar="N,...", default=[32, 64, 128, 256, 1024]
    )
    parser.add_argument(
        "--vocabulary-gb",
        type=positive,
        default=0.54,
        help="vocabulary-sized arrays a whole step moves, as count_kernels.py counts; "
        "0.54 is one float32 copy written and read [%(default)s]",
    )
    return parser.parse_args()


def chosen(arguments: argparse.Namespace) -> list[Chip]:
    """The chip asked for, or all whose peaks are known.

    Raises:
        Error: the peaks of the chip asked for are not known.
    """
    bandwidth, tflops = CHIPS.get(arguments.chip, (None, None))
    bandwidth, tflops = arguments.bandwidth or bandwidth, arguments.tflops or tflops
    if bandwidth and tflops:
        return [Chip(arguments.chip or "a chip", bandwidth, tflops)]
    several = arguments.positions or arguments.recorded
    if several and not (arguments.chip or bandwidth or tflops):
        return [Chip(name, speed, peak) for name, (speed, peak) in CHIPS.items() if peak]
    raise Error(f"needs {'--tflops' if bandwidth else '--chip, or --bandwidth and --tflops'}")


def check_lengths(config: Config, arguments: argparse.Namespace) -> None:
    """Positions are of a canvas, and answers within the model's context.

    Raises:
        Error: they are not.
    """
    room = config.max_position_embeddings - arguments.context
    if arguments.context < 0 or room < config.canvas_length:
        raise Error(f"a context of {arguments.context} tokens leaves no room for a canvas")
    if max(arguments.answers) > room:
        raise Error(f"an answer of {max(arguments.answers)} tokens: there is room for {room}")
    if max(arguments.positions or [1]) > config.canvas_length:
        raise Error(f"a canvas has {config.canvas_length} positions")


def report(arguments: argparse.Namespace) -> None:
    """Print what is asked for.

    Raises:
        Error: it cannot be said.
    """
    chips = chosen(arguments)
    path = arguments.config
    try:
        text = read_text(path / "config.json" if path.is_dir() else path)
        config = Config.from_dict(an_object(parse_json(text)))
    except ValueError as error:
        raise Error(f"{path}: {error}") from None
    check_lengths(config, arguments)
    context = arguments.context
    assumed = Assumed(arguments.bits, arguments.expert_bits, arguments.vocabulary_gb)
    recorded = [(each.name, read_shares(each)) for each in arguments.recorded or []]
    print(
        f"Modelled, not measured: context {context}, {arguments.bits:g} bits, experts "
        f"{arguments.expert_bits:g}.\n"
    )
    if arguments.positions:
        print_positions(
            config, assumed, chips, context, arguments.positions, arguments.concentration
        )
    for name, shares in recorded:
        passes = passes_of(shares, config.canvas_length, arguments.stretch)
        print_recorded(Answers(config, assumed, context, passes), chips, arguments.answers, name)
    if not arguments.positions and not recorded:
        (chip,) = chips
        print_parts(config, assumed, chip, context, arguments.steps)


def main() -> None:
    arguments = parse()
    try:
        report(arguments)
    except Error as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
