"""Checks of the device and of the model's parts; each gives a result or several."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import mlx.core as mx
import numpy as np
from rich.filesize import decimal

from ...checkpoint.fit import free_memory
from ...checkpoint.weights import DType
from ...convert.recipes import RECIPES
from ...diffusion.draws import SeededDraws
from ...diffusion.head import log_probability, read_out
from ...diffusion.prompt_cache import PREFILL_CHUNK, prefill
from ...model.cache import LayerCache
from ...model.config import Config, LayerConfig
from ...model.diffusion_gemma import DiffusionGemma, Pass
from ...model.settings import GenerationConfig
from .comparison import Comparison, Subject
from .plain import plain_readout
from .results import Cost, Result, differing
from .sides import EMBEDDING, Weights, packed, pair, random_weights
from .taps import Tape, tapped

# Of each layer: what it was given, what it gave, and how decided its router was.
Watched = list[tuple[mx.array, mx.array, mx.array]]

# Of float32 products; above it they are rounded (MLX_ENABLE_TF32, see MLX's page on precision).
EXACT = 1e-5

# Standard deviations of a token's scores between two experts, below which the router may take
# either.
UNDECIDED = 0.1

# A step at the real width: 2.4 GB of both sides as measured, and float64 logits of READ positions.
REAL_BYTES = 4_000_000_000

# Positions of its canvas on a CPU, for which 256 would take minutes.
REAL_CANVAS = 4

# Positions that the reference, which is slow, reads off.
READ = 32

# A window of so few tokens that one more or less moves what `tiny` computes by more than is
# tolerated.
NARROW = 6

# The model of results that are about random weights.
REAL = "random, real width"


def products(compare: Comparison) -> Iterator[Result]:
    """Check whether a float32 product is one: newer chips round operands unless told not to."""
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal((256, 256)).astype(np.float32) for _ in range(2))
    found, seconds = compare.tested.run(lambda: mx.array(a) @ mx.array(b))
    wanted = a.astype(np.float64) @ b
    value = float(np.linalg.norm(np.array(found) - wanted) / np.linalg.norm(wanted))
    compare.exact = value <= EXACT
    detail = "" if compare.exact else "rounded, see MLX_ENABLE_TF32: float32 is judged as such"
    cost = Cost(0.0, seconds, mx.get_peak_memory())
    yield compare.result("float32 products", None, "products", value, cost, detail)


def draws(compare: Comparison) -> Iterator[Result]:
    """Check that the same key gives the same ids and noise."""

    def drawn() -> tuple[mx.array, mx.array]:
        draws = SeededDraws(7, 262_144)
        return draws.tokens((4, 256)), draws.gumbel((4, 256, 64))

    wanted, found, cost = compare.both(drawn, drawn)
    yield compare.result("draws: ids", None, "ids", differing(found[0], wanted[0]), cost)
    noise = compare.difference("noise", found[1], wanted[1])
    yield compare.result("draws: noise", None, "noise", noise.absolute, cost)


def layers(compare: Comparison, on: Subject, prompt: int = 40) -> Iterator[Result]:
    """Check each layer of prefill and of a step, given what the reference's was given."""
    tokens, canvas = _ids(on.pair.plain, 1, prompt), _ids(on.pair.plain, 2, _length(on))
    embedding = _expected_embedding(compare, on)
    plain, model = on.pair.plain, on.pair.tested
    caches = plain.make_cache(), model.make_cache()

    def prefilled(of: DiffusionGemma, cache: list[LayerCache], *instead: mx.array) -> Watched:
        with tapped(of, instead) as taps:
            of.encode(tokens, cache)
        return [(t.given, t.gave, t.router.decided) for t in taps]

    def decoded(of: DiffusionGemma, cache: list[LayerCache], *instead: mx.array) -> Watched:
        with tapped(of, instead) as taps:
            of.decode([Pass(canvas, cache, _as(of, embedding))])
        return [(t.given, t.gave, t.router.decided) for t in taps]

    mx.reset_peak_memory()
    for check, run in (("prefill by layer", prefilled), ("decoder by layer", decoded)):
        wanted, slow = compare.reference.run(partial(run, plain, caches[0]))
        inputs = [given for given, _, _ in wanted]
        found, fast = compare.tested.run(partial(run, model, caches[1], *inputs))
        cost = Cost(slow, fast, mx.get_peak_memory())
        layers = enumerate(zip(found, wanted, strict=True))
        arrays = {f"layer {i}": _decided(compare, on, *each) for i, each in layers}
        first = found[0][0], inputs[0]
        if run is prefilled:
            arrays["embedding"] = first
            held = [compare.tested.run(lambda: [c.state for c in caches[1]])[0]]
            held += [compare.reference.run(lambda: [c.state for c in caches[0]])[0]]
            kept = enumerate(zip(*held, strict=True))
            arrays |= {f"layer {i} keys and values": each for i, each in kept}
        yield compare.worst(check, on, "layer", arrays, cost, every=True)
    bare = compare.both(lambda: _conditioned(plain, canvas), lambda: _conditioned(model, canvas))
    arrays = {"with self-conditioning": first, "at the first step": (bare[1], bare[0])}
    yield compare.worst("self-conditioning", on, "layer", arrays, bare[2], every=True)


