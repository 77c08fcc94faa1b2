"""A model that ranks share computes what it computes alone, of weights each reads its part of."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from sharing import CONFIG, on_all, write_model

from mlx_diffgemma import DiffusionGemma
from mlx_diffgemma.checkpoint.files import read_header, read_headers
from mlx_diffgemma.checkpoint.info import info_of
from mlx_diffgemma.checkpoint.load import model_of, part_of
from mlx_diffgemma.checkpoint.quantization import MODES
from mlx_diffgemma.checkpoint.slices import COLUMNS, ROWS, Cut, read_cut
from mlx_diffgemma.diffusion.constraints import Anything, Constraint, ForbidFirst
from mlx_diffgemma.diffusion.decoding import drive
from mlx_diffgemma.diffusion.denoise import Start, denoise
from mlx_diffgemma.diffusion.draws import SeededDraws
from mlx_diffgemma.diffusion.head import read_causally
from mlx_diffgemma.diffusion.prompt_cache import PromptCache
from mlx_diffgemma.distributed.launch import LaunchError
from mlx_diffgemma.distributed.share import Share
from mlx_diffgemma.model.config import Config, LayerConfig
from mlx_diffgemma.model.diffusion_gemma import Pass
from mlx_diffgemma.model.part import CutError, cut_model
from mlx_diffgemma.model.settings import ConfidenceThreshold, GenerationConfig

LENGTH = CONFIG["canvas_length"]


class Together(Anything):
    """Any tokens, but drawn as those that depend on one another are."""

    joint = True


def loaded(directory: Path, share: Share) -> DiffusionGemma:
    headers = read_headers(directory)
    return model_of(headers, "float32", part=part_of(headers, share))


def canvases(
    model: DiffusionGemma,
    config: GenerationConfig,
    constraint: Constraint,
    pinned: mx.array | None = None,
) -> list[mx.array]:
    """Of each step the canvas, the argmax and the entropies, behind a prompt read in chunks."""
    prompt_cache = PromptCache(model)
    prompt_cache.read(list(range(40, 80)), 16)
    draws = SeededDraws(7, model.config.vocab_size)
    start = Start(draws.tokens((1, LENGTH)), pinned=pinned, constraint=constraint)
    run = denoise(model, prompt_cache.cache, config, draws, start)
    return [
        array
        for state in drive(model, run)
        for array in (state.canvas, state.argmax, state.entropy, state.probability)
    ]


def side_by_side(model: DiffusionGemma) -> list[mx.array]:
    """Hidden states behind prompts of unequal length, and what the encoder would write there."""
    passes = []
    for length in (9, 40):
        prompt_cache = PromptCache(model)
        (states,) = prompt_cache.encoding(list(range(100, 100 + length)), 64)
        passes.append(Pass(mx.arange(LENGTH)[None] * 3, prompt_cache.cache))
    seen = read_causally(model, states, mx.arange(length)[None], top=3)
    return [*model.decode(passes), seen.log_probability, seen.top, seen.top_log_probability]


def everything(directory: Path, share: Share) -> list[np.ndarray]:
    """All that a model is asked for, in a few steps each."""
    model = loaded(directory, share)
    config = model.generation.override(max_denoising_steps=3)
    pinned = (mx.arange(LENGTH) % 3 == 0)[None]
    keeps = config.override(sampler=ConfidenceThreshold(0.2))
    found = [
        *canvases(model, config, ForbidFirst((3, 400))),
        *canvases(model, config.with_speed("balanced"), Together(), pinned),
        *canvases(model, keeps, Anything()),
        *side_by_side(model),
    ]
    return [np.array(each) for each in found]


@pytest.mark.parametrize(
    ("packed", "sizes"),
    [(None, (4,)), ((64, 4, "affine"), (3,)), ((32, 4, "mxfp4"), (2,))],
)
def test_shares_give_what_one_gives(
    tmp_path: Path, packed: Any, sizes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Groups of 64 do not divide the widths: seven and five of them are cut for three and four.

    Blocks of the vocabulary of 96 ids, too, belong to more than one rank.
    """
    monkeypatch.setattr("mlx_diffgemma.diffusion.head.BLOCK_BYTES", 4 * LENGTH * 96)
    directory = write_model(tmp_path / "model", packed)
    (wanted,), _ = on_all(1, lambda share: everything(directory, share))
    for size in sizes:
        for found in on_all(size, lambda share: everything(directory, share))[0]:
            for each, own in zip(found, wanted, strict=True):
                if own.dtype == np.float32:
                    np.testing.assert_allclose(each, own, rtol=1e-4, atol=1e-4)
                else:
                    np.testing.assert_array_equal(each, own)


