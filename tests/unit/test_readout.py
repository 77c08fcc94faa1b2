"""Reading off in blocks gives what all logits at once give; see slow.py."""

import io
import re
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from held import active_memory, exact_memory
from hypothesis import given, settings
from hypothesis import strategies as st
from random_model import untrained
from slow import best_canvas, entropy, soft_embedding

from mlx_diffgemma import DiffusionGemma
from mlx_diffgemma.diffusion import constraints, draws, head, whole
from mlx_diffgemma.diffusion.automaton import Concat, Tokens, compile_pattern
from mlx_diffgemma.diffusion.constraints import ANYTHING, NEVER, Constraint, ForbidFirst
from mlx_diffgemma.diffusion.draws import SeededDraws
from mlx_diffgemma.diffusion.head import Readout, log_probability, read_out
from mlx_diffgemma.diffusion.plans import Plans

VOCAB = 107  # not a whole number of sub-blocks of 16
LENGTH = 3
MODEL = untrained(VOCAB, LENGTH)
ANY, FEW = Tokens(tuple(range(VOCAB))), Tokens((3, 40, 90))


def plans(rows: int) -> Plans:
    """Another pattern in each row; the second position of odd rows has one choice."""
    patterns = [
        Concat((FEW, Tokens((77,)) if row % 2 else ANY, Tokens((2, 5, 100 + row))))
        for row in range(rows)
    ]
    return Plans([compile_pattern(p).plan(LENGTH, LENGTH) for p in patterns], VOCAB)


