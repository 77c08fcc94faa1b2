"""What `mlx-diffgemma doctor` checks: one method a subject, each gives a result or several."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from itertools import zip_longest
from typing import Any, Literal, TypeVar

import mlx.core as mx
import numpy as np
from rich.filesize import decimal

from ..checkpoint.fit import free_memory
from ..checkpoint.load import DType
from ..diffusion.decoding import drive
from ..diffusion.denoise import Start, denoise
from ..diffusion.draws import SeededDraws
from ..diffusion.head import log_probability, read_out
from ..diffusion.prompt_cache import PREFILL_CHUNK, PromptCache, prefill
from ..model.cache import LayerCache
from ..model.config import Config, LayerConfig
from ..model.diffusion_gemma import DiffusionGemma, Pass
from ..model.settings import GenerationConfig
from ..tasks.generate import stream_generate
from ..tasks.starts import forced_tokens, pinned_start
from ..text.tokenizer import Tokenizer
from ..text.turns import Text
from ..text.vocabulary import Vocabulary
from .scenes import SCENES
from .sides import (
    EMBEDDING,
    Pair,
    Part,
    Side,
    Tape,
    Weights,
    apart,
    by_the_book,
    differing,
    pair,
    random_weights,
    tapped,
)

Value = TypeVar("Value")

# Of each layer: what it was given, what it gave, and how decided its router was.
Watched = list[tuple[mx.array, mx.array, mx.array]]

Status = Literal["passed", "failed", "skipped", "reported"]


@dataclass(frozen=True)
class Limit:
    """What is measured, how large it may be by the type that is computed in, and why.

    `reduced` is for float32 on devices that round its products, None is no limit: the number is
    only reported.
    """

    measure: str
    why: str
    float32: float | None
    reduced: float | None
    bfloat16: float | None
    float16: float | None


ROWS = "relative error of rows"

SHARE = "share that differs"

NATS = "largest difference in nats"

ROUNDED = "a dozen roundings of the type; in float32 room for powers and cosines of other libraries"

# The one home of all tolerances. Outside exact float32 a router that is undecided between two
# experts may take the other one and change a whole row. Of a layer such rows do not count; where
# layers follow one another, rows are judged by the 75th percentile.
LIMITS = {
    "products": Limit("relative error", "as float32 or as TF32, see EXACT", *[2e-3] * 4),
    "ids": Limit(SHARE, "bits are bits", *[0.0] * 4),
    "noise": Limit("largest difference", "two logarithms, each within some ulps", *[1e-4] * 4),
    "layer": Limit(ROWS, f"one layer, the same input: {ROUNDED}", 1e-4, 1e-2, 6e-2, 1e-2),
    "stack": Limit(ROWS, "errors of all layers add up", 1e-3, 5e-2, 2e-1, 5e-2),
    "nats": Limit(NATS, "logits of up to 50, rounded", 1e-3, 1e-1, 3e-1, 5e-2),
    "self_conditioning": Limit(
        ROWS, "probabilities and rows of the table, rounded", 1e-4, 1e-2, 6e-2, 1e-2
    ),
    "canvases": Limit(SHARE, "one near tie changes all later steps", 0.0, *[None] * 3),
    "broken": Limit("share that is broken", "a promise, whatever the numbers", *[0.0] * 4),
}

# Of float32 products; above it they are rounded (MLX_ENABLE_TF32, see MLX's page on precision).
EXACT = 1e-5

# Of rows, see above; and below how many standard deviations a router is undecided.
MOST = 0.75

UNDECIDED = 0.1

QUESTION = "Record: Anna Berg from Norway"

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "count": {"type": "integer"}},
    "required": ["name", "count"],
}

# A step at the real width: 2.4 GB of both sides as measured, and float64 logits of READ positions.
REAL_BYTES = 4_000_000_000

# Positions of its canvas on a CPU, for which 256 would take minutes.
REAL_CANVAS = 4

# Positions that the reference, which is slow, reads off.
READ = 32


@dataclass(frozen=True)
class Cost:
    """Seconds on both sides, first use included, and the most bytes MLX held meanwhile."""

    reference_seconds: float
    tested_seconds: float
    peak_memory: int


FREE = Cost(0.0, 0.0, 0)


@dataclass(frozen=True)
class Result:
    """What one check found. `value` is None where the number is not finite or there is none.

    `reported` is a number without a tolerance; `detail` says why a check failed or was skipped.
    """

    check: str
    model: str
    dtype: DType
    device: str
    status: Status
    measure: str
    value: float | None
    tolerance: float | None
    detail: str
    parts: tuple[Part, ...]
    cost: Cost


@dataclass(frozen=True)
class Subject:
    """A model on both sides, in words and numbers."""

    name: str
    dtype: DType
    pair: Pair
    tokenizer: Tokenizer | None = None


# Models of results that are about none, and about random weights.
NOTHING = "-"

REAL = "random, real width"


class Checks:
    """Two sides and what is known of the tested one: whether its float32 products are exact."""

    def __init__(self, reference: mx.Device, tested: mx.Device):
        self.reference = Side(reference, plain=True)
        self.tested = Side(tested, plain=False)
        self.exact = True

    # How results are made ------------------------------------------------------------------------

    def both(
        self, plain: Callable[[], Value], tested: Callable[[], Value]
    ) -> tuple[Value, Value, Cost]:
        """What each side computes."""
        mx.reset_peak_memory()
        wanted, slow = self.reference.run(plain)
        found, fast = self.tested.run(tested)
        return wanted, found, Cost(slow, fast, mx.get_peak_memory())

    def result(
        self,
        check: str,
        on: Subject | None,
        limit: str,
        value: float,
        cost: Cost,
        detail: str = "",
        parts: Sequence[Part] = (),
    ) -> Result:
        """A number held against its tolerance."""
        dtype: DType = on.dtype if on else "float32"
        rule = LIMITS[limit]
        column = "reduced" if dtype == "float32" and not self.exact else dtype
        tolerance: float | None = getattr(rule, column)
        status: Status = "reported"
        if tolerance is not None:
            status = "passed" if value <= tolerance else "failed"
        if not np.isfinite(value):
            status, detail = "failed", "numbers that are not finite"
        return Result(
            check=check,
            model=on.name if on else NOTHING,
            dtype=dtype,
            device=self.device,
            status=status,
            measure=rule.measure,
            value=value if np.isfinite(value) else None,
            tolerance=tolerance,
            detail=detail,
            parts=tuple(parts),
            cost=cost,
        )

    def without(self, check: str, model: str, dtype: DType, status: Status, why: str) -> Result:
        """A check that gave no number."""
        return Result(check, model, dtype, self.device, status, "", None, None, why, (), FREE)

    @property
    def device(self) -> str:
        """The tested one's type: "gpu" or "cpu"."""
        return kind_of(self.tested.device)

    def _apart(self, name: str, found: mx.array, wanted: mx.array, share: float = 1.0) -> Part:
        with self.reference.in_use():
            return apart(name, found, wanted, share)

    def _worst(
        self,
        check: str,
        on: Subject,
        limit: str,
        arrays: dict[str, tuple[mx.array, mx.array]],
        cost: Cost,
        every: bool = False,
    ) -> Result:
        """Parts (what was found, what is right), judged by the worst of them and, where `every`
        row counts or numbers are exact, by its worst row."""
        share = 1.0 if every or self._strict(on) else MOST
        parts = [self._apart(name, *both, share) for name, both in arrays.items()]
        # Numbers that are not finite are worst of all.
        worst = max(parts, key=lambda part: np.nan_to_num(part.relative, nan=np.inf))
        detail = f"worst: {worst.name}" if len(parts) > 1 else ""
        return self.result(check, on, limit, worst.relative, cost, detail, parts)

    # The device ----------------------------------------------------------------------------------

    def products(self) -> Iterator[Result]:
        """Whether a float32 product is one: newer chips round its operands unless told not to."""
        rng = np.random.default_rng(0)
        a, b = (rng.standard_normal((256, 256)).astype(np.float32) for _ in range(2))
        found, seconds = self.tested.run(lambda: mx.array(a) @ mx.array(b))
        wanted = a.astype(np.float64) @ b
        value = float(np.linalg.norm(np.array(found) - wanted) / np.linalg.norm(wanted))
        self.exact = value <= EXACT
        detail = "" if self.exact else "rounded, see MLX_ENABLE_TF32: float32 is judged as such"
        cost = Cost(0.0, seconds, mx.get_peak_memory())
        yield self.result("float32 products", None, "products", value, cost, detail)

    def draws(self) -> Iterator[Result]:
        """The same key gives the same ids and noise."""

        def drawn() -> tuple[mx.array, mx.array]:
            draws = SeededDraws(7, 262_144)
            return draws.tokens((4, 256)), draws.gumbel((4, 256, 64))

        wanted, found, cost = self.both(drawn, drawn)
        yield self.result("draws: ids", None, "ids", differing(found[0], wanted[0]), cost)
        noise = self._apart("noise", found[1], wanted[1])
        yield self.result("draws: noise", None, "noise", noise.absolute, cost)

    # The model -----------------------------------------------------------------------------------

    def layers(self, on: Subject, prompt: int = 40) -> Iterator[Result]:
        """Each layer of prefill and of a step by itself: given what the reference's was given."""
        tokens, canvas = _ids(on.pair.plain, 1, prompt), _ids(on.pair.plain, 2, _length(on))
        self_conditioning = self._belief(on)
        plain, model = on.pair.plain, on.pair.tested
        caches = plain.make_cache(), model.make_cache()

        def prefilled(of: DiffusionGemma, cache: list[LayerCache], *instead: mx.array) -> Watched:
            with tapped(of, instead) as taps:
                of.encode(tokens, cache)
            return [(t.given, t.gave, t.router.decided) for t in taps]

        def decoded(of: DiffusionGemma, cache: list[LayerCache], *instead: mx.array) -> Watched:
            with tapped(of, instead) as taps:
                of.decode([Pass(canvas, cache, _as(of, self_conditioning))])
            return [(t.given, t.gave, t.router.decided) for t in taps]

        mx.reset_peak_memory()
        for check, run in (("prefill by layer", prefilled), ("decoder by layer", decoded)):
            wanted, slow = self.reference.run(partial(run, plain, caches[0]))
            inputs = [given for given, _, _ in wanted]
            found, fast = self.tested.run(partial(run, model, caches[1], *inputs))
            cost = Cost(slow, fast, mx.get_peak_memory())
            layers = enumerate(zip(found, wanted, strict=True))
            arrays = {f"layer {i}": self._decided(on, *each) for i, each in layers}
            first = found[0][0], inputs[0]
            if run is prefilled:
                arrays["embedding"] = first
                held = [self.tested.run(lambda: [c.state for c in caches[1]])[0]]
                held += [self.reference.run(lambda: [c.state for c in caches[0]])[0]]
                kept = enumerate(zip(*held, strict=True))
                arrays |= {f"layer {i} keys and values": each for i, each in kept}
            yield self._worst(check, on, "layer", arrays, cost, every=True)
        bare = self.both(lambda: _conditioned(plain, canvas), lambda: _conditioned(model, canvas))
        arrays = {"with a self_conditioning": first, "at the first step": (bare[1], bare[0])}
        yield self._worst("self-conditioning", on, "layer", arrays, bare[2], every=True)

    def _decided(
        self, on: Subject, found: Sequence[mx.array], wanted: Sequence[mx.array]
    ) -> tuple[mx.array, mx.array]:
        """A layer's output (rows, hidden) on both sides, of tokens that chose the same experts for
        sure."""
        sure = np.array(wanted[2]).ravel() >= (0 if self._strict(on) else UNDECIDED)
        rows = mx.array(np.flatnonzero(sure))
        with self.reference.in_use():
            both = [each[1].reshape(-1, each[1].shape[-1])[rows] for each in (found, wanted)]
            mx.eval(both)
        return both[0], both[1]

    def _strict(self, on: Subject) -> bool:
        return on.dtype == "float32" and self.exact

    def readout(self, on: Subject) -> Iterator[Result]:
        """Tokens, entropy and expected embedding of the reference's hidden states."""
        plain, model = on.pair.plain, on.pair.tested
        canvas = _ids(plain, 2, _length(on))
        # Rounded for both.
        hidden = self.reference.run(
            lambda: _as(model, plain.decode([Pass(canvas, plain.make_cache())])[0])
        )[0]
        read, heat, tape = min(READ, _length(on)), 0.6, Tape(5, plain.config.vocab_size)

        def found_() -> list[mx.array]:
            seen = read_out(model, hidden, heat, draws=tape.rewind(), self_conditioning=True)
            assert seen.sampled is not None
            assert seen.self_conditioning is not None
            best = seen.choices.tokens[..., 0]
            log_best = log_probability(model, hidden, best, heat, seen)
            every = [
                best,
                seen.sampled,
                seen.entropy,
                log_best,
                seen.self_conditioning.astype(mx.float32),
            ]
            return [each[:, :read] for each in every]

        # The tested side first: its noise serves both.
        mx.reset_peak_memory()
        found, fast = self.tested.run(found_)
        best, sampled, entropy, log_best, self_conditioning = map(np.array, found)
        noise = tape.rewind().gumbel(())  # the same again, whatever the shape
        book, slow = self.reference.run(
            lambda: by_the_book(plain, hidden[:, :read].astype(mx.float32), heat, noise[:, :read])
        )
        cost = Cost(slow, fast, mx.get_peak_memory())
        nats = {
            "best token": book.lost_by_best(best),
            "drawn token": book.lost_by_drawn(sampled),
            "entropy": float(np.abs(entropy - book.entropy).max()),
            "log-probability": float(np.abs(log_best - book.log_p.max(axis=-1)).max()),
        }
        for name, value in nats.items():
            yield self.result(f"readout: {name}", on, "nats", value, cost)
        arrays = {
            "expected embedding": (mx.array(self_conditioning), mx.array(book.self_conditioning))
        }
        yield self._worst(
            "readout: expected embedding", on, "self_conditioning", arrays, cost, every=True
        )

    def kept_table(self, on: Subject) -> Iterator[Result]:
        """The same with the embedding table dequantized once, as `load` does where it fits."""
        self.tested.run(lambda: on.pair.tested.keep_table(mx.eval))
        yield from self.readout(replace(on, name=f"{on.name}, table kept"))

    def rows(self, on: Subject) -> Iterator[Result]:
        """Passes that are decoded together give what each gives alone."""
        plain, model = on.pair.plain, on.pair.tested
        self_conditioning = self._belief(on)
        prompts = [_ids(plain, 10 + count, count) for count in (3, 40, 90)]
        canvases = [_ids(plain, 20 + i, _length(on)) for i in range(len(prompts))]

        def passes(of: DiffusionGemma) -> list[Pass]:
            caches = [of.make_cache() for _ in prompts]
            for prompt, cache in zip(prompts, caches, strict=True):
                of.encode(prompt, cache)
            # The first one is at its first step.
            conditions = [None, *[_as(of, self_conditioning)] * (len(prompts) - 1)]
            return [Pass(*each) for each in zip(canvases, caches, conditions, strict=True)]

        wanted, found, cost = self.both(
            lambda: [plain.decode([each])[0] for each in passes(plain)],
            lambda: model.decode(passes(model)),
        )
        arrays = {f"row {i}": each for i, each in enumerate(zip(found, wanted, strict=True))}
        yield self._worst("batch rows", on, "stack", arrays, cost)

    def chunks(self, on: Subject) -> Iterator[Result]:
        """A prompt in chunks, of which the last is not full, leaves what it leaves in one piece."""
        yield self._read("prefill in chunks", on, 90, 16)

    def windows(self, on: Subject) -> Iterator[Result]:
        """The same of a prompt that is longer than the widest sliding window."""
        windows = [layer.window or 0 for layer in on.pair.plain.config.layers]
        yield self._read("beyond the sliding window", on, max(windows) + 150, 200)

    def _read(self, check: str, on: Subject, count: int, chunk: int) -> Result:
        tokens = np.array(_ids(on.pair.plain, 3, count))[0].tolist()
        canvas = _ids(on.pair.plain, 2, _length(on))

        def read(model: DiffusionGemma, chunk: int) -> list[mx.array]:
            cache = model.make_cache()
            prefill(model, tokens, cache, chunk)
            held = [layer.state for layer in cache if layer.state is not None]
            return [*held, model.decode([Pass(canvas, cache)])[0]]

        wanted, found, cost = self.both(
            lambda: read(on.pair.plain, max(count, PREFILL_CHUNK)),
            lambda: read(on.pair.tested, chunk),
        )
        names = [*(f"layer {i} keys and values" for i in range(len(found) - 1)), "a step behind it"]
        arrays = dict(zip(names, zip(found, wanted, strict=True), strict=True))
        return self._worst(check, on, "stack", arrays, cost)

    def _belief(self, on: Subject) -> mx.array:
        """An expected embedding: halves of two tokens' (1, L, hidden), in float32."""
        plain = on.pair.plain
        both = [_ids(plain, seed, _length(on)) for seed in (4, 5)]
        return self.reference.run(lambda: (plain.embed(both[0]) + plain.embed(both[1])) / 2)[0]

    # Whole runs ----------------------------------------------------------------------------------

    def denoising(
        self, on: Subject, prompt: str = QUESTION, steps: int | None = None
    ) -> Iterator[Result]:
        """The same draws give the same canvas at every step."""
        yield self._canvases("denoising", on, prompt, steps, lambda draws: None)[0]

    def pins(self, on: Subject, steps: int | None = None) -> Iterator[Result]:
        """The same with pinned positions, which stay at every step."""
        assert on.tokenizer is not None
        case = next(scene.case for scene in SCENES if scene.case.pieces)
        words = Vocabulary(on.pair.plain, on.tokenizer)
        starts: list[Start] = []

        def start(draws: SeededDraws) -> Start:
            assert case.pieces is not None
            starts.append(pinned_start([forced_tokens(on.pair.plain, words, case.pieces)], draws))
            return starts[0]

        result, canvases = self._canvases("pinned run", on, case.prompt, steps, start)
        yield result
        pinned, given = (np.array(each) for each in (starts[0].pinned, starts[0].canvas))
        changed = float(np.mean([(canvas != given)[pinned] for canvas in canvases]))
        yield self.result("pins stay", on, "broken", changed, result.cost)

    def _canvases(
        self,
        check: str,
        on: Subject,
        prompt: str,
        steps: int | None,
        start: Callable[[SeededDraws], Start | None],
    ) -> tuple[Result, list[Any]]:
        """A run on both sides, and the tested one's canvases and best tokens, step by step."""
        assert on.tokenizer is not None
        turn = on.tokenizer.apply_chat_template([{"role": "user", "content": prompt}])
        ids = on.tokenizer.encode(turn)
        tape = Tape(0, on.pair.plain.config.vocab_size)

        def run(model: DiffusionGemma) -> list[Any]:
            prompt_cache = PromptCache(model)
            prompt_cache.read(ids)
            config = model.generation.override(max_denoising_steps=steps)
            taken, started = [], time.perf_counter()
            for now in drive(
                model, denoise(model, prompt_cache.cache, config, tape, start(tape.rewind()))
            ):
                both = np.concatenate([np.array(now.canvas), np.array(now.argmax)])
                taken.append((both, time.perf_counter() - started))
                started = time.perf_counter()
            return taken

        wanted, found, cost = self.both(lambda: run(on.pair.plain), lambda: run(on.pair.tested))
        missing = (None, 0.0)
        pairs = list(zip_longest(found, wanted, fillvalue=missing))
        shares = [
            1.0 if a is None or b is None else float(np.mean(a != b)) for (a, _), (b, _) in pairs
        ]
        seconds = [float(np.median([s for _, s in each])) for each in (wanted, found)]
        detail = (
            f"{len(found)} steps of {1e3 * seconds[1]:.1f} ms, reference {1e3 * seconds[0]:.1f} ms"
        )
        if first := next((i + 1 for i, share in enumerate(shares) if share), None):
            detail = f"equal up to step {first - 1} of {len(wanted)}; {detail}"
        value = float(np.mean(shares))
        result = self.result(check, on, "canvases", value, cost, detail)
        return result, [row for both, _ in found for row in np.split(both, 2)]

    def schema(self, on: Subject) -> Iterator[Result]:
        """An answer under a schema follows it, which is checked where it ends."""
        if find_spec("jsonschema") is None:
            why = "needs pip install 'mlx-diffgemma[schema]'"
            yield self.without("schema", on.name, on.dtype, "skipped", why)
            return
        assert on.tokenizer is not None
        tokenizer, tape = on.tokenizer, Tape(2, on.pair.plain.config.vocab_size)

        def answer(model: DiffusionGemma) -> str:
            events = stream_generate(
                model, tokenizer, QUESTION, schema=SCHEMA, draws=tape.rewind(), steps=4
            )
            return "".join(event.text for event in events if isinstance(event, Text))

        wanted, found, cost = self.both(
            lambda: answer(on.pair.plain), lambda: answer(on.pair.tested)
        )
        detail = "the same document" if found == wanted else "another document, which is valid too"
        yield self.result("schema", on, "broken", 0.0, cost, detail)

    # The real size -------------------------------------------------------------------------------

    def real_width(self) -> Iterator[Result]:
        """A sliding and a full layer and the readout at the real width and vocabulary, packed."""
        gpu = self.device == "gpu"
        # What `load` computes in on each.
        dtype: DType = "bfloat16" if gpu else "float32"
        if (free := free_memory()) < REAL_BYTES:
            why = f"needs {decimal(REAL_BYTES)}, {decimal(free)} are free"
            yield self.without("real width", REAL, dtype, "skipped", why)
            return
        weights = self.reference.run(lambda: _real(256 if gpu else REAL_CANVAS, dtype))[0]
        both = pair(weights, self.reference, self.tested, keep=[EMBEDDING])
        del weights
        on = Subject(REAL, dtype, both)
        yield from self.layers(on, prompt=8)
        mx.clear_cache()
        yield from self.readout(on)


