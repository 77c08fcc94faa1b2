"""A program for ranks that share a model: rank 0 prints what comes of some requests, as JSON.

    python shared_program.py CHECKPOINT [ADAPTER]

Alone it prints what one process makes of them.
"""

import json
import sys
from functools import partial
from pathlib import Path

from mlx_diffgemma import EditRequest, FillRequest, Request, load
from mlx_diffgemma.cli.ranks import enter
from mlx_diffgemma.cli.sharing import facts_of, help_out, share_model
from mlx_diffgemma.distributed.launch import place
from mlx_diffgemma.tasks.batch import stream_batch
from mlx_diffgemma.tasks.request import Done, stream
from mlx_diffgemma.text.turns import Text


def main(directory: Path, adapter: Path | None = None) -> None:
    enter()
    read = partial(load, directory, adapter=adapter)
    if not place().leads:
        help_out(lambda share: read(share=share), lambda: facts_of(directory))
    if place().size > 1:
        model, tokenizer = share_model(lambda share: read(share=share), facts_of(directory))
    else:
        model, tokenizer = read()
    found: dict[str, object] = {}
    (*_, filled) = stream(model, tokenizer, FillRequest("12{{a:int}} {{b:1|2}}", seed=1, steps=2))
    found["fill"] = filled.text
    chosen = Request("x" * 40, seed=2, steps=3, schema={"enum": ["12", "345"]})
    events = stream(model, tokenizer, chosen)
    found["schema"] = "".join(event.text for event in events if isinstance(event, Text))
    # Nobody listens any more after the first draft: the others must stop, too.
    begun = stream(model, tokenizer, Request("1.", seed=4, steps=4))
    next(begun)
    begun.close()
    asked = [
        Request("1.\n2.", seed=0, steps=2, max_tokens=40),
        Request("1" * 900),  # more than fits
        Request("1" * 90, seed=1, steps=1, max_tokens=30),
        Request("5.", mode="causal", max_tokens=3),
    ]
    texts, ends = [""] * 4, [""] * 4
    for number, event in stream_batch(model, tokenizer, asked, max_batch=2):
        if isinstance(event, Text):
            texts[number] += event.text
        elif isinstance(event, Done):
            ends[number] = f"{event.finish_reason} {event.denoising_steps}"
        elif isinstance(event, Exception):
            ends[number] = str(event)
    found["batch"] = texts, ends
    request = EditRequest("643521\n521463", "12", seed=3, steps=1)
    (*_, edited) = stream(model, tokenizer, request)
    found["edit"] = edited.text
    print(json.dumps(found))


if __name__ == "__main__":
    sys.modules["torch"] = None  # type: ignore[assignment]  # it takes seconds to import
    main(*map(Path, sys.argv[1:]))