def _decided(
    compare: Comparison, on: Subject, found: Sequence[mx.array], wanted: Sequence[mx.array]
) -> tuple[mx.array, mx.array]:
    """Return a layer's output (rows, hidden) on both sides, of decided tokens."""
    sure = np.array(wanted[2]).ravel() >= (0 if compare.strict(on) else UNDECIDED)
    rows = mx.array(np.flatnonzero(sure))
    with compare.reference.in_use():
        both = [each[1].reshape(-1, each[1].shape[-1])[rows] for each in (found, wanted)]
        mx.eval(both)
    return both[0], both[1]


def readout(compare: Comparison, on: Subject) -> Iterator[Result]:
    """Check tokens, entropy and expected embedding of the reference's hidden states."""
    plain, model = on.pair.plain, on.pair.tested
    canvas = _ids(plain, 2, _length(on))
    # Rounded for both.
    hidden = compare.reference.run(
        lambda: _as(model, plain.decode([Pass(canvas, plain.make_cache())])[0])
    )[0]
    read, tape = min(READ, _length(on)), Tape(5, plain.config.vocab_size)

    # Above those of the sampler: trained models are so sure that of one token no mistake is seen.
    temperature = 3.0
    # The tested side first: its noise serves both.
    mx.reset_peak_memory()
    found, fast = compare.tested.run(
        lambda: _tested_readout(model, hidden, read, temperature, tape.rewind())
    )
    best, sampled, entropy, log_best, self_conditioning = map(np.array, found)
    noise = tape.rewind().gumbel(())  # the same again, whatever the shape
    right, slow = compare.reference.run(
        lambda: plain_readout(
            plain, hidden[:, :read].astype(mx.float32), temperature, noise[:, :read]
        )
    )
    cost = Cost(slow, fast, mx.get_peak_memory())
    nats = {
        "best token": right.nats_behind_best(best),
        "drawn token": right.nats_behind_drawn(sampled),
        "entropy": float(np.abs(entropy - right.entropy).max()),
        "log-probability": float(np.abs(log_best - right.log_p.max(axis=-1)).max()),
    }
    for name, value in nats.items():
        yield compare.result(f"readout: {name}", on, "nats", value, cost)
    arrays = {
        "expected embedding": (mx.array(self_conditioning), mx.array(right.self_conditioning))
    }
    yield compare.worst(
        "readout: expected embedding", on, "self_conditioning", arrays, cost, every=True
    )


def _tested_readout(
    model: DiffusionGemma, hidden: mx.array, positions: int, temperature: float, draws: Tape
) -> list[mx.array]:
    """Return best and drawn tokens, entropy, log-probability of the best, expected embedding."""
    seen = read_out(model, hidden, temperature, draws=draws, self_conditioning=True)
    assert seen.sampled is not None
    assert seen.self_conditioning is not None
    best = seen.choices.tokens[..., 0]
    log_best = log_probability(model, hidden, best, temperature, seen)
    embedding = seen.self_conditioning.astype(mx.float32)
    return [each[:, :positions] for each in (best, seen.sampled, seen.entropy, log_best, embedding)]


def kept_table(compare: Comparison, on: Subject) -> Iterator[Result]:
    """Check the same with the table dequantized once, as `load` does where it fits."""
    compare.tested.run(lambda: on.pair.tested.keep_table(mx.eval))
    yield from readout(compare, replace(on, name=f"{on.name}, table kept"))


def rows(compare: Comparison, on: Subject) -> Iterator[Result]:
    """Check that passes that are decoded together give what each gives alone."""
    plain, model = on.pair.plain, on.pair.tested
    embedding = _expected_embedding(compare, on)
    prompts = [_ids(plain, 10 + count, count) for count in (3, 40, 90)]
    canvases = [_ids(plain, 20 + i, _length(on)) for i in range(len(prompts))]

    def passes(of: DiffusionGemma) -> list[Pass]:
        caches = [of.make_cache() for _ in prompts]
        for prompt, cache in zip(prompts, caches, strict=True):
            of.encode(prompt, cache)
        # The first one is at its first step.
        conditions = [None, *[_as(of, embedding)] * (len(prompts) - 1)]
        return [Pass(*each) for each in zip(canvases, caches, conditions, strict=True)]

    wanted, found, cost = compare.both(
        lambda: [plain.decode([each])[0] for each in passes(plain)],
        lambda: model.decode(passes(model)),
    )
    arrays = {f"row {i}": each for i, each in enumerate(zip(found, wanted, strict=True))}
    yield compare.worst("batch rows", on, "stack", arrays, cost)


