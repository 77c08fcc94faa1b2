"""`score`: how likely a text is, token by token."""

import json
import math
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .images import Pictures
from .inputs import optional_text, text_of
from .options import LoadFaithful, Quiet, System, messages_of, with_options
from .terminal import fail, put, quoted

if TYPE_CHECKING:
    from ..tasks.score import ScoreResult
    from ..text.tokenizer import Tokenizer

app = typer.Typer()


@app.command()
@with_options
def score(
    text: Annotated[str, typer.Argument(help="The text; - reads it from stdin.")] = "-",
    *,
    prompt: Annotated[
        str | None, typer.Option(help="What the text answers. [the text stands for itself]")
    ] = None,
    system: System = None,
    pictures: Pictures,
    load: LoadFaithful,
    top: Annotated[
        int, typer.Option(min=1, max=20, help="Likeliest tokens told of each place, in JSON.")
    ] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    quiet: Quiet = False,
) -> None:
    """Say how likely each token of a text is, in one pass of the encoder."""
    if system is not None and prompt is None:
        fail("--system goes with --prompt", code=2)
    if pictures.image and prompt is None:
        fail("--image goes with --prompt, which it stands before", code=2)
    asked = None
    if prompt is not None:
        system = optional_text(system, "the system message")
        parts = pictures.parts("-" if "-" in (prompt, text) else prompt)
        asked = messages_of(text_of(prompt, "the prompt"), system, parts)
    text = text_of(text, "the text")
    if not text:
        fail("the text is empty", code=2)
    from ..tasks.request import stream
    from ..tasks.score import ScoreRequest, ScoreResult

    request = ScoreRequest(asked, text, top)
    if not quiet:
        load.introduce()
    model, tokenizer = load()
    for item in stream(model, tokenizer, request):
        if isinstance(item, ScoreResult):
            _tell(item, tokenizer, as_json=as_json)


def _tell(found: "ScoreResult", tokenizer: "Tokenizer", *, as_json: bool) -> None:
    """Print a line a token, and what they come to; or all of it as JSON."""
    if not as_json:
        for piece, chance in zip(found.pieces, found.log_probabilities, strict=True):
            put(f"{chance:.4f}\t{quoted(piece)}")
        put(f"mean\t{found.mean:.4f}\nleast\t{found.least:.4f}")
        put(f"perplexity\t{found.perplexity:.4f}")
        return

    def named(token: int, chance: float) -> dict[str, Any]:
        return {"id": token, "text": tokenizer.pieces([token])[0], "log_probability": chance}

    columns = zip(found.tokens, found.log_probabilities, found.top, strict=True)
    tokens = [
        {**named(token, chance), "top": [named(*each) for each in best]}
        for token, chance, best in columns
    ]
    facts = {
        "log_probability": found.total,
        "mean_log_probability": found.mean,
        "least_log_probability": found.least,
        "perplexity": found.perplexity if math.isfinite(found.perplexity) else None,
        "greedy": found.greedy,
    }
    put(json.dumps({**facts, "tokens": tokens}, ensure_ascii=False))
