"""Answers completions that ask how likely their prompts are, as evaluation tools do.

They are asked for with `echo` and `max_tokens: 0`. Of one token more, which some tools ask for only
because they must, the likeliest is told by the same reading: it needs no canvas.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from ..tasks.score import ScoreRequest, ScoreResult
from ..text.tokenizer import Tokenizer
from .openai import CompletionBody, asks_scores, prompts_of
from .openai_answers import common
from .refused import Refused

# Likeliest tokens of a place.
Best = Sequence[tuple[int, float]]


def score_requests(body: CompletionBody) -> list[ScoreRequest]:
    """Translate a completion that `asks_scores`, prompt by prompt.

    Of ids, nothing stands before the first, which therefore has no score; text stands behind the
    token that begins texts.

    Raises:
        Refused: nothing of the prompt is wanted, or of it alone there is nothing to score; or what
            makes no sense together.
    """
    assert asks_scores(body)
    if not body.echo:
        raise Refused(400, "max_tokens 0 goes with echo: there would be no answer")
    if body.stream or body.suffix or body.opening or (body.n or 1) > 1 or (body.best_of or 1) > 1:
        raise Refused(
            400, "scores of a prompt go with neither stream, suffix, opening, n nor best_of"
        )
    top = max(body.logprobs or 0, 1)
    found = []
    for prompt in prompts_of(body):
        if isinstance(prompt, str):
            found.append(ScoreRequest(None, prompt, top))
        elif len(prompt) == 1:
            raise Refused(400, "a prompt of one token has nothing to score: nothing is before it")
        else:
            found.append(ScoreRequest(prompt[:1], prompt[1:], top))
    return found


class ScoreReply:
    """Puts the answer together: each prompt with its scores."""

    def __init__(self, body: CompletionBody, model: str, tokenizer: Tokenizer):
        self._common = {**common("cmpl", model), "object": "text_completion"}
        self._prompts = prompts_of(body)
        self._logprobs = body.logprobs
        self._written = body.max_tokens or 0
        self._tokenizer = tokenizer

    def whole(self, results: Sequence[ScoreResult]) -> dict[str, Any]:
        """Give the answer as JSON; the results are those of the prompts, in their order."""
        choices: list[dict[str, Any]] = []
        read = 0
        for prompt, result in zip(self._prompts, results, strict=True):
            before = [] if isinstance(prompt, str) else prompt[:1]
            text = prompt if isinstance(prompt, str) else self._tokenizer.decode(prompt)
            read += 1 + len(result.tokens)
            rows: list[tuple[int, float | None, Best]] = [(token, None, ()) for token in before]
            rows += zip(result.tokens, result.log_probabilities, result.top, strict=True)
            if self._written:
                token, chance = result.following[0]
                rows.append((token, chance, result.following))
                text += self._tokenizer.pieces([token])[0]
            choices.append(
                {
                    "index": len(choices),
                    "text": text,
                    "finish_reason": "length",
                    "logprobs": None if self._logprobs is None else self._told(rows),
                }
            )
        written = self._written * len(choices)
        usage = {
            "prompt_tokens": read,
            "completion_tokens": written,
            "total_tokens": read + written,
        }
        return {**self._common, "choices": choices, "usage": usage}

    def _told(self, rows: Sequence[tuple[int, float | None, Best]]) -> dict[str, Any]:
        """Tokens with their scores, as OpenAI tells them."""
        used = {token for token, _, best in rows for token in (token, *(t for t, _ in best))}
        piece_of = dict(zip(used, self._tokenizer.pieces(list(used)), strict=True))
        pieces = [piece_of[token] for token, _, _ in rows]
        top: list[dict[str, float] | None] = []
        for piece, (_, chance, best) in zip(pieces, rows, strict=True):
            if chance is None:
                top.append(None)
                continue
            told: dict[str, float] = {}
            for other, level in best[: self._logprobs]:
                told.setdefault(piece_of[other], level)  # of tokens that read alike, the likelier
            told.setdefault(piece, chance)
            top.append(told)
        return {
            "tokens": pieces,
            "token_logprobs": [chance for _, chance, _ in rows],
            "top_logprobs": top,
            "text_offset": list(accumulate(map(len, pieces[:-1]), initial=0)),
        }