def test_ranks_that_differ_are_found(tmp_path: Path) -> None:
    """Sums are the same on all even where one has chosen other experts: their choice tells."""
    directory = write_model(tmp_path / "model")

    def run(share: Share, changed: str) -> None:
        model = loaded(directory, replace(share, check=True))
        if share.rank and changed:
            weights = dict(tree_flatten(model.parameters()))
            model.load_weights([(changed, -weights[changed])], strict=False)
        canvases(model, model.generation.override(max_denoising_steps=2), Anything())

    on_all(2, lambda share: run(share, ""))
    layer = "model.decoder.layers.1."
    with pytest.raises(LaunchError, match="ranks differ in the experts that a layer chooses"):
        on_all(2, lambda share: run(share, f"{layer}router.proj.weight"))
    with pytest.raises(LaunchError, match="ranks differ in what layer 1 gives"):
        on_all(2, lambda share: run(share, f"{layer}layer_scalar"))


def test_what_a_step_exchanges(tmp_path: Path) -> None:
    """Two sums a layer, one of the dense and the routed half together; the rest is small."""
    directory = write_model(tmp_path / "model")

    def run(share: Share) -> list[mx.array]:
        model = loaded(directory, share)
        return canvases(model, model.generation.override(max_denoising_steps=2), Anything())

    _, threads = on_all(2, run)
    rows = LENGTH * 128 * 4
    layers, read, agreed = [rows, 2 * rows] * 3, LENGTH * 7 * 4, 12_000
    *_, tail = sorted(threads.bytes[-12:])
    assert threads.bytes[-9:-1] == [rows, *layers, read]
    assert threads.bytes[-1] < agreed
    assert tail == 2 * rows


