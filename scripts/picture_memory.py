"""Peak memory of reading one picture above the tower's weights, at the real width and each budget.

    python scripts/picture_memory.py [--layers 1]

Random weights in float32, on a CPU; the arrays of one layer do not outlive it, so that more layers
add to the weights alone. A 4:3 picture fills each budget.
"""

import argparse
from time import perf_counter

import mlx.core as mx
from PIL import Image

from mlx_diffgemma.images.picture import picture_of
from mlx_diffgemma.model.vision import Vision
from mlx_diffgemma.model.vision_config import BUDGETS, VisionConfig


def published(layers: int) -> VisionConfig:
    """The published tower, with so many of its 27 layers."""
    return VisionConfig(
        hidden_size=1152,
        intermediate_size=4304,
        layers=layers,
        heads=16,
        head_dim=72,
        patch_size=16,
        pool=3,
        position_embedding_size=10240,
        rms_norm_eps=1e-6,
        rope_theta=100.0,
        standardize=True,
        text_size=2816,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--layers", type=int, default=1)
    config = published(parser.parse_args().layers)
    model = Vision(config)
    mx.eval(model.parameters())
    print("most tokens | tokens | peak above weights | modelled | seconds")
    for budget in BUDGETS:
        picture = picture_of(Image.new("RGB", (4032, 3024), (90, 120, 200)), budget)
        patches = mx.array(picture.patches)
        mx.eval(patches)
        mx.clear_cache()
        weights = mx.get_active_memory()
        mx.reset_peak_memory()
        began = perf_counter()
        mx.eval(model(patches, picture.rows, picture.columns, mx.eval))
        above = mx.get_peak_memory() - weights
        bound = config.working_bytes(picture.tokens, 4)
        print(
            f"{budget:>11} | {picture.tokens:>6} | {above / 1e6:>15.0f} MB | "
            f"{bound / 1e6:>5.0f} MB | {perf_counter() - began:.1f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
