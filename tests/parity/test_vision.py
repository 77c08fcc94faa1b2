"""What the vision tower is given and gives equals transformers' on random checkpoints."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from looking import PATCH
from PIL import Image
from seeing import seeing_checkpoint
from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil

from mlx_diffgemma.checkpoint.vision import load_vision
from mlx_diffgemma.images.picture import Grid, picture_of
from mlx_diffgemma.model import vision
from mlx_diffgemma.model.vision_config import BUDGETS

SMALL = Grid(patch_size=PATCH)

# Height and width: usual ones, squares, thin ones both ways, what is not resampled, ratios at
# which a side is rounded to nothing, and single pixels.
SIZES = [
    (480, 640), (1080, 1920), (768, 768), (672, 912), (97, 31), (1, 1), (16, 16), (5, 7),
    (100, 3000), (3000, 100), (1, 300), (300, 1), (2, 900), (1200, 3), (1, 30000), (30000, 1),
    (4, 1111), (333, 334), (49, 47), (2000, 13),
]  # fmt: skip


def noise(height: int, width: int) -> Image.Image:
    drawn = np.random.default_rng(height * width).integers(0, 256, (height, width, 3))
    return Image.fromarray(drawn.astype(np.uint8))


@pytest.mark.parametrize("budget", BUDGETS)
def test_pixels_are_the_references_bit_for_bit(budget: int) -> None:
    processor = Gemma4ImageProcessorPil(max_soft_tokens=budget)
    sizes = SIZES if budget <= 280 else SIZES[:6]
    for height, width in sizes:
        image = noise(height, width)
        theirs = processor([image], return_tensors="np", input_data_format="channels_last")
        ours = picture_of(image, budget)
        assert ours.tokens == theirs["num_soft_tokens_per_image"][0], (height, width)
        count = ours.rows * ours.columns
        assert np.array_equal(ours.patches, theirs["pixel_values"][0, :count])
        x, y = np.meshgrid(np.arange(ours.columns), np.arange(ours.rows))
        places = np.stack([x, y], axis=-1).reshape(-1, 2)
        assert np.array_equal(places, theirs["image_position_ids"][0, :count])
        assert (theirs["image_position_ids"][0, count:] == -1).all()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "PA", "F"])
def test_modes_are_converted_as_the_reference_does(mode: str) -> None:
    from mlx_diffgemma.images.files import read_picture

    image = noise(60, 80).convert("L" if mode == "PA" else "RGB")
    image.putalpha(noise(60, 80).convert("L"))
    image = image.convert(mode) if mode != "PA" else image.convert("LA").convert("PA")
    theirs = Gemma4ImageProcessorPil(max_soft_tokens=70)([image], return_tensors="np")
    ours = picture_of(read_picture(image), 70)
    assert np.array_equal(ours.patches, theirs["pixel_values"][0, : ours.rows * ours.columns])


def features(
    model: Any, image: Image.Image, budget: int = 70, patch: int = PATCH
) -> tuple[np.ndarray, Any]:
    """The reference's features of a padded picture, and our picture."""
    processor = Gemma4ImageProcessorPil(patch_size=patch, max_soft_tokens=budget)
    given = processor([image], return_tensors="pt")
    with torch.no_grad():
        out = model.model.encoder.get_image_features(
            given["pixel_values"].float(), given["image_position_ids"], return_dict=True
        )
    return out.pooler_output.numpy(), picture_of(image, budget, Grid(patch_size=patch))


@pytest.mark.parametrize("block", [None, 7])
@pytest.mark.parametrize("size", [(90, 130), (200, 40), (2, 900), (900, 2), (48, 48)])
def test_features(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: tuple[int, int], block: int | None
) -> None:
    """Also where queries are in blocks, of which the last is shorter."""
    theirs, picture = features(seeing_checkpoint(tmp_path), noise(*size))
    patches = mx.array(picture.patches)
    if block is not None:
        monkeypatch.setattr(vision, "SCORE_BYTES", block * 4 * 4 * len(patches))
    seen = load_vision(tmp_path)
    ours = seen(patches, picture.rows, picture.columns, mx.eval)
    assert ours.shape == theirs.shape == (picture.tokens, 48)
    assert np.abs(np.array(ours) - theirs).max() < 1e-4


def test_features_without_standardization_and_of_other_widths(tmp_path: Path) -> None:
    other = {"standardize": False, "head_dim": 72, "num_attention_heads": 3}
    other |= {"num_key_value_heads": 3, "patch_size": 2, "pooling_kernel_size": 3}
    other |= {"hidden_size": 40, "rope_parameters": {"rope_theta": 50.0, "rope_type": "default"}}
    model = seeing_checkpoint(tmp_path, tower=other, seed=4)
    theirs, picture = features(model, noise(70, 50), 140, 2)
    ours = load_vision(tmp_path)(mx.array(picture.patches), picture.rows, picture.columns)
    assert np.abs(np.array(ours) - theirs).max() < 1e-4
