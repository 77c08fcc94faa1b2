"""`chat`: the command, of which chat.py is the conversation."""

import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

from .images import Pictures
from .inputs import optional_text
from .options import Answering, GuardNames, Load, System, with_options
from .terminal import say

app = typer.Typer()

OverflowName = Literal["refuse", "truncate"]


@dataclass(frozen=True)
class Watched(Answering):
    """How answers are decoded that somebody waits for: with all guards."""

    guards: GuardNames = "all"


@app.command()
@with_options
def chat(
    *,
    load: Load,
    answering: Watched,
    system: System = None,
    pictures: Pictures,
    thinking: Annotated[
        bool | None,
        typer.Option("--thinking/--no-thinking", help="Ask for thoughts before an answer."),
    ] = None,
    overflow: Annotated[
        OverflowName, typer.Option(help="Beyond the context: refuse, or forget the oldest turns.")
    ] = "refuse",
    tools: Annotated[
        Path | None, typer.Option(help="Functions in a .py, or declarations in a .json.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Call tools without asking.")] = False,
    session: Annotated[
        Path | None, typer.Option(help="Go on with this file if it exists, and save to it.")
    ] = None,
    live: Annotated[
        bool, typer.Option("--live/--no-live", help="Draw the canvas while it denoises.")
    ] = True,
    plain: Annotated[
        bool, typer.Option("--plain", help="Show answers as they are written, not as Markdown.")
    ] = False,
) -> None:
    """Talk with the model; /help lists what can be typed."""
    from ..diffusion.cache_file import check_destination
    from ..tasks.session import ChatSession
    from ..tasks.tools import by_name, read_tools
    from .chat import Chat

    known = by_name(read_tools(tools)) if tools else {}
    declared = [tool.declaration for tool in known.values()]
    settings = answering.settings()
    system = optional_text(system, "the system message")
    if session is not None:
        check_destination(session)
    given = pictures.given("-")  # stdin is the messages
    load.introduce()
    model, tokenizer = load()
    talk = ChatSession(model, tokenizer, tools=declared, overflow=overflow, **settings)
    del model  # /model may replace it
    if session is not None and session.exists():
        talk.restore(session)
        say(f"Going on with {len(talk.messages)} messages of {session}.")
    if system is not None:
        talk.system = system
    if thinking is not None:
        talk.enable_thinking = thinking
    try:
        Chat(
            talk,
            tokenizer,
            load,
            seed=answering.seed,
            tools=known,
            yes=yes,
            live=live,
            plain=plain,
            pictures=[talk.show(each, pictures.image_tokens) for each in given],
        ).run()
    except KeyboardInterrupt:
        # Whoever leaves by Ctrl-C may press it again: the session is saved all the same.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        raise
    finally:
        if session is not None:
            talk.save(session)
