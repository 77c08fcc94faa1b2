"""Peak memory of steps of training above the weights, beside what `lora --plan` would say.

    python scripts/training_memory.py                       # a table, minutes, 3 GB
    python scripts/training_memory.py --hidden 512 --layers 6 --rows 1x512,1x512c

Vocabulary and canvas are the real ones, layers are few and narrow; the base is in the published
4-bit layout, or not packed, computed in float32 on a CPU. A row is a batch, the tokens of an
example and, with a `c`, checkpointing. A process a row.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from time import perf_counter

from small_checkpoint import KINDS, write_small

ROWS = "1x256,1x256c,1x1024,1x1024c,4x256,4x256c,1x2048c"


def measure(directory: str, batch: int, tokens: int, checkpointed: bool, full: bool) -> dict:
    """Do two steps of training on examples of so many tokens."""
    import mlx.core as mx

    from mlx_diffgemma.checkpoint.adapter import AdapterConfig, add_adapter
    from mlx_diffgemma.checkpoint.files import read_headers
    from mlx_diffgemma.checkpoint.load import load_model
    from mlx_diffgemma.training.objective import Objective, Sample
    from mlx_diffgemma.training.plan import plan
    from mlx_diffgemma.training.settings import Settings
    from mlx_diffgemma.training.step import Trainer

    model = load_model(Path(directory), dtype="float32")
    settings = Settings(batch_size=batch, grad_checkpoint=checkpointed, learning_rate=1e-5)
    adapter = AdapterConfig("full" if full else "lora")
    planned = plan(read_headers(Path(directory)), settings, adapter, tokens=tokens, dtype="float32")
    add_adapter(model, adapter)
    mx.clear_cache()
    weights = mx.get_active_memory()
    trainer = Trainer(model, settings, 1)
    trainer.objective = Objective(self_conditioned=1.0)
    response = min(256, tokens // 2)
    samples = [
        Sample(tuple(range(100, 100 + tokens - response)), tuple(range(100, 100 + response)))
        for _ in range(batch)
    ]
    mx.reset_peak_memory()
    started = perf_counter()
    for iteration in (1, 2):
        trainer.step(samples, iteration)
    seconds = (perf_counter() - started) / 2
    return {
        "above": mx.get_peak_memory() - weights,
        "weights": weights,
        "seconds": seconds,
        "plan": asdict(planned),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", default=ROWS)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--vocabulary", type=int, default=262144)
    parser.add_argument("--kind", choices=KINDS, default="quantized")
    parser.add_argument("--full", action="store_true", help="train all parameters")
    parser.add_argument("--run", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        directory, batch, tokens, checkpointed = arguments.run
        found = measure(directory, int(batch), int(tokens), checkpointed == "c", arguments.full)
        print(json.dumps(found))
        return
    print("| batch x tokens | checkpointed | measured MB | planned MB | ratio | s a step |")
    print("|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        directory = write_small(
            Path(folder) / "c",
            arguments.layers,
            arguments.hidden,
            arguments.vocabulary,
            arguments.kind,
        )
        for row in arguments.rows.split(","):
            batch, _, tokens = row.removesuffix("c").partition("x")
            command = [sys.executable, __file__, "--run", str(directory), batch, tokens]
            command += [row[-1], *["--full"] * arguments.full]
            made = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            found = json.loads(made.stdout)
            parts = {part["name"]: part["bytes"] for part in found["plan"]["parts"]}
            planned = sum(parts.values()) - parts["weights"]
            print(
                f"| {batch} x {tokens} | {'yes' if row.endswith('c') else 'no'} | "
                f"{found['above'] / 1e6:.0f} | {planned / 1e6:.0f} | "
                f"{found['above'] / planned:.2f} | {found['seconds']:.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
