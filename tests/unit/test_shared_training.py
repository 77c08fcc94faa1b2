"""Ranks that learn together: so many of a part of each batch are one of the whole batch."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from queue import Queue
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from random_model import untrained
from sharing import Threads, on_all

from mlx_diffgemma import DiffusionGemma
from mlx_diffgemma.arguments import SettingError
from mlx_diffgemma.checkpoint.adapter import AdapterConfig
from mlx_diffgemma.checkpoint.files import SHIPPED
from mlx_diffgemma.checkpoint.load import read_tokenizer
from mlx_diffgemma.distributed.share import Share
from mlx_diffgemma.training import exchange
from mlx_diffgemma.training import folder as folders
from mlx_diffgemma.training.data import Data, Example
from mlx_diffgemma.training.exchange import Together, summed
from mlx_diffgemma.training.folder import read_state
from mlx_diffgemma.training.objective import Sample
from mlx_diffgemma.training.ranks import Work, check_ranks, learn_along
from mlx_diffgemma.training.run import train_in
from mlx_diffgemma.training.settings import Settings
from mlx_diffgemma.training.step import Diverged

TOKENIZER = read_tokenizer(SHIPPED["tiny"])

ADAPTER = AdapterConfig(rank=2)

# Of five examples of unequal length in batches of three, three ranks have two in the last one.
SETTINGS = Settings(
    batch_size=3,
    iters=5,
    learning_rate=1e-3,
    grad_accumulation_steps=2,
    save_every=100,
    steps_per_report=1,
    val_batches=1,
    success_cases=0,
)


@pytest.fixture(autouse=True)
def _no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders, "can_plot", lambda: False)


def small() -> DiffusionGemma:
    model: DiffusionGemma = untrained(768, 16, eos=(1, 6), windows=(8,))
    mx.eval(model.parameters())
    return model


def examples() -> tuple[Example, ...]:
    rng = np.random.default_rng(1)
    made = []
    for line in range(5):
        prompt, response = rng.integers(10, 700, 5 + line), rng.integers(10, 700, 7 * line + 3)
        made.append(Example(line + 1, Sample((2, *prompt.tolist()), (*response.tolist(), 6))))
    return tuple(made)


DATA = Data(examples(), examples()[:2])


def learnt(
    path: Path, size: int, settings: Settings = SETTINGS, mode: Any = "new", stop_at: int = 99
) -> tuple[list[Any], Threads]:
    """The events of rank 0, of so many ranks; None of the others."""
    words = [Queue[bytes | None]() for _ in range(size)]

    def tell(word: bytes | None) -> None:
        for queue in words[1:]:
            queue.put(word)

    def lead(share: Share) -> Iterator[Any]:
        at = [0]
        events = train_in(
            path,
            small(),
            TOKENIZER,
            DATA,
            settings,
            ADAPTER,
            mode=mode,
            stopped=lambda: at[0] >= stop_at,
            together=Together(share, tell),
        )
        for event in events:
            at[0] = getattr(event, "iteration", 0)
            yield event

    def run(share: Share) -> list[Any] | None:
        if not share.rank:
            try:
                with folders.locked(path, mode):
                    return list(lead(share))
            finally:
                tell(None)
        samples = tuple(each.sample for each in DATA.train)
        learn_along(small(), Work(samples, settings, ADAPTER), share, words[share.rank].get)
        return None

    found, threads = on_all(size, run)
    assert found[0] is not None
    return found[0], threads


def reports(events: list[Any]) -> np.ndarray:
    names = ("loss", "denoising", "reading", "gradient_norm", "trained_tokens")
    kinds = [each for each in events if type(each).__name__ == "Trained"]
    return np.array([[getattr(each, name) for name in names] for each in kinds])


def same_weights(one: Path, other: Path) -> None:
    found = [read_state(each).arrays for each in (one, other)]
    assert found[0].keys() == found[1].keys()
    for name, array in found[0].items():
        np.testing.assert_allclose(array, found[1][name], rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_learn_what_one_learns(tmp_path: Path, size: int) -> None:
    """Losses and gradients weigh by tokens, and a rank may have no example of the last batch.

    The state at the end holds gradients since the last update: of all ranks.
    """
    alone, _ = learnt(tmp_path / "alone", 1)
    together, _ = learnt(tmp_path / "together", size)
    assert len(reports(alone)) == 5
    np.testing.assert_allclose(reports(together), reports(alone), rtol=1e-5, atol=1e-5)
    same_weights(tmp_path / "together", tmp_path / "alone")
    assert any(n.startswith("gradients.") for n in read_state(tmp_path / "together").arrays)


@pytest.mark.parametrize("sizes", [(2, 1), (1, 3)])
def test_a_run_goes_on_with_more_ranks_or_fewer(tmp_path: Path, sizes: tuple[int, int]) -> None:
    """Amid the iterations of an update; other ranks have no files to go on from."""
    wanted, _ = learnt(tmp_path / "whole", 1)
    learnt(tmp_path / "parts", sizes[0], stop_at=3)
    rest, _ = learnt(tmp_path / "parts", sizes[1], mode="resume")
    np.testing.assert_allclose(reports(rest), reports(wanted)[3:], rtol=1e-5, atol=1e-5)
    same_weights(tmp_path / "parts", tmp_path / "whole")


def test_what_a_step_exchanges(tmp_path: Path) -> None:
    """Three losses an iteration, and all gradients in one piece an update."""
    _, threads = learnt(tmp_path / "a", 2, replace(SETTINGS, iters=4))
    own = {n: each.nbytes for n, each in read_state(tmp_path / "a").arrays.items()}
    weights = sum(size for name, size in own.items() if name.startswith("weights."))
    _, *steps = threads.bytes[-7:]
    assert steps == [12, 12, weights, 12, 12, weights]


def test_pieces_are_large_and_of_one_type(monkeypatch: pytest.MonkeyPatch) -> None:
    """In one order on all ranks, whatever the order of what they hold."""
    monkeypatch.setattr(exchange, "PIECE", 40)
    arrays = {
        "c": mx.array([1.5, -2.0]),
        "a": mx.arange(12.0).reshape(3, 4),
        "n": mx.array(7, mx.uint64),
        "b": mx.array(3.0),
        "h": mx.array([1.0], mx.bfloat16),
    }
    mx.eval(arrays)

    def run(share: Share) -> dict[str, mx.array]:
        names = sorted(arrays) if share.rank else list(arrays)
        return summed(share, {name: arrays[name] for name in names})

    found, threads = on_all(2, run)
    assert sorted(threads.bytes) == [2, 8, 12, 48]
    for rank in found:
        for name, array in arrays.items():
            assert rank[name].dtype == array.dtype
            assert mx.array_equal(rank[name], array + array)
    assert list(found[0]) == list(arrays)


def test_all_end_where_one_part_is_not_finite(tmp_path: Path) -> None:
    wild = replace(SETTINGS, learning_rate=1e25, optimizer="sgd", max_grad_norm=0.0, iters=40)
    with pytest.raises(Diverged):
        learnt(tmp_path / "a", 2, wild)


def test_what_ranks_cannot_learn() -> None:
    with pytest.raises(SettingError, match="batch_size 3 is divided among 4 ranks"):
        check_ranks(SETTINGS, 4)
    with pytest.raises(SettingError, match="distill is for one process"):
        check_ranks(replace(SETTINGS, distill=2), 2)
    check_ranks(SETTINGS, 3)
    check_ranks(replace(SETTINGS, distill=2), 1)
