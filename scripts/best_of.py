"""Measures what best of several answers is worth: chosen by entropy, by likelihood, by an oracle.

    python scripts/train_tiny.py --work WORK --held-out held.jsonl --each 450
    python scripts/best_of.py --tasks held.jsonl --task json --cases 300 --seeds 3

Each case is answered `--of` times with draws of their own, and that `--seeds` times. A row says how
many of the chosen answers are right, in per cent: of the first alone, of those with the lowest mean
entropy of their last canvas, of those that the encoder finds the likeliest by the mean of a token,
and of those where any is right, which is the most that a choice can reach. `--pinned` asks Sudokus
as templates whose clues are given.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

from mlx_diffgemma import Done, Draft, FillRequest, FillResult, Request, Text, load, score
from mlx_diffgemma.measure.evaluate import SPECIALIST, Case, is_right, pinned_sudokus, read_cases
from mlx_diffgemma.model.diffusion_gemma import DiffusionGemma
from mlx_diffgemma.tasks.batch import stream_batch
from mlx_diffgemma.tasks.starts import Pieces
from mlx_diffgemma.text.tokenizer import Tokenizer

# An answer: whether it is right, its mean entropy, its mean log-probability.
Tried = tuple[bool, float, float]

BATCH = 16


def request_of(case: Case, seed: int) -> Request | FillRequest:
    """What a case asks, with a seed."""
    if case.template is not None:
        return FillRequest(case.template, case.prompt, seed=seed)
    start = None if case.pieces is None else Pieces(case.pieces)
    return Request(case.prompt, seed=seed, start=start, likelihood=True)


def tried(
    model: DiffusionGemma, tokenizer: Tokenizer, cases: list[Case], each: int
) -> Iterator[tuple[int, Tried]]:
    """Answer all cases `each` times: the number of a case and what came of it, as they come."""
    asked = [request_of(case, each * i + k) for i, case in enumerate(cases) for k in range(each)]
    texts = [""] * len(asked)
    entropies = [0.0] * len(asked)
    for number, event in stream_batch(model, tokenizer, asked, max_batch=BATCH):
        case = cases[number // each]
        match event:
            case Draft():
                entropies[number] = sum(event.entropies) / len(event.entropies)
            case Text():
                texts[number] += event.text
            case Done():
                assert event.mean_log_probability is not None
                right = is_right(case, texts[number])
                yield number // each, (right, entropies[number], event.mean_log_probability)
            case FillResult():
                found = score(model, tokenizer, case.prompt, event.text + "<turn|>")
                yield number // each, (is_right(case, event.text), entropies[number], found.mean)
            case Exception():
                raise event


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", type=Path, required=True, help="cases, as eval takes them")
    parser.add_argument("--task", required=True)
    parser.add_argument("--model", help="a checkpoint [the shipped one for the task]")
    parser.add_argument("--cases", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--of", type=int, default=4)
    parser.add_argument("--pinned", action="store_true", help="Sudokus as templates")
    arguments = parser.parse_args()
    cases = [case for case in read_cases(arguments.tasks) if case.task == arguments.task]
    if arguments.pinned:
        cases = pinned_sudokus(cases)
    cases = cases[: arguments.cases]
    model, tokenizer = load(arguments.model or SPECIALIST.get(arguments.task))
    found: list[list[Tried]] = [[] for _ in cases]
    for number, each in tried(model, tokenizer, cases, arguments.of * arguments.seeds):
        found[number].append(each)
        print(f"{sum(map(len, found))}", end="\r", file=sys.stderr)
    groups = [
        known[i : i + arguments.of] for known in found for i in range(0, len(known), arguments.of)
    ]
    chosen = {
        "first": [group[0] for group in groups],
        "entropy": [min(group, key=lambda each: each[1]) for group in groups],
        "likelihood": [max(group, key=lambda each: each[2]) for group in groups],
        "any": [max(group) for group in groups],
    }
    shares = {name: sum(right for right, _, _ in known) for name, known in chosen.items()}
    facts = {"task": arguments.task, "pinned": arguments.pinned, "of": arguments.of}
    shown = {name: round(100 * count / len(groups), 1) for name, count in shares.items()}
    print(json.dumps({**facts, "cases": len(cases), "groups": len(groups), **shown}))


if __name__ == "__main__":
    main()