@pytest.mark.parametrize(
    ("mode", "size", "bits"),
    [
        (mode, size, bits)
        for mode, (sizes, widths) in MODES.items()
        for size in sizes
        for bits in widths
    ],
)
def test_a_part_is_cut_of_packed_weights(tmp_path: Path, mode: str, size: int, bits: int) -> None:
    """Of stacks and matrices, in all modes: what is unpacked of a part is that part, unpacked."""
    whole = mx.random.normal((3, 12, 4 * size), key=mx.random.key(bits))
    packed = dict(zip(("w", "s", "b"), mx.quantize(whole, size, bits, mode), strict=False))
    file = tmp_path / "model.safetensors"
    mx.save_safetensors(str(file), packed)
    tensors = read_header(file)
    flat = mx.dequantize(*packed.values(), group_size=size, bits=bits, mode=mode)
    columns = Cut(COLUMNS, (range(size, 3 * size),), 4 * size)
    rows = Cut(ROWS, (range(1, 3), range(7, 9)), 12)
    wanted = [flat[..., size : 3 * size], mx.concatenate([flat[:, 1:3], flat[:, 7:9]], axis=1)]
    for cut, own in zip((columns, rows), wanted, strict=True):
        parts = [read_cut(tensors[name], cut) for name in packed]
        assert [each.dtype for each in parts] == [each.dtype for each in packed.values()]
        assert mx.array_equal(mx.dequantize(*parts, group_size=size, bits=bits, mode=mode), own)


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16, mx.float32])
def test_blocks_of_rows_are_read_whole(
    tmp_path: Path, dtype: mx.Dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlx_diffgemma.checkpoint.slices.BLOCK", 100)
    whole = mx.random.normal((7, 13), key=mx.random.key(1)).astype(dtype)
    file = tmp_path / "model.safetensors"
    mx.save_safetensors(str(file), {"first": mx.zeros((3,)), "w": whole})
    found = read_cut(read_header(file)["w"], Cut(COLUMNS, (range(2, 5), range(12, 13)), 13))
    assert found.dtype == dtype
    assert mx.array_equal(found, mx.concatenate([whole[:, 2:5], whole[:, 12:]], axis=1))


def test_parts_of_the_real_model() -> None:
    """Groups of 64 of 704 and 2,112 columns, and two heads of keys for four ranks."""
    sliding, full = LayerConfig(256, 8, 1024, 1e4, 128), LayerConfig(512, 2, None, 1e6, 64)
    sizes = (262144, 2816, 2112, 704, 16, 128, 8)
    real = Config(*sizes, 1e-6, 30.0, 262144, 256, (*[sliding] * 5, full))
    parts = [cut_model(real, Share(i, 4), lambda path: 64, 512) for i in range(4)]
    assert [len(part.layers[0].expert) for part in parts] == [128, 192, 192, 192]
    assert [len(part.layers[0].inner) for part in parts] == [512, 512, 512, 576]
    assert [(part.layers[5].heads, part.layers[5].keys) for part in parts] == [
        (range(0, 4), range(0, 1)),
        (range(4, 8), range(0, 1)),
        (range(8, 12), range(1, 2)),
        (range(12, 16), range(1, 2)),
    ]
    assert parts[3].layers[0].keys == range(6, 8)
    assert [part.vocabulary for part in parts] == [
        range(65536 * i, 65536 * (i + 1)) for i in range(4)
    ]
    with pytest.raises(CutError, match="experts cannot be cut for 12 ranks: of its 704 columns"):
        cut_model(real, Share(0, 12), lambda path: 64, 512)
    with pytest.raises(CutError, match="layer 0's 16 heads of 256 cannot be cut for 17 ranks"):
        cut_model(real, Share(3, 17), lambda path: 16, 512)


def test_what_a_rank_is_told_to_need(tmp_path: Path) -> None:
    headers = read_headers(write_model(tmp_path / "model", (64, 4, "affine")))
    whole = info_of(headers, "float32")
    halves = [info_of(headers, "float32", part=part_of(headers, Share(i, 2))) for i in range(2)]
    for rank, half in enumerate(halves):
        model = model_of(headers, "float32", part=part_of(headers, Share(rank, 2)))
        held = sum(each.nbytes for _, each in tree_flatten(model.parameters()))
        assert half.loaded_bytes == held < 0.65 * whole.loaded_bytes
        assert 2 * half.cache_bytes_per_token == whole.cache_bytes_per_token
    assert sum(half.table_bytes for half in halves) == whole.table_bytes


def test_rank_0_decides() -> None:
    """Of numbers, flags and shapes of all kinds; a rank that has drawn others goes rank 0's way."""

    def run(share: Share) -> list[np.ndarray]:
        off = share.rank * 7
        mine = [
            mx.arange(6).reshape(2, 3) + off,
            mx.array([[0.5, float("-inf"), -0.0]]) + off,
            mx.array([True, False, bool(off)]),
            mx.array(off == 0),
            mx.arange(4).astype(mx.uint32)[::-1] + off,
        ]
        return [np.array(each) for each in share.agreed(mine)]

    found, _ = on_all(3, run)
    for rank in found[1:]:
        for each, own in zip(rank, found[0], strict=True):
            assert each.dtype == own.dtype
            np.testing.assert_array_equal(each, own)
    assert found[0][0].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert found[0][4].tolist() == [3, 2, 1, 0]