def _real(positions: int, dtype: DType) -> Weights:
    """Random weights of the 26 B model's widths, but for the experts: 8 of 128, to bound memory."""
    from ..convert import RECIPES
    from .sides import packed

    layers = (LayerConfig(256, 8, 1024, 1e4, 128), LayerConfig(512, 2, None, 1e6, 64))
    config = Config(262_144, 2816, 2112, 704, 16, 8, 2, 1e-6, 30.0, 4096, positions, layers)
    weights = random_weights(config, GenerationConfig(), RECIPES["4bit"])
    return packed(weights, getattr(mx, dtype), None)


def _conditioned(model: DiffusionGemma, canvas: mx.array) -> mx.array:
    """What the first layer is given at a first step."""
    given: mx.array = model.model.decoder.self_conditioning(model.embed(canvas))
    return given


def _ids(model: DiffusionGemma, seed: int, count: int) -> mx.array:
    """Random ids (1, count) that depend on no device."""
    drawn = np.random.default_rng(seed).integers(0, model.config.vocab_size, (1, count))
    return mx.array(drawn.astype(np.int32))


def _length(on: Subject) -> int:
    return on.pair.plain.config.canvas_length


def _as(model: DiffusionGemma, array: mx.array) -> mx.array:
    """In the type that a model computes in."""
    return array.astype(model.model.decoder.norm.weight.dtype)


def kind_of(device: mx.Device) -> str:
    """ "cpu" or "gpu"."""
    return "cpu" if device == mx.Device(mx.cpu) else "gpu"
