"""The three scenes of `mlx-diffgemma demo`."""

from collections.abc import Iterator
from dataclasses import dataclass

from .canvas import edit_start, fill_start
from .generation import Event, stream_generate
from .model import DiffusionGemma
from .sampler import SeededDraws
from .tokenizer import Tokenizer


@dataclass(frozen=True)
class Scene:
    """A prompt, and what the canvas starts from: pinned pieces, a text to repair, or noise."""

    title: str
    shown: str
    prompt: str
    pieces: tuple[tuple[str, bool], ...] | None = None
    start: str | None = None


_PUZZLE = "43.52.\n2.143.\n.42.53\n5132.4\n..5...\n...615"
_TYPOS = "a smal hosue near the river"
SCENES = (
    Scene("A Sudoku is solved", _PUZZLE, _PUZZLE),
    Scene(
        "A record is filled; its keys and punctuation are pinned",
        "Record: Anna Berg from Norway, born 1984-03-12",
        "Record: Anna Berg from Norway, born 1984-03-12",
        pieces=(
            ('{"name":"', True),
            ("Anna Berg", False),
            ('","born":"', True),
            ("1984-03-12", False),
            ('","country":"', True),
            ("Norway", False),
            ('"}', True),
        ),
    ),
    Scene(
        "A sentence is repaired; what is not accepted goes back to what you wrote",
        _TYPOS,
        f"Fix: {_TYPOS}",
        start=_TYPOS,
    ),
)


def play(model: DiffusionGemma, tokenizer: Tokenizer, scene: Scene, seed: int) -> Iterator[Event]:
    """The events of one scene."""
    draws = SeededDraws(seed, model.config.vocab_size)
    start = None
    if scene.pieces is not None:
        start = fill_start(model, tokenizer, scene.pieces, draws)
    elif scene.start is not None:
        start = edit_start(model, tokenizer, scene.start)
    return stream_generate(model, tokenizer, scene.prompt, draws=draws, start=start)
