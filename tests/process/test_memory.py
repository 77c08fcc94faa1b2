"""Too large a model is refused before it is loaded; a context is as long as memory allows."""

from pathlib import Path

import mlx.core as mx
import pytest
from command import run
from held import active_memory, exact_memory

from mlx_diffgemma import load, stream_generate
from mlx_diffgemma.checkpoint.fit import TooLarge, fit, read_size
from mlx_diffgemma.checkpoint.info import Info, Part, inspect
from mlx_diffgemma.checkpoint.load import EMBEDDED
from mlx_diffgemma.diffusion.prompt_cache import ContextError
from mlx_diffgemma.errors import Error

GB = 10**9


def real(bits: float) -> Info:
    """The real model's numbers, quantized to so many bits."""
    return Info(
        layers=30,
        canvas_length=256,
        context=262_144,
        vocabulary=262_144,
        parts=(Part("experts", 26 * GB, int(26 * GB * bits / 8), ("",)),),
        cache_bytes_per_token=20_480,
        cache_bytes_window=210_000_000,
        loaded_bytes=int(26 * GB * bits / 8),
        table_bytes=1_476_395_008,
        step_bytes=350_000_000,
        vision_bytes=1_150_000_000,
        picture_bytes=570_000_000,
    )


def test_what_fits_is_run_and_the_context_is_cut_to_it() -> None:
    assert fit(real(4.5), 64 * GB).context == 262_144
    assert fit(real(4.5), 64 * GB).keep_table
    cut = fit(real(4.5), 16 * GB)
    left = 16 * GB - real(4.5).memory_needed(0)
    assert cut.context == left // 20_480
    assert not cut.keep_table


def test_what_does_not_fit_is_refused_with_what_would() -> None:
    with pytest.raises(TooLarge, match="converted to 8 bits it would fit"):
        fit(real(16), 36 * GB)
    with pytest.raises(TooLarge, match="converted to 3 bits it would fit"):
        fit(real(4.5), 14 * GB)
    with pytest.raises(TooLarge, match="no number of bits"):
        fit(real(16), 4 * GB)


def test_pictures_cost_context_and_text_pays_nothing_for_them() -> None:
    """The vision tower, and what reading a picture takes beyond what a step does."""
    text, seeing = (fit(real(4.5), 17 * GB, pictures=pictures) for pictures in (False, True))
    assert text.context - seeing.context == pytest.approx((1.15 + 0.57 - 0.35) * GB / 20_480, abs=2)
    assert fit(real(4.5), int(15.3 * GB)).context > 1000
    with pytest.raises(TooLarge, match=r"a short prompt and pictures \(15.8 GB of it weights\)"):
        fit(real(4.5), int(15.3 * GB), pictures=True)


@pytest.mark.parametrize(
    ("text", "size"),
    [("12GB", 12 * GB), ("1.5 g", 1_500_000_000), ("900MB", 9 * 10**8), ("2 GiB", 1 << 31)],
)
def test_sizes(text: str, size: int) -> None:
    assert read_size(text) == size


def test_no_size() -> None:
    with pytest.raises(Error, match="'much' is not a size"):
        read_size("much")


@pytest.mark.parametrize("given", ["12", 12])
def test_a_size_without_its_unit_says_what_was_meant(given: int | str) -> None:
    """`--max-memory 12` were 12 bytes, and "no number of bits would make it fit"."""
    with pytest.raises(Error, match=r"12 are 12 bytes, .*; 12GB was probably meant"):
        load(max_memory=given)


def test_a_prompt_longer_than_memory_allows_is_refused() -> None:
    found = inspect(EMBEDDED, "float32")
    memory = found.memory_needed(0) + 200 * found.cache_bytes_per_token
    model, tokenizer = load(max_memory=memory)
    assert model.context == 200
    with pytest.raises(ContextError, match="which is all that fits into memory"):
        list(stream_generate(model, tokenizer, [5] * 150))


def test_the_estimate_is_what_loading_takes() -> None:
    before = active_memory()
    with exact_memory():
        kept = load(dtype="float32")
    taken = mx.get_active_memory() - before
    assert taken == pytest.approx(inspect(EMBEDDED, "float32").loaded_bytes, rel=0.02)
    del kept


def test_the_command_says_it_in_a_sentence(tmp_path: Path) -> None:
    out = run("generate", "hello", "--max-memory", "1MB", cwd=tmp_path)
    assert out.returncode == 1
    assert out.stdout == ""
    assert "are free: " in out.stderr.splitlines()[-1]
    assert "Traceback" not in out.stderr


@pytest.mark.parametrize("memory", ["1MB", "9MB", "12MB"])
def test_info_says_what_loading_would_decide(memory: str) -> None:
    """It used to speak of the stored type, and of a table kept where `load` did not keep it."""
    shown = run("info", EMBEDDED, "--max-memory", memory)
    try:
        decided = f"a context of {load(max_memory=read_size(memory))[0].context:,} tokens"
    except TooLarge as error:
        decided = str(error)
    assert shown.stdout.splitlines()[-1] == f"here: {decided}"
