"""The adapter for lm-evaluation-harness, where the extra is installed."""

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("lm_eval")

from mlx_diffgemma.measure.lm_eval import DiffusionGemmaLM, NoLikelihoodError


def test_answers_are_cut_at_stop_strings_and_budgets() -> None:
    model = DiffusionGemmaLM(steps=2)
    grid = "12.4\n.412\n2.43\n43.1"

    def ask(**flags: Any) -> str:
        request: Any = SimpleNamespace(args=(grid, flags))
        return model.generate_until([request], disable_tqdm=True)[0]

    whole = ask()
    assert "\n" in whole
    assert ask(until=["\n"]) == whole.split("\n")[0]
    assert ask(until="\n", max_gen_toks=2) == whole[:2]


def test_likelihood_tasks_are_refused() -> None:
    request: Any = SimpleNamespace(task_name="hellaswag")
    with pytest.raises(NoLikelihoodError, match="hellaswag needs log-likelihoods"):
        DiffusionGemmaLM().loglikelihood([request])
