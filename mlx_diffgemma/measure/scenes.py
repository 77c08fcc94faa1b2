"""The scenes of `mlx-diffgemma demo`."""

from dataclasses import dataclass

from ..measure.evaluate import Case


@dataclass(frozen=True)
class Scene:
    """A case whose steps are worth watching, a title, and a sentence on what happens in it."""

    title: str
    about: str
    case: Case


# Each takes five to fifteen steps and ends right, with seeds of 0 to 5. What the small models find
# easy is complete in two steps, in which nobody sees anything happen.
SCENES = (
    Scene(
        "A Sudoku is solved, with not one clue to spare",
        "All cells are guessed at once: what is sure stays, all else is guessed anew.",
        Case(
            "sudoku-hard",
            "..5..2\n.3.6..\n.5....\n..4.3.\n1.....\n...2..",
            answer="615342\n432651\n351426\n264135\n123564\n546213",
        ),
    ),
    Scene(
        "A line becomes a record",
        "Not from left to right: braces, keys and values find their places together.",
        Case(
            "json",
            "Record: Bartholomew Featherstone from Liechtenstein, born 1984-03-12",
            answer='{"name":"Bartholomew Featherstone","born":"1984-03-12",'
            '"country":"Liechtenstein"}',
        ),
    ),
    Scene(
        "A missing word is found",
        "Both sides of it are pinned: the model reads what is before and what is behind.",
        Case(
            "gap",
            "Fill: having ... hair or similar growth",
            answer="having no hair or similar growth",
            pieces=(("having", True), (" no", False), (" hair or similar growth", True)),
        ),
    ),
    Scene(
        "A sentence is repaired",
        "It starts from the text, not from noise: where nothing is sure, that comes back.",
        Case(
            "typo",
            "Fix: to mak less ditsinct or clear",
            answer="to make less distinct or clear",
            start="to mak less ditsinct or clear",
        ),
    ),
)
