"""The three scenes of `mlx-diffgemma demo`."""

from dataclasses import dataclass

from ..measure.evaluate import Case


@dataclass(frozen=True)
class Scene:
    """A title and a case whose events are worth watching."""

    title: str
    case: Case


_PUZZLE = "43.52.\n2.143.\n.42.53\n5132.4\n..5...\n...615"

_TYPOS = "a small hosue near the river"

SCENES = (
    Scene("A Sudoku is solved:", Case("sudoku", _PUZZLE)),
    Scene(
        "A record is filled; its keys and punctuation are pinned:",
        Case(
            "json",
            "Record: Anna Berg from Norway, born 1984-03-12",
            pieces=(
                ('{"name":"', True),
                ("Anna Berg", False),  # a hole of as many tokens; its text is not given away
                ('","born":"', True),
                ("1984-03-12", False),
                ('","country":"', True),
                ("Norway", False),
                ('"}', True),
            ),
        ),
    ),
    Scene(
        "A sentence is repaired; what is not accepted goes back to what you wrote:",
        Case("typo", f"Fix: {_TYPOS}", start=_TYPOS),
    ),
)
