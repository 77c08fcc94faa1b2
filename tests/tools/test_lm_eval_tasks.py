"""lm-evaluation-harness itself, through the adapter and through the server."""

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval")
# Before `datasets` is imported, which asks nobody then. Not the hub's own: other tests use one.
os.environ["HF_DATASETS_OFFLINE"] = "1"

from servers import serving

from mlx_diffgemma import load, score
from mlx_diffgemma.checkpoint.load import EMBEDDED
from mlx_diffgemma.measure.lm_eval import DiffusionGemmaLM


def test_the_harness_runs_likelihood_tasks(tmp_path: Path) -> None:
    """Real tasks of the harness over local data; they were refused."""
    from lm_eval import simple_evaluate

    known = {"Norway": "Oslo", "France": "Paris", "Japan": "Tokyo"}
    data = tmp_path / "cases.jsonl"
    data.write_text(
        "".join(
            json.dumps(
                {
                    "ask": f"What is the capital of {country}?",
                    "options": [f"The capital of {country} is {c}." for c in known.values()],
                    "right": list(known).index(country),
                }
            )
            + "\n"
            for country in known
        )
    )
    local = {
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": str(data)},
            "cache_dir": str(tmp_path / "cache"),
        },
        "test_split": "test",
    }
    tasks = [
        {
            **local,
            "task": "capitals",
            "output_type": "multiple_choice",
            "doc_to_text": "{{ask}}",
            "doc_to_choice": "options",
            "doc_to_target": "right",
            "target_delimiter": "",
            "metric_list": [{"metric": "acc"}],
        },
        {
            **local,
            "task": "questions",
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{ask}}",
            "metric_list": [{"metric": "byte_perplexity"}],
        },
    ]
    flags: dict[str, Any] = {"tasks": tasks, "bootstrap_iters": 0, "log_samples": False}
    results = simple_evaluate(DiffusionGemmaLM(), apply_chat_template=True, **flags)["results"]
    assert results["capitals"]["acc,none"] == 1
    asked = [json.loads(line)["ask"] for line in data.read_text().splitlines()]
    total = sum(score(*load(), None, text).total for text in asked)
    expected = math.exp(-total / sum(map(len, asked)))
    assert results["questions"]["byte_perplexity,none"] == pytest.approx(expected, rel=1e-3)


def test_the_harness_scores_through_the_server() -> None:
    """Its model of a server sends ids, asks for a token more, and compares floats for equality."""
    pytest.importorskip("tenacity")
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    pairs = [
        ("The capital of Norway is", " Oslo."),
        ("The capital of Norway is", " "),
        ("a small house near the", " r"),
    ]
    asked = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    with serving() as server:
        theirs = LocalCompletionsAPI(
            base_url=f"{server.url}/v1/completions",
            model=str(EMBEDDED),
            tokenizer_backend="huggingface",
            max_length=4096,
        )
        found = theirs.loglikelihood(asked, disable_tqdm=True)
    assert [greedy for _, greedy in found] == [False, True, False]
    model, tokenizer = load()
    for (context, text), (total, greedy) in zip(pairs, found, strict=True):
        # The tokenizer of a `tokenizer.json` alone puts nothing before a text.
        before, ids = tokenizer.encode(context), tokenizer.encode(context + text)
        expected = score(model, tokenizer, before, ids[len(before) :])
        assert total == pytest.approx(expected.total, abs=1e-3)
        assert greedy == expected.greedy
