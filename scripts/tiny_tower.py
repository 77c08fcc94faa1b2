"""A small vision tower, of the reference's own classes, and how its eyes are opened.

Before it meets a text model, the tower learns from heads that are thrown away: each of its tokens
tells the object and the colour in the quarter of the picture that it stands in, and which it is.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image
from tiny_pictures import COLOURS, DIGITS, PLACES, SHAPES, Scene
from torch import Tensor, nn
from transformers.models.gemma4.configuration_gemma4 import Gemma4TextConfig, Gemma4VisionConfig
from transformers.models.gemma4.modeling_gemma4 import Gemma4MultimodalEmbedder, Gemma4VisionModel

PATCH, POOL, BUDGET = 4, 2, 70
PATCHES = 16  # of a side: 8 x 8 tokens are the most that a square picture gets of the budget
SIDE, TOKENS = PATCH * PATCHES, (PATCHES // POOL) ** 2
WIDTH = 64

CONFIG: dict[str, Any] = {
    "model_type": "gemma4_vision",
    "hidden_size": WIDTH,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "patch_size": PATCH,
    "pooling_kernel_size": POOL,
    "position_embedding_size": BUDGET * POOL,
    "rms_norm_eps": 1e-6,
    "standardize": True,
    "rope_parameters": {"rope_theta": 100.0, "rope_type": "default"},
}

OBJECTS = ("nothing", *SHAPES, *DIGITS)
PAINTS = ("none", *COLOURS)


def pixels_of(image: Image.Image) -> npt.NDArray[np.uint8]:
    """A square picture as the reference's processor resizes it."""
    return np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BICUBIC))


def patches_of(pixels: npt.NDArray[np.uint8]) -> Tensor:
    """(pictures, SIDE, SIDE, 3) -> (pictures, patches, 3 PATCH^2) from 0 to 1."""
    cut = pixels.reshape(-1, PATCHES, PATCH, PATCHES, PATCH, 3).swapaxes(2, 3)
    return torch.from_numpy(cut.reshape(len(cut), PATCHES**2, -1).astype(np.float32) / 255)


class Tower(nn.Module):
    """Patches (pictures, patches, 3 PATCH^2) -> features (pictures, tokens, WIDTH).

    `embed_vision` makes embeddings of the text model of them.
    """

    def __init__(self, hidden: int):
        super().__init__()
        config = Gemma4VisionConfig(**CONFIG)
        config._attn_implementation = "sdpa"
        self.vision_tower = Gemma4VisionModel(config)
        self.embed_vision = Gemma4MultimodalEmbedder(config, Gemma4TextConfig(hidden_size=hidden))
        x, y = np.meshgrid(np.arange(PATCHES), np.arange(PATCHES))
        places = torch.from_numpy(np.stack([x, y], axis=-1).reshape(-1, 2))
        self.register_buffer("places", places, persistent=False)

    @torch.no_grad()
    def start(self) -> None:
        """Draw the weights."""
        for name, parameter in self.named_parameters():
            if name.endswith(("q_norm.weight", "k_norm.weight")):
                parameter.fill_(parameter.shape[0] ** -0.25)
            elif "norm" in name:
                parameter.fill_(1.0)
            elif "table" in name:
                parameter.normal_(0, 0.3)
            else:
                parameter.normal_(0, parameter.shape[-1] ** -0.5)

    @torch.no_grad()
    def standardize(self, patches: Tensor) -> None:
        """Set what features are standardized with by what they are on some pictures."""
        tower = self.vision_tower
        tower.std_bias.zero_()
        tower.std_scale.fill_(1.0)
        features = self.features(patches)
        tower.std_bias.copy_(features.mean((0, 1)))
        tower.std_scale.copy_(1 / features.std((0, 1)))

    def features(self, patches: Tensor) -> Tensor:
        """What the tower makes before the projection."""
        places = self.places.expand(len(patches), -1, -1)
        flat: Tensor = self.vision_tower(patches, places).last_hidden_state
        return flat.view(len(patches), TOKENS, WIDTH)


class Heads(nn.Module):
    """What each token tells of its quarter."""

    def __init__(self) -> None:
        super().__init__()
        self.told = nn.Linear(WIDTH, len(OBJECTS) + len(PAINTS) + len(PLACES))
        side = PATCHES // POOL
        row, column = torch.arange(TOKENS) // side, torch.arange(TOKENS) % side
        self.quarter = (row // (side // 2)) * 2 + column // (side // 2)

    def loss(self, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean loss of all three, and for each picture whether all quarters are told rightly."""
        scores = self.told(F.rms_norm(features, (WIDTH,)))
        whole = torch.stack([scores[:, self.quarter == q].mean(1) for q in range(4)], dim=1)
        weight = 0.2 + 0.8 * (labels[..., 0] > 0)  # most quarters are empty
        sizes = [len(OBJECTS), len(PAINTS), len(PLACES)]
        total = torch.zeros(())
        good = torch.ones(len(labels), dtype=torch.bool)
        for scored, factor in ((scores, 0.3), (4 * whole, 1.0)):
            of = torch.arange(4) if scored.shape[1] == 4 else self.quarter
            for each, kind in enumerate(scored.split(sizes, dim=-1)):
                wrong = F.cross_entropy(kind.mT, labels[:, of, each], reduction="none")
                total = total + factor * (wrong * weight[:, of]).sum() / weight[:, of].sum()
                if scored.shape[1] == 4:
                    good &= (kind.argmax(-1) == labels[..., each]).all(-1)
        return total, good


def labels_of(scenes: list[Scene]) -> Tensor:
    """Object and colour of each quarter and its own number, (pictures, 4, 3)."""
    labels = torch.zeros(len(scenes), 4, 3, dtype=torch.long)
    labels[..., 2] = torch.arange(4)
    for i, scene in enumerate(scenes):
        for thing in scene:
            numbers = OBJECTS.index(thing.object), PAINTS.index(thing.colour)
            labels[i, PLACES.index(thing.place), :2] = torch.tensor(numbers)
    return labels
