"""A film of a terminal as one SVG that plays by itself: the screens after one another, for ever."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.text import Text

# Seconds that a screen stays, and the last one.
FRAME, LAST = 0.8, 4.0


def as_svg(screen: str, columns: int, title: str, name: str) -> str:
    """A screen with its escapes as rich draws it; `name` begins the names of its styles."""
    console = Console(record=True, width=columns, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(Text.from_ansi(screen))
    return console.export_svg(title=title, unique_id=name)


def film(path: Path, screens: Sequence[str], columns: int, title: str, still: int) -> None:
    """Write the film; `still` is the screen that those see who want or get no motion."""
    seconds = FRAME * (len(screens) - 1) + LAST
    frames, styles = [], []
    for number, screen in enumerate(screens):
        name = f"film{number}"
        svg = as_svg(screen, columns, title, name)
        found = re.search(rf'<g class="{name}-matrix">.*?</g>', svg, re.DOTALL)
        assert found
        drawn = re.sub(r' clip-path="[^"]*"', "", found[0])
        frames.append(f'<g class="frame" id="{name}">{drawn}</g>')
        styles += re.findall(rf"\.{name}-r\d+ {{.*?}}", svg)
        begin, end = (100 * FRAME * each / seconds for each in (number, number + 1))
        ends = f" {end:.3f}% {{visibility: hidden}}" if number < len(screens) - 1 else ""
        styles.append(f"#{name} {{animation-name: {name}}}")
        turns = f"0% {{visibility: hidden}} {begin:.3f}% {{visibility: visible}}{ends}"
        styles.append(f"@keyframes {name} {{{turns}}}")
    styles.append(f".frame {{visibility: hidden; animation: {seconds:.1f}s step-end infinite}}")
    styles.append(f"#film{still} {{visibility: visible}}")
    styles.append("@media (prefers-reduced-motion: reduce) {.frame {animation: none !important}}")
    matrices = ", ".join(f".film{number}-matrix" for number in range(len(screens)))
    whole = as_svg(screens[still], columns, title, "film")
    whole = whole.replace(".film-matrix", matrices)
    whole = whole.replace("</style>", "\n".join(styles) + "\n    </style>", 1)
    whole = re.sub(
        r'<g class="film-matrix">.*?</g>', lambda _: "\n".join(frames), whole, flags=re.S
    )
    path.write_text(whole)
    print(path)
