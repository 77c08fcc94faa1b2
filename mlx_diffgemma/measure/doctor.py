"""Is this machine's arithmetic right? All that is checked, in order, and the report of it."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from itertools import product
from typing import Any, Literal

import mlx.core as mx
from rich.filesize import decimal

from ..checkpoint.files import MODES, SHIPPED
from ..checkpoint.fit import free_memory
from ..checkpoint.load import DType, load_model
from ..convert import Recipe, uniform
from ..errors import Error
from ..text.tokenizer import Tokenizer
from .bench import machine
from .checks import LIMITS, NOTHING, REAL, Checks, Result, Subject, kind_of
from .scenes import SCENES
from .sides import packed, pair, weights_of

DTYPES: tuple[DType, ...] = ("float32", "bfloat16", "float16")

# Denoising steps of the quick run; the whole one takes the checkpoint's.
FEW_STEPS = 6


@dataclass(frozen=True)
class Planned:
    """A check that is about to run: of which model, in which type."""

    name: str
    model: str
    dtype: DType
    run: Callable[[], Iterator[Result]]


def devices(tested: Literal["cpu", "gpu"] | None = None) -> tuple[mx.Device, mx.Device]:
    """The reference's, which is the CPU, and the tested one; None is the GPU where there is one.

    Raises:
        Error: there is no GPU.
    """
    cpu, there = mx.Device(mx.cpu), mx.is_available(mx.gpu)
    if tested == "gpu" and not there:
        raise Error("MLX finds no GPU here")
    return cpu, mx.Device(mx.gpu) if there and tested != "cpu" else cpu


def examine(
    reference: mx.Device,
    tested: mx.Device,
    *,
    quick: bool = False,
    progress: Callable[[str], None] = lambda line: None,
) -> Iterator[Result]:
    """Run all checks, each as its turn comes; a check that raises has failed, the others go on.

    `progress` is told before each: where a driver ends the process, the last one is to blame.
    """
    checks = Checks(reference, tested)
    for each in plan(checks, quick):
        progress(f"{each.name}, {each.model}, {each.dtype}")
        try:
            yield from each.run()
        except Exception as error:
            why = f"{type(error).__name__}: {sentence(str(error))}"
            yield checks.without(each.name, each.model, each.dtype, "failed", why)
        mx.clear_cache()


def plan(checks: Checks, quick: bool) -> Iterator[Planned]:
    """What is run, in order: what all depends on comes first."""
    steps = FEW_STEPS if quick else None
    yield Planned("products", NOTHING, "float32", checks.products)
    yield Planned("draws", NOTHING, "float32", checks.draws)
    for dtype in DTYPES:
        wide = not quick or dtype == "float32"
        on = partial(_subject, checks, "tiny", dtype, None)
        parts = [checks.layers, checks.readout]
        if wide:
            parts += [checks.rows, checks.chunks, checks.windows]
        for part in parts:
            yield _planned("tiny", dtype, part, on)
        if wide:
            yield _planned("tiny", dtype, checks.denoising, on, steps=steps)
            yield _planned("tiny", dtype, checks.pins, on, steps=steps)
            yield _planned("tiny", dtype, checks.schema, on)
    if not quick:
        on = partial(_subject, checks, "tiny-puzzles", "float32", None)
        puzzle = SCENES[0].case.prompt
        yield _planned("tiny-puzzles", "float32", checks.denoising, on, prompt=puzzle)
    for recipe, dtype in _recipes(quick):
        name = f"tiny, {recipe.description}"
        on = partial(_subject, checks, "tiny", dtype, recipe)
        yield _planned(name, dtype, checks.layers, on)
        yield _planned(name, dtype, checks.readout, on)
        if not quick:
            yield _planned(name, dtype, checks.kept_table, on)  # last: the table stays
    if not quick:
        yield Planned("real width", REAL, "float32", checks.real_width)


def _planned(
    model: str,
    dtype: DType,
    check: Callable[..., Iterator[Result]],
    on: Callable[[], Subject],
    **settings: Any,
) -> Planned:
    def run() -> Iterator[Result]:
        return check(on(), **settings)

    return Planned(check.__name__, model, dtype, run)


def _recipes(quick: bool) -> Iterator[tuple[Recipe, DType]]:
    """Every format that MLX packs weights in, in the types it is used with."""
    for mode, (sizes, widths) in MODES.items():
        if quick:
            yield _uniform(widths[0], sizes[0], mode), "bfloat16"
            continue
        for size, bits in product(sizes, widths):
            recipe = _uniform(bits, size, mode)
            yield recipe, "float32"
            if size == sizes[0]:
                yield recipe, "bfloat16"
        yield _uniform(widths[0], sizes[0], mode), "float16"


def _uniform(bits: int, size: int, mode: str) -> Recipe:
    made = uniform(bits, size, mode)
    return Recipe(f"{bits} bits {mode}, group {size}", made.default, made.dense, made.router)


@lru_cache(maxsize=1)
def _subject(checks: Checks, name: str, dtype: DType, recipe: Recipe | None) -> Subject:
    """A shipped model on both sides; the last one is kept, for the next check of it."""
    directory = SHIPPED[name]
    source = checks.reference.run(lambda: weights_of(load_model(directory, dtype="float32")))[0]
    stored = checks.reference.run(lambda: packed(source, getattr(mx, dtype), recipe))[0]
    both = pair(stored, checks.reference, checks.tested)
    full = name if recipe is None else f"{name}, {recipe.description}"
    return Subject(full, dtype, both, Tokenizer.from_directory(directory))


# The report --------------------------------------------------------------------------------------


def sentence(text: str) -> str:
    """The first line of a message, without paths: reports are pasted into issues."""
    line = (text.strip().splitlines() or [""])[0]
    return re.sub(r"(?:~|\b[A-Za-z]:)?[/\\][^\s'\",:;)]*", "(path)", line)[:300]


def about(reference: mx.Device, tested: mx.Device) -> dict[str, Any]:
    """Versions, chip, memory and devices; nothing of who asks."""
    known = {key: value for key, value in machine().items() if key != "device"}
    return {
        **known,
        "reference": kind_of(reference),
        "tested": kind_of(tested),
        "gpu": mx.is_available(mx.gpu),
        "free_memory": free_memory(),
    }


def introduction(known: dict[str, Any]) -> list[str]:
    """Lines before the table."""
    chip = known["device_info"].get("device_name", "unknown chip")
    lines = [
        f"mlx-diffgemma {known['mlx_diffgemma']}, MLX {known['mlx']}, Python {known['python']}",
        f"{known['system']}, {chip}, {decimal(known['free_memory'])} free",
    ]
    if not known["gpu"]:
        lines.append("There is no GPU here: what is tested is the CPU.")
    lines.append(
        f"The {known['tested'].upper()} as it is used, against plain float32 on the "
        f"{known['reference'].upper()}: nothing compiled, merged, packed or in blocks."
    )
    heads = ("check", "model", "type", "value", "tolerance", "tested", "plain", "peak")
    return [*lines, "", _columns(*heads)]


def _columns(*cells: str) -> str:
    widths = (27, 41, 8, 9, 9, 9, 9, 9)
    left = "".join(cell.ljust(width + 1) for cell, width in zip(cells[:3], widths, strict=False))
    return left + " ".join(c.rjust(w) for c, w in zip(cells[3:8], widths[3:], strict=True))


def line(found: Result) -> str:
    """A row of the table."""
    cost = found.cost
    row = _columns(
        found.check,
        found.model,
        found.dtype,
        "" if found.value is None else f"{found.value:.1e}",
        "" if found.tolerance is None else f"{found.tolerance:.0e}",
        f"{cost.tested_seconds:.3f} s",
        f"{cost.reference_seconds:.3f} s",
        decimal(cost.peak_memory),
    )
    return f"{row}  {found.status}{': ' if found.detail else ''}{found.detail}"


def conclusion(results: Sequence[Result], seconds: float) -> str:
    """The last line."""
    said = [f"{count} {status}" for status, count in counted(results).items() if count]
    return f"{', '.join(said)}, in {seconds:.0f} s"


def counted(results: Sequence[Result]) -> dict[str, int]:
    """How many results there are of each status."""
    states = ("passed", "failed", "skipped", "reported")
    return {state: sum(found.status == state for found in results) for state in states}


def as_json(known: dict[str, Any], results: Sequence[Result], seconds: float) -> dict[str, Any]:
    """Everything, tolerances and their reasons included."""
    return {
        **known,
        "seconds": seconds,
        "counts": counted(results),
        "limits": {name: asdict(limit) for name, limit in LIMITS.items()},
        "results": [asdict(found) for found in results],
    }
