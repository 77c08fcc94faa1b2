"""The command `demo`."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from .options import Load
from .terminal import put, say

if TYPE_CHECKING:
    from ..measure.scenes import Scene
    from ..tasks.request import Item
    from ..text.tokenizer import Tokenizer

app = typer.Typer()

NEXT = """
What to type next:
  mlx-diffgemma chat                           talk to the small model
  mlx-diffgemma generate --show "Record: 12 pears at 345 to Anna"
  mlx-diffgemma serve                          watch it on a page in the browser
  mlx-diffgemma convert google/diffusiongemma-26B-A4B-it DIR
                                               get the real model, then name it: --model DIR"""


@app.command()
def demo(
    *,
    delay: Annotated[float, typer.Option(min=0, help="Seconds a step stays on screen.")] = 0.6,
    fast: Annotated[bool, typer.Option("--fast", help="Do not wait after a step.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Other seeds, other paths.")] = 0,
) -> None:
    """Watch the small models solve a Sudoku, make a record, find a word and repair a sentence."""
    from functools import cache

    from ..checkpoint.load import load
    from ..measure.evaluate import SPECIALIST, events_of
    from ..measure.scenes import SCENES

    Load().introduce()
    load_once = cache(load)
    for number, scene in enumerate(SCENES, 1):
        model, tokenizer = load_once(SPECIALIST.get(scene.case.task))
        put(f"\n{number}. {scene.title}\n")
        say(f"{scene.about}\n")
        put(f"{scene.case.prompt}\n")
        _play(
            scene,
            events_of(model, tokenizer, scene.case, None, seed),
            tokenizer,
            0 if fast else delay,
        )
    say(NEXT)


def _play(scene: "Scene", events: "Iterator[Item]", tokenizer: "Tokenizer", delay: float) -> None:
    """Show the steps of a scene, its answer, and what became of it.

    Where nobody watches, three drafts tell of all: the first, one in the middle and the last.
    """
    from contextlib import closing
    from time import sleep

    from rich.console import Console

    from ..measure.evaluate import is_right
    from ..tasks.request import Done, Draft
    from ..text.turns import Text
    from .display import can_draw, progress, watch

    watched = can_draw(Console(stderr=True))
    drafts: list[Draft] = []
    text = ""
    with closing(watch(events, tokenizer, live=True, lines=False)) as items:
        for event in items:
            if isinstance(event, Draft):
                drafts.append(event)
                if watched:
                    sleep(delay)
            elif isinstance(event, Text):
                text += event.text
            elif isinstance(event, Done):
                tokens = event.generated_tokens
    if not watched:
        for draft in (drafts[0], drafts[(len(drafts) - 1) // 2], drafts[-1]):
            say(f"{progress(draft)} | {draft.text!r}")
    put(text)
    found = "Right" if is_right(scene.case, text) else "Wrong, with this seed"
    say(f"{found}: {tokens} tokens in {len(drafts)} steps.")
