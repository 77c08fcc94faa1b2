"""The shipped models' held-out success here and in transformers, on the same weights.

    python scripts/compare_reference.py [--limit 200] [--seeds 1] [--tasks sudoku,json,json-sum]

Only tasks that are answered from the prompt: the reference has no pinned canvas. Needs the `test`
extra (torch and transformers).
"""

import argparse

import torch
from transformers.models.diffusion_gemma.modeling_diffusion_gemma import (
    DiffusionGemmaForBlockDiffusion,
)

from mlx_diffgemma import Tokenizer, load
from mlx_diffgemma.checkpoint.files import SHIPPED
from mlx_diffgemma.measure.evaluate import (
    HELD_OUT,
    SPECIALIST,
    Case,
    Outcome,
    read_cases,
    run_case,
    score,
)


def reference_case(
    model: DiffusionGemmaForBlockDiffusion, tokenizer: Tokenizer, case: Case, seed: int
) -> Outcome:
    """Answer one case with transformers."""
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": case.prompt}])
    ids = tokenizer.encode(prompt)
    torch.manual_seed(seed)
    out = model.generate(torch.tensor([ids]))
    written = out.sequences[0, len(ids) :].tolist()
    rate = float(out.tokens_per_forward[0])
    tokens = sum(token != 0 for token in written)
    return Outcome(tokenizer.decode(written), round(tokens / rate), 1, rate)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--tasks", default="sudoku,json,json-sum")
    arguments = parser.parse_args()
    cases = read_cases(HELD_OUT)
    for task in arguments.tasks.split(","):
        source = SHIPPED[SPECIALIST.get(task, "tiny")]
        ours, tokenizer = load(source)
        theirs = DiffusionGemmaForBlockDiffusion.from_pretrained(source, dtype="float32").eval()
        chosen = [case for case in cases if case.task == task][: arguments.limit]
        pairs = [(case, number) for number, case in enumerate(chosen * arguments.seeds)]
        mine = [(case, run_case(ours, tokenizer, case, None, seed)) for case, seed in pairs]
        reference = [(case, reference_case(theirs, tokenizer, case, seed)) for case, seed in pairs]
        for name, runs in (("mlx-diffgemma", mine), ("transformers", reference)):
            row = score(task, 48, runs, arguments.seeds)
            print(
                f"{task:<10}{name:<15}{100 * row.success:>6.1f} ±{100 * row.error:.1f} %"
                f"{row.steps_per_canvas:>8.1f} steps{row.tokens_per_forward:>8.1f} tokens/pass",
                flush=True,
            )


if __name__ == "__main__":
    main()