def read_in_blocks(model: DiffusionGemma, hidden: mx.array, tokens: int, *given: Any) -> Readout:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(head, "_tokens_at_once", lambda model, positions: -(-tokens // 16) * 16)
        patch.setattr(head, "APART", 3)
        patch.setattr(draws, "APART", 3)
        return read_out(model, hidden, *given, self_conditioning=True)


def close(ours: mx.array, theirs: mx.array, within: float = 1e-4) -> bool:
    return bool(mx.allclose(ours, theirs, rtol=within, atol=within).item())


@settings(max_examples=80, deadline=None)
@given(
    st.integers(0, 2**31),
    st.sampled_from([1, 16, 40, VOCAB]),
    st.sampled_from([0.01, 1.0, 40.0]),  # from nearly flat to saturated at the cap
    st.sampled_from([0.1, 0.4, 0.8]),
    st.integers(1, 3),
    st.sampled_from(["anything", "first", "plans"]),
)
def test_blocks_give_what_all_logits_give(
    seed: int, block: int, size: float, temperature: float, rows: int, kind: str
) -> None:
    hidden = mx.random.normal((rows, LENGTH, 32), key=mx.random.key(seed)) * size
    constraint: Constraint = {
        "anything": lambda: ANYTHING,
        "first": lambda: ForbidFirst((0, 41, 99)),
        "plans": lambda: plans(rows),
    }[kind]()
    logits = MODEL.logits(hidden) / temperature
    allowed = constraint.allowed(0, VOCAB, mx.arange(LENGTH))
    if allowed is not None:
        logits = mx.where(allowed, logits, NEVER)
    seen = read_in_blocks(MODEL, hidden, block, temperature, constraint, SeededDraws(seed, VOCAB))
    lse = mx.logsumexp(logits, axis=-1)
    assert close(seen.log_normalizer, lse)
    assert close(seen.entropy, entropy(logits))
    assert (seen.entropy >= -1e-5).all()
    assert seen.self_conditioning is not None
    assert close(seen.self_conditioning, soft_embedding(MODEL, logits), 1e-3)
    canvas = mx.zeros((rows, LENGTH), dtype=mx.int32)
    argmax = constraint.choose(seen.choices, None, canvas)
    expected = best_canvas(constraint, logits)
    chosen = mx.take_along_axis(logits, expected[..., None], axis=-1)[..., 0]
    ours = mx.take_along_axis(logits, argmax[..., None], axis=-1)[..., 0]
    # Saturated logits tie; the sum, not the ids, is what must be the same.
    assert close(ours.sum(axis=-1), chosen.sum(axis=-1))
    assert close(log_probability(MODEL, hidden, argmax, temperature, seen), ours - lse, 1e-3)
    drawn = seen.sampled
    if seen.perturbed is not None:
        drawn = constraint.choose(seen.perturbed, None, canvas)
    assert drawn is not None
    assert (mx.take_along_axis(logits, drawn[..., None], axis=-1) > NEVER / 2).all()


def test_tiny_entropies_are_exact() -> None:
    """log Z - S / Z loses them in rounding unless both are relative to the peak."""
    hidden = mx.random.normal((1, LENGTH, 32), key=mx.random.key(4)) * 8
    seen = read_out(MODEL, hidden, 0.05)
    logits = np.array(MODEL.logits(hidden), dtype=np.float64) / 0.05
    log_p = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
    exact = -(np.exp(log_p) * log_p).sum(axis=-1)
    assert (exact < 1e-3).any()
    assert np.array(seen.entropy) == pytest.approx(exact, rel=1e-3, abs=1e-9)


def test_pinned_tokens_take_part_in_the_best_canvas() -> None:
    given_plans = plans(1)
    logits = mx.random.normal((1, LENGTH, VOCAB), key=mx.random.key(5))
    canvas = mx.array([[90, 17, 0]], dtype=mx.int32)
    fixed = mx.array([[True, True, False]])
    free = best_canvas(given_plans, logits)[0].tolist()
    held = best_canvas(given_plans, logits, fixed, canvas)[0].tolist()
    assert held[:2] == [90, 17] != free[:2]
    assert held[2] == free[2]


PACKED = {"4-bit": (4, "affine"), "mxfp8": (8, "mxfp8")}


def in_type(kind: str) -> DiffusionGemma:
    """A model whose table is quantized, or all of whose arrays are of that type."""
    model: DiffusionGemma = untrained(VOCAB, LENGTH)
    if kind in PACKED:
        bits, mode = PACKED[kind]
        decoder = model.model.decoder
        decoder.embed_tokens = decoder.embed_tokens.to_quantized(32, bits, mode=mode)
    else:
        model.set_dtype(getattr(mx, kind))
    return model


@pytest.mark.parametrize("kind", ["bfloat16", "float16", *PACKED])
def test_other_types_and_quantized_tables(kind: str) -> None:
    model = in_type(kind)
    assert model.dequantizes == (kind in PACKED)
    dtype = model.model.decoder.norm.weight.dtype
    hidden = mx.random.normal((2, LENGTH, 32), key=mx.random.key(6)).astype(dtype)
    seen = read_in_blocks(model, hidden, 32, 0.7, ForbidFirst((1,)), SeededDraws(1, VOCAB))
    logits = mx.where(
        ForbidFirst((1,)).allowed(0, VOCAB, mx.arange(LENGTH)), model.logits(hidden) / 0.7, NEVER
    )
    assert seen.self_conditioning is not None
    assert seen.self_conditioning.dtype == dtype
    within = 1e-3 if dtype == mx.float32 else 0.06
    assert close(seen.entropy, entropy(logits), within)
    assert close(seen.self_conditioning.astype(mx.float32), soft_embedding(model, logits), within)


@pytest.mark.parametrize("kind", PACKED)
def test_a_kept_table_gives_what_a_packed_one_gives(kind: str) -> None:
    model = in_type(kind)
    hidden = mx.random.normal((2, LENGTH, 32), key=mx.random.key(6))
    packed = read_in_blocks(model, hidden, 32, 0.7, ForbidFirst((1,)))
    model.keep_table(mx.eval)
    assert not model.dequantizes
    kept = read_out(model, hidden, 0.7, ForbidFirst((1,)), self_conditioning=True)
    assert close(kept.entropy, packed.entropy, 1e-5)
    assert close(kept.self_conditioning, packed.self_conditioning, 1e-5)  # type: ignore[arg-type]


def test_fused_kernels_compute_the_same() -> None:
    """Metal and the CPU fuse elementwise chains; `mx.disable_compile` shows what is fused."""
    hidden = mx.random.normal((1, LENGTH, 32), key=mx.random.key(7))
    fused = read_out(MODEL, hidden, 0.5, ANYTHING, SeededDraws(3, VOCAB), self_conditioning=True)
    mx.disable_compile()
    try:
        plain = read_out(
            MODEL, hidden, 0.5, ANYTHING, SeededDraws(3, VOCAB), self_conditioning=True
        )
    finally:
        mx.enable_compile()
    assert close(fused.entropy, plain.entropy, 1e-6)
    assert close(fused.self_conditioning, plain.self_conditioning, 1e-5)  # type: ignore[arg-type]
    assert fused.sampled.tolist() == plain.sampled.tolist()  # type: ignore[union-attr]


def test_a_kept_table_is_dequantized_in_place() -> None:
    """Dequantizing it at once took four times its size."""
    model = untrained(1 << 18, LENGTH)
    decoder = model.model.decoder
    decoder.embed_tokens = decoder.embed_tokens.to_quantized(32, 4)
    mx.eval(model.parameters())
    mx.reset_peak_memory()
    before = active_memory()
    with exact_memory():
        model.keep_table(mx.eval)
    assert mx.get_active_memory() - before == pytest.approx(4 * 32 << 18, rel=0.01)
    assert mx.get_peak_memory() - before < 2 * (4 * 32 << 18)


@pytest.mark.parametrize("piece", [whole.NOISE_BYTES, 4 * LENGTH * 48, 1])
def test_a_seed_gives_the_same_in_blocks_of_any_size(
    monkeypatch: pytest.MonkeyPatch, piece: int
) -> None:
    """Their size follows from free memory: one seed gave other texts of a schema under load."""
    monkeypatch.setattr(whole, "NOISE_BYTES", piece)
    hidden = mx.random.normal((1, LENGTH, 32), key=mx.random.key(4))
    found = []
    for block in (16, 64, 32, 112):
        rng = SeededDraws(5, VOCAB)
        seen = read_in_blocks(MODEL, hidden, block, 0.7, plans(1), rng)
        assert seen.perturbed is not None
        found.append((seen.perturbed.tokens, seen.perturbed.scores, rng.tokens((9,))))
    for tokens, scores, after in found[1:]:
        assert mx.array_equal(tokens, found[0][0])
        assert close(scores, found[0][1])
        assert mx.array_equal(after, found[0][2])


def test_memory_of_a_step_does_not_grow_with_the_number_of_blocks() -> None:
    """Each block's part of the expected embedding used to be held to the end: 300 MB of 103."""
    model = untrained(1 << 12, 64, width=1024)
    hidden = mx.random.normal((1, 64, 1024), key=mx.random.key(8))
    mx.eval(model.parameters(), hidden)
    before = active_memory()
    mx.reset_peak_memory()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(head, "_tokens_at_once", lambda model, positions: 1 << 6)
        seen = read_out(
            model, hidden, 0.5, ANYTHING, SeededDraws(3, 1 << 12), self_conditioning=True
        )
    mx.eval([seen.entropy, seen.sampled, seen.self_conditioning])
    assert mx.get_peak_memory() - before < 40 * hidden.nbytes  # of 64 blocks


def test_memory_of_a_step_does_not_grow_with_the_vocabulary() -> None:
    """Four copies of the logits used to exist at a step's peak."""
    peaks = []
    for vocab_size in (1 << 14, 1 << 16):
        model = untrained(vocab_size, 64)
        hidden = mx.random.normal((1, 64, 32), key=mx.random.key(8))
        mx.eval(model.parameters(), hidden)
        mx.synchronize()
        before = active_memory()
        mx.reset_peak_memory()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(head, "_tokens_at_once", lambda model, positions: 1 << 12)
            seen = read_out(
                model, hidden, 0.5, ANYTHING, SeededDraws(3, vocab_size), self_conditioning=True
            )
        mx.eval([seen.entropy, seen.sampled, seen.self_conditioning])
        peaks.append(mx.get_peak_memory() - before)
    assert peaks[1] < 2 * peaks[0]  # of four times the vocabulary
    assert peaks[1] < 4 * 64 * (1 << 16)  # one copy


def test_blocks_are_joined_by_one_kernel() -> None:
    """As `scripts/count_kernels.py` counts: a concatenation would be a copy of each block."""
    blocks = range(9)  # of the real vocabulary and canvas

    def some(key: int, *shape: int) -> list[mx.array]:
        keys = mx.random.split(mx.random.key(key), len(blocks))
        return [mx.random.uniform(0.1, 1, (2, LENGTH, *shape), key=k) for k in keys]

    peaks, masses, slopes, soft = some(0, 1), some(1, 1), some(2, 1), some(3, 32)
    places, top, few = [m.astype(mx.uint32) for m in masses], some(4, 1)[0], slice(head.JOINED)
    mx.eval(peaks, masses, slopes, soft, places, top)
    joins = {
        "highest": constraints.highest(peaks),
        "_best_id": constraints._best_id(peaks, places, [100 * i for i in blocks]),
        "_of_best": constraints._of_best(peaks, soft),
        "mass_of": whole.mass_of(top, peaks, masses),
        "slope_of": whole.slope_of(top, peaks[few], masses[few], slopes[few]),
        "_mixed": head._mixed(top, peaks, soft),
    }
    for name, joined in joins.items():
        drawn = io.StringIO()
        mx.export_to_dot(drawn, joined)
        kernels = [n for n in re.findall(r'label ="(\w+)"', drawn.getvalue()) if n != "Broadcast"]
        # The ids of nine blocks are 27 arrays with their firsts: over what one kernel joins.
        assert len(kernels) == (2 if name == "_best_id" else 1), (name, kernels)
    mixed = sum(mx.exp(p - top) * s for p, s in zip(peaks, soft, strict=True))
    assert close(joins["_mixed"], mixed)
    at = np.stack([np.array(p) for p in peaks]).argmax(0)
    assert (np.array(joins["_best_id"]) == 100 * at).all()
    assert (np.array(joins["_of_best"]) == np.choose(at, [np.array(s) for s in soft])).all()
