"""Peak memory of one denoising step above the weights, at the real width: one layer, one step.

    python scripts/step_memory.py            # the embedding table dequantized block by block
    python scripts/step_memory.py --kept     # and as it is where memory allows

Vocabulary, canvas and hidden size are the real ones, in the published 4-bit layout, computed in
float32 on a CPU: five minutes and 5 GB.
"""

import argparse
import tempfile
from pathlib import Path

import mlx.core as mx
from small_checkpoint import write_small

from mlx_diffgemma import PromptCache
from mlx_diffgemma.checkpoint.load import load_model
from mlx_diffgemma.diffusion.decoding import drive
from mlx_diffgemma.diffusion.denoise import denoise
from mlx_diffgemma.diffusion.draws import SeededDraws


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hidden", type=int, default=2816)
    parser.add_argument("--vocabulary", type=int, default=262144)
    parser.add_argument("--kept", action="store_true", help="keep the table dequantized")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "c"
        write_small(directory, 1, arguments.hidden, arguments.vocabulary, "quantized")
        model = load_model(directory, dtype="float32")
        if arguments.kept:
            model.keep_table(mx.eval)
        prompt_cache = PromptCache(model)
        prompt_cache.read(list(range(64)))
        mx.clear_cache()
        weights = mx.get_active_memory()
        mx.reset_peak_memory()
        # Not the last step: what the next one needs is computed, too.
        config = model.generation.override(max_denoising_steps=3)
        next(
            drive(
                model,
                denoise(model, prompt_cache.cache, config, SeededDraws(0, model.config.vocab_size)),
            )
        )
        above = mx.get_peak_memory() - weights
        print(f"weights {weights / 1e9:.3f} GB, peak of a step above them {above / 1e9:.3f} GB")


if __name__ == "__main__":
    main()