def chunks(compare: Comparison, on: Subject) -> Iterator[Result]:
    """Check that a prompt in chunks, the last not full, leaves what it leaves in one piece."""
    yield _chunked(compare, "prefill in chunks", on, 90, 16)


def windows(compare: Comparison, on: Subject) -> Iterator[Result]:
    """Check the same of a prompt that is longer than the widest sliding window, and with windows
    so narrow that one token more or less is told."""
    windows = [layer.window or 0 for layer in on.pair.plain.config.layers]
    yield _chunked(compare, "beyond the sliding window", on, max(windows) + 150, 200)
    yield _chunked(compare, "beyond a narrow window", on, 3 * NARROW, NARROW + 2, NARROW)


def _chunked(
    compare: Comparison, check: str, on: Subject, count: int, chunk: int, window: int | None = None
) -> Result:
    """Compare what a prompt of `count` tokens in chunks leaves; `window` is the layers', or
    another for those that slide."""
    tokens = np.array(_ids(on.pair.plain, 3, count))[0].tolist()
    canvas = _ids(on.pair.plain, 2, _length(on))

    def read(model: DiffusionGemma, chunk: int) -> list[mx.array]:
        cache = model.make_cache()
        if window is not None:
            cache = [LayerCache(layer.window and window) for layer in cache]
        prefill(model, tokens, cache, chunk)
        held = [layer.state for layer in cache if layer.state is not None]
        return [*held, model.decode([Pass(canvas, cache)])[0]]

    wanted, found, cost = compare.both(
        lambda: read(on.pair.plain, max(count, PREFILL_CHUNK)),
        lambda: read(on.pair.tested, chunk),
    )
    names = [*(f"layer {i} keys and values" for i in range(len(found) - 1)), "a step behind it"]
    arrays = dict(zip(names, zip(found, wanted, strict=True), strict=True))
    return compare.worst(check, on, "stack", arrays, cost)


def _expected_embedding(compare: Comparison, on: Subject) -> mx.array:
    """Make an expected embedding: halves of two tokens' (1, L, hidden), in float32."""
    plain = on.pair.plain
    both = [_ids(plain, seed, _length(on)) for seed in (4, 5)]
    return compare.reference.run(lambda: (plain.embed(both[0]) + plain.embed(both[1])) / 2)[0]


def real_width(compare: Comparison) -> Iterator[Result]:
    """Check two kinds of layer and the readout at the real width and vocabulary, packed."""
    gpu = compare.device == "gpu"
    # What `load` computes in on each.
    dtype: DType = "bfloat16" if gpu else "float32"
    if (free := free_memory()) < REAL_BYTES:
        why = f"needs {decimal(REAL_BYTES)}, {decimal(free)} are free"
        yield compare.without("real width", REAL, dtype, "skipped", why)
        return
    weights = compare.reference.run(lambda: _real(256 if gpu else REAL_CANVAS, dtype))[0]
    both = pair(weights, compare.reference, compare.tested, keep=[EMBEDDING])
    del weights
    on = Subject(REAL, dtype, both)
    yield from layers(compare, on, prompt=8)
    mx.clear_cache()
    yield from readout(compare, on)


def _real(positions: int, dtype: DType) -> Weights:
    """Make random weights of the 26 B model's widths, with 8 of 128 experts, to bound memory."""
    layers = (LayerConfig(256, 8, 1024, 1e4, 128), LayerConfig(512, 2, None, 1e6, 64))
    config = Config(262_144, 2816, 2112, 704, 16, 8, 2, 1e-6, 30.0, 4096, positions, layers)
    weights = random_weights(config, GenerationConfig(), RECIPES["4bit"])
    return packed(weights, getattr(mx, dtype), None)


def _conditioned(model: DiffusionGemma, canvas: mx.array) -> mx.array:
    """Return what the first layer is given at a first step."""
    given: mx.array = model.model.decoder.self_conditioning(model.embed(canvas))
    return given


def _ids(model: DiffusionGemma, seed: int, count: int) -> mx.array:
    """Draw random ids (1, count) that depend on no device."""
    drawn = np.random.default_rng(seed).integers(0, model.config.vocab_size, (1, count))
    return mx.array(drawn.astype(np.int32))


def _length(on: Subject) -> int:
    return on.pair.plain.config.canvas_length


def _as(model: DiffusionGemma, array: mx.array) -> mx.array:
    """Return an array in the type that a model computes in."""
    return array.astype(model.model.decoder.norm.weight.dtype)
