"""What all attempts at all canvases of an answer have in common, and what they give."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..diffusion.causal import written
from ..diffusion.constraints import Constraint
from ..diffusion.decoding import Decoding
from ..diffusion.denoise import DenoisingState, Start
from ..diffusion.draws import Draws
from ..model.cache import LayerCache
from ..model.diffusion_gemma import DiffusionGemma
from ..model.settings import GenerationConfig
from .starts import CanvasStart, Opening, Places


@dataclass(frozen=True)
class Read:
    """The encoder has read so many tokens of the answer, in one pass."""

    tokens: int


Written = Decoding[DenoisingState | Read, DenoisingState]


@dataclass(frozen=True)
class Writer:
    """Holds what all attempts at all canvases of an answer have in common.

    `draws` are those of canvases; `places` knows what each token of the answer may be; `top` of the
    likeliest tokens of each place are told.
    """

    model: DiffusionGemma
    cache: list[LayerCache]
    config: GenerationConfig
    draws: Draws
    start: CanvasStart
    places: Places
    top: int = 0

    def begin(self, generated: Sequence[int], forbidden: Constraint | None) -> Start | None:
        """Where the next canvas starts; None is noise."""
        begun = self.start.begin(generated, self.draws)
        if forbidden is not None:
            begun = begun or self.noise()
            begun = replace(begun, constraint=forbidden)
        return begun

    def noise(self) -> Start:
        """A whole canvas of it."""
        return Start(self.draws.tokens((1, self.model.config.canvas_length)))

    def ends(self, tokens: Sequence[int]) -> int | None:
        """Count the tokens up to the first that ends an answer, with it."""
        ends = self.config.eos_token_ids
        return next((i + 1 for i, token in enumerate(tokens) if token in ends), None)

    def given(self, generated: Sequence[int]) -> DenoisingState | None:
        """What the answer has to begin with, where nothing has been written yet."""
        if generated or not isinstance(self.start, Opening):
            return None
        return written(self.start.tokens)
