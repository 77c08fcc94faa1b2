"""Many requests side by side, of whatever kind: each gives what it would give alone."""

from collections.abc import Generator, Iterable, Sequence

from ..arguments import SettingError, check_kind, whole_number
from ..diffusion.decoding import Batch
from ..diffusion.prompt_cache import PromptCache
from ..errors import Error
from ..model.diffusion_gemma import DiffusionGemma
from ..text.tokenizer import Tokenizer
from ..text.turns import Text
from ..text.vocabulary import Vocabulary
from .generate import Request
from .request import Item, Task
from .together import together

# Requests that `batch_generate` lets in at once.
MAX_BATCH = 8


def stream_batch(
    model: DiffusionGemma,
    tokenizer: Tokenizer,
    requests: Iterable[Task[Item]],
    *,
    max_batch: int = MAX_BATCH,
) -> Generator[tuple[int, Item | Error], None, None]:
    """Answer requests, up to `max_batch` side by side: (index of the request, event).

    A request ends with its last event, or with the error that it alone would have raised. The next
    one is taken from `requests` as soon as there is room; where ranks share a model, all at once.
    """
    whole_number("max_batch", max_batch, 1)
    if model.part.share.size > 1:
        requests = list(requests)
    answers = _answers(model, tokenizer, requests, max_batch)
    yield from together(model, "batch", (requests, max_batch), answers)


def _answers(
    model: DiffusionGemma, tokenizer: Tokenizer, requests: Iterable[Task[Item]], max_batch: int
) -> Generator[tuple[int, Item | Error], None, None]:
    batch = Batch[Item](model)
    vocabulary = Vocabulary(model, tokenizer)
    waiting = enumerate(requests)
    numbers: dict[int, int] = {}
    try:
        while True:
            while len(batch) < max_batch and (found := next(waiting, None)) is not None:
                try:
                    prepared = found[1].prepare(model, vocabulary)
                except Error as error:
                    yield found[0], error
                else:
                    numbers[batch.add(prepared.run(PromptCache(model)))] = found[0]
            if not len(batch):
                return
            for key, event in batch.step():
                if isinstance(event, Exception) and not isinstance(event, Error):
                    raise event
                if event is not None:
                    yield numbers[key], event
    finally:
        batch.close()


def batch_generate(
    model: DiffusionGemma,
    tokenizer: Tokenizer,
    requests: Sequence[Request | str],
    *,
    max_batch: int = MAX_BATCH,
) -> list[str]:
    """The answers to requests, or to prompts with the checkpoint's settings, in their order.

    Raises:
        Error: the first that a request meets; the others' answers are lost with it.
    """
    answers = [""] * len(requests)
    for number, text in stream_texts(model, tokenizer, requests, max_batch=max_batch):
        answers[number] += text
    return answers


def stream_texts(
    model: DiffusionGemma,
    tokenizer: Tokenizer,
    requests: Sequence[Request | str],
    *,
    max_batch: int = MAX_BATCH,
) -> Generator[tuple[int, str], None, None]:
    """Parts of the answers to requests or prompts: (index of the request, text).

    Raises:
        Error: the first that a request meets.
    """
    if isinstance(requests, str):
        raise SettingError("requests are a list, of prompts or of Request; not one text")
    asked = [Request(each) if isinstance(each, str) else each for each in requests]
    for each in asked:
        check_kind("a request", each, Request, "a prompt or a Request")
    for i, event in stream_batch(model, tokenizer, asked, max_batch=max_batch):
        if isinstance(event, Error):
            raise event
        if isinstance(event, Text):
            yield i, event.text
