"""lm-evaluation-harness on a DiffusionGemma model (extra `lm-eval`).

    python -m mlx_diffgemma.measure.lm_eval --model mlx-diffgemma \
        --model_args path=DIR --tasks gsm8k

Only generative tasks run: a model that denoises a canvas has no likelihood of a continuation.
"""

from typing import Any, NoReturn

from lm_eval.__main__ import cli_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from tqdm import tqdm

from ..checkpoint.load import load
from ..errors import Error
from ..tasks.generate import generate


class NoLikelihoodError(Error):
    """A task that needs log-likelihoods."""


@register_model("mlx-diffgemma")
class DiffusionGemmaLM(LM):
    """`path` is a checkpoint (none: the small model), `steps` and `seed` as in `generate`."""

    def __init__(
        self,
        path: str | None = None,
        steps: int | None = None,
        seed: int = 0,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
    ):
        super().__init__()
        self._loaded = load(path)
        self._steps = steps
        self._seed = seed

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Answer all, each answer cut at the first of the request's stop strings."""
        answers = []
        for request in tqdm(requests, disable=disable_tqdm):
            context, flags = request.args
            text = generate(
                *self._loaded,
                context,
                max_tokens=flags.get("max_gen_toks"),
                steps=self._steps,
                seed=self._seed,
            )
            stops: Any = flags.get("until") or []
            for stop in [stops] if isinstance(stops, str) else stops:
                text = text.split(stop)[0] if stop else text
            answers.append(text)
        return answers

    def loglikelihood(self, requests: list[Instance]) -> NoReturn:
        raise NoLikelihoodError(
            f"{requests[0].task_name} needs log-likelihoods, which a diffusion model does not have"
        )

    def loglikelihood_rolling(self, requests: list[Instance]) -> NoReturn:
        self.loglikelihood(requests)


if __name__ == "__main__":
    cli_evaluate()
