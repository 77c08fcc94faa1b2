"""All checks in order, and running them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import product
from typing import Any, Literal

import mlx.core as mx

from ...checkpoint.files import SHIPPED
from ...checkpoint.load import load_model
from ...checkpoint.quantization import MODES
from ...checkpoint.weights import DType
from ...convert.recipes import Recipe, uniform
from ...errors import Error
from ...text.tokenizer import Tokenizer
from ..scenes import SCENES
from . import checks, runs
from .comparison import NOTHING, Comparison, Subject
from .report import sentence
from .results import Result
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
    """Return the reference's, the CPU, and the tested one; None is the GPU where there is one.

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
    compare = Comparison(reference, tested)
    for each in plan(compare, quick):
        progress(f"{each.name}, {each.model}, {each.dtype}")
        try:
            yield from each.run()
        except Exception as error:
            why = f"{type(error).__name__}: {sentence(str(error))}"
            yield compare.without(each.name, each.model, each.dtype, "failed", why)
        mx.clear_cache()


def plan(compare: Comparison, quick: bool) -> Iterator[Planned]:
    """Yield all checks in the order in which they run: what all depend on comes first."""
    steps = FEW_STEPS if quick else None
    yield Planned("products", NOTHING, "float32", partial(checks.products, compare))
    yield Planned("draws", NOTHING, "float32", partial(checks.draws, compare))
    for dtype in DTYPES:
        wide = not quick or dtype == "float32"
        on = partial(_subject, compare, "tiny", dtype, None)
        parts = [checks.layers, checks.readout]
        if wide:
            parts += [checks.rows, checks.chunks, checks.windows]
        for part in parts:
            yield _planned(compare, "tiny", dtype, part, on)
        if wide:
            yield _planned(compare, "tiny", dtype, runs.denoising, on, steps=steps)
            yield _planned(compare, "tiny", dtype, runs.pins, on, steps=steps)
            yield _planned(compare, "tiny", dtype, runs.schema, on)
    if not quick:
        on = partial(_subject, compare, "tiny-puzzles", "float32", None)
        puzzle = SCENES[0].case.prompt
        yield _planned(compare, "tiny-puzzles", "float32", runs.denoising, on, prompt=puzzle)
    for recipe, dtype in _recipes(quick):
        name = f"tiny, {recipe.description}"
        on = partial(_subject, compare, "tiny", dtype, recipe)
        yield _planned(compare, name, dtype, checks.layers, on)
        yield _planned(compare, name, dtype, checks.readout, on)
        if not quick:
            yield _planned(compare, name, dtype, checks.kept_table, on)  # last: the table stays
    if not quick:
        yield Planned("real width", checks.REAL, "float32", partial(checks.real_width, compare))


def _planned(
    compare: Comparison,
    model: str,
    dtype: DType,
    check: Callable[..., Iterator[Result]],
    on: Callable[[], Subject],
    **settings: Any,
) -> Planned:
    def run() -> Iterator[Result]:
        return check(compare, on(), **settings)

    return Planned(check.__name__, model, dtype, run)


def _recipes(quick: bool) -> Iterator[tuple[Recipe, DType]]:
    """Yield every format that MLX packs weights in, in the types it is used with."""
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
def _subject(compare: Comparison, name: str, dtype: DType, recipe: Recipe | None) -> Subject:
    """Load a shipped model on both sides; the last one is kept, for the next check of it."""
    directory = SHIPPED[name]
    source = compare.reference.run(lambda: weights_of(load_model(directory, dtype="float32")))[0]
    stored = compare.reference.run(lambda: packed(source, getattr(mx, dtype), recipe))[0]
    both = pair(stored, compare.reference, compare.tested)
    full = name if recipe is None else f"{name}, {recipe.description}"
    return Subject(full, dtype, both, Tokenizer.from_directory(directory))
