"""`mlx-diffgemma` with a model that writes a script: PYTHONPATH=tests python scripted_cli.py serve

SCRIPT is a JSON list of answers; the last goes on for ever. DELAY is seconds a denoising step.
HANG is the canvas whose second step takes a minute, CONTEXT how many tokens fit.
"""

import json
import os
import time
from typing import Any

from gemma import gemma_tokenizer
from random_model import Scripted, scripted

from mlx_diffgemma.checkpoint import load as loading
from mlx_diffgemma.cli.main import main as cli


class Slow(Scripted):
    def decode(self, *given: Any) -> Any:
        time.sleep(float(os.environ.get("DELAY", "0")))
        if given[0][0].self_conditioning is not None and self._next == int(
            os.environ.get("HANG", "0")
        ):
            time.sleep(60)
        return super().decode(*given)


def load(*given: Any, **settings: Any) -> Any:
    """Where it is called: MLX's streams belong to a thread."""
    tokenizer = gemma_tokenizer()
    model = scripted(Slow)
    model.context = int(os.environ.get("CONTEXT", model.context))
    answers = json.loads(os.environ["SCRIPT"])
    model.begin(*([*tokenizer.encode(answer), 6][:64] for answer in answers + answers[-1:] * 99))
    return model, tokenizer


loading.load = load
cli()
