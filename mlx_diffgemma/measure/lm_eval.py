"""lm-evaluation-harness on a DiffusionGemma model (extra `lm-eval`).

    python -m mlx_diffgemma.measure.lm_eval --model mlx-diffgemma \
        --model_args path=DIR --tasks gsm8k,hellaswag

Generative tasks are denoised. Log-likelihoods are the encoder's, which reads the same weights
causally: of a text as it stands, or with `--apply_chat_template` of an answer in a chat.
"""

from typing import Any

from lm_eval.__main__ import cli_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from ..checkpoint.load import load
from ..diffusion.prompt_cache import PromptCache
from ..tasks.generate import generate
from ..tasks.request import Prompt
from ..tasks.score import ScoreResult, score


@register_model("mlx-diffgemma")
class DiffusionGemmaLM(TemplateLM):
    """`path` is a checkpoint (none: the small model), `adapter` what stands beside it, `steps` and
    `seed` as in `generate`."""

    def __init__(
        self,
        path: str | None = None,
        steps: int | None = None,
        seed: int = 0,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
        adapter: str | None = None,
    ):
        super().__init__()
        self._loaded = load(path, adapter=adapter)
        self._model, self._tokenizer = self._loaded
        self._name = f"{path or 'tiny'} with {adapter}" if adapter else path or "tiny"
        self._bos = self._tokenizer.token_id("<bos>")
        self._steps = steps
        self._seed = seed

    @property
    def eot_token_id(self) -> int:
        """The token that ends texts."""
        return self._model.generation.eos_token_ids[0]

    @property
    def prefix_token_id(self) -> int:
        """The token behind which a text stands that has no context."""
        return self.eot_token_id if self._bos is None else self._bos

    @property
    def tokenizer_name(self) -> str:
        """What cached requests are told apart by."""
        return self._name

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Render a chat; what it gives comes back as a context."""
        return self._tokenizer.apply_chat_template(
            chat_history, add_generation_prompt=add_generation_prompt
        )

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Encode text as it stands, behind the token that begins texts unless told otherwise."""
        ids = self._tokenizer.encode(string)
        if self._bos is None or add_special_tokens is False or ids[:1] == [self._bos]:
            return ids
        return [self._bos, *ids]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Answer all, each answer cut at the first of the request's stop strings."""
        answers = []
        for request in tqdm(requests, disable=disable_tqdm):
            context, flags = request.args
            # A chat that was rendered begins with the token; other text is what a user says.
            ids = self._tokenizer.encode(context)
            prompt: Prompt = ids if self._bos is not None and ids[:1] == [self._bos] else context
            text = generate(
                *self._loaded,
                prompt,
                max_tokens=flags.get("max_gen_toks"),
                steps=self._steps,
                seed=self._seed,
            )
            stops: Any = flags.get("until") or []
            for stop in [stops] if isinstance(stops, str) else stops:
                text = text.split(stop)[0] if stop else text
            answers.append(text)
        return answers

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        """Score all, those with one beginning after one another: it is read once."""
        found: dict[int, tuple[float, bool]] = {}
        cache = PromptCache(self._model)
        order = sorted(range(len(requests)), key=lambda i: requests[i][1:])
        for i in tqdm(order, disable=disable_tqdm):
            named, context, text = requests[i]
            result = self._score(context, text, cache)
            found[i] = result.total, result.greedy
            if named is not None:  # as the harness's own models do, for --use_cache
                self.cache_hook.add_partial("loglikelihood", named, found[i])
        return [found[i] for i in range(len(requests))]

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Score whole texts; one beyond the context is read in windows of its length."""
        totals: list[float] = []
        for request in tqdm(requests, disable=disable_tqdm):
            (text,) = request.args
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(text, add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self._model.context - 1,
                context_len=1,
            )
            total = 0.0
            for window in windows:
                context, some = make_disjoint_window(window)
                total += self._score(context, some, PromptCache(self._model)).total
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
            totals.append(total)
        return totals

    def _score(self, context: list[int], text: list[int], cache: PromptCache) -> ScoreResult:
        """Score a text behind as much of the end of its context as there is room for."""
        room = max(self._model.context - len(text), 1)
        return score(*self._loaded, context[-room:], text, prompt_cache=cache)


if __name__ == "__main__":
    cli_evaluate()
