"""Examples -> samples: encoded through the model's own chat template, before any weight is loaded.

The response of a conversation is what its last turn adds to the prompt that generation would have
been given, so that the model learns to write what it will be asked to write, and no header.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..arguments import shown
from ..text.tokenizer import Tokenizer, TokenizerError, no_check
from .lines import Conversation, DataError, Keys, Mistakes, PlainText, Record, read_records, written
from .objective import Sample

# Marks of pictures and sounds, which would stand for nothing in a text.
_MEDIA = ("<|image|>", "<|image>", "<image|>", "<|audio|>", "<|audio>", "<audio|>", "<|video|>")

Split = str  # "train", "valid" or "test": the name of a file without .jsonl


@dataclass(frozen=True)
class Example:
    """A sample and the line that it stands in. One that `asks` has a prompt to be answered."""

    line: int
    sample: Sample
    asks: bool = True


@dataclass(frozen=True)
class Data:
    """What a folder holds, and what its reader should know of it."""

    train: tuple[Example, ...] = ()
    valid: tuple[Example, ...] = ()
    test: tuple[Example, ...] = ()
    notices: tuple[str, ...] = ()

    @property
    def longest(self) -> int:
        """Tokens of the longest example, prompt and response."""
        return max(each.sample.length for each in (*self.train, *self.valid, *self.test))


@dataclass(frozen=True)
class Encoder:
    """How examples become ids.

    Attributes:
        tokenizer: of the checkpoint that is trained.
        ends: ids that end an answer, as generation knows them.
        canvas_length: positions of a canvas; a response takes whole ones of the context.
        context: most positions that the model knows.
        most: most tokens of prompt and response; a longer response is truncated.
    """

    tokenizer: Tokenizer
    ends: tuple[int, ...]
    canvas_length: int
    context: int
    most: int

    def sample(self, record: Record) -> Sample:
        """Encode an example.

        Raises:
            Error: the template refuses it, its prompt is no prefix of the whole or leaves no room,
                or a text holds what only the template may write.
        """
        if isinstance(record, PlainText):
            return self._fitted(*self._text(record))
        return self._fitted(*self._conversation(record))

    def _text(self, record: PlainText) -> tuple[list[int], list[int]]:
        """The beginning of all texts as prompt, and the text with its end."""
        ids = self._encode(record.text)
        begin = self.tokenizer.special_id("bos_token")
        prompt = [] if begin is None else [begin]
        ids = ids[len(prompt) :] if ids[: len(prompt)] == prompt else ids
        return prompt, ids if ids[-1:] == [self.ends[0]] else [*ids, self.ends[0]]

    def _conversation(self, record: Conversation) -> tuple[list[int], list[int]]:
        self._check_marks(record)
        tokenizer, messages = self.tokenizer, record.messages
        tools = list(record.tools) or None
        if tools and not tokenizer.knows_tools:
            raise DataError("it has tools, and this model's chat template knows none")
        asked = tokenizer.apply_chat_template(messages[:-1], tools=tools)
        whole = tokenizer.apply_chat_template(messages, tools=tools, add_generation_prompt=False)
        prompt, ids = self._encode(asked), self._encode(whole)
        if ids[: len(prompt)] != prompt:
            raise DataError(
                "the prompt that generation would be given is no prefix of the whole conversation "
                "as the chat template writes it, so that what is the answer cannot be told"
            )
        return prompt, self._closed(ids[len(prompt) :], calls=bool(messages[-1].get("tool_calls")))

    def _closed(self, response: list[int], *, calls: bool) -> list[int]:
        """The response up to the token that ends it; behind it templates write white space.

        Behind calls of tools a model ends with the mark of their results, which a template may
        write with the results alone.
        """
        last = max((i for i, token in enumerate(response) if token in self.ends), default=-1)
        behind = self.tokenizer.decode(response[last + 1 :])
        if last < 0 or behind.strip():
            if len(response) > self.most:  # cut before its end
                return response
            answered = self.tokenizer.token_id("<|tool_response>")
            if calls and last < 0 and answered in self.ends:
                return [*response, answered]
            raise DataError("the chat template does not end the answer with an end token")
        if last == 0:
            raise DataError("the answer is empty")
        return response[: last + 1]

    def _check_marks(self, record: Conversation) -> None:
        said = written(record)
        for mark in (*self.tokenizer.framing, *_MEDIA):
            if mark in said and self.tokenizer.token_id(mark) is not None:
                raise DataError(
                    f"a text holds {shown(mark)}, a special token that only the template writes"
                )

    def _encode(self, text: str) -> list[int]:
        """Ids of a text, or of as much of it as can matter: no token is longer than the longest."""
        return self.tokenizer.encode(text[: (self.most + 2) * self.tokenizer.longest])

    def _fitted(self, prompt: list[int], response: list[int]) -> Sample:
        """The sample, its response truncated to what there is room for."""
        room = self.most - len(prompt)
        canvases = (self.context - len(prompt)) // self.canvas_length
        if room < 1 or canvases < 1:
            limit = f"--max-seq-length {self.most}" if room < 1 else f"the context {self.context}"
            raise DataError(
                f"its prompt has {len(prompt):,} tokens, and {limit} leaves no room for an answer"
            )
        room = min(room, canvases * self.canvas_length)
        return Sample(tuple(prompt), tuple(response[:room]), truncated=len(response) > room)


@dataclass
class _Notices:
    """Sentences about data that is used all the same."""

    said: list[str] = field(default_factory=list)

    def truncated(self, path: Path, examples: Sequence[Example], most: int) -> None:
        cut = [example.line for example in examples if example.sample.truncated]
        if cut:
            self.said.append(
                f"{path}: {len(cut)} of {len(examples)} examples are longer than "
                f"{most} tokens and are truncated (the first in line {cut[0]})"
            )

    def repeated(self, path: Path, examples: Sequence[Example], train: Sequence[Example]) -> None:
        known = {example.sample: example.line for example in train}
        found = [each for each in examples if each.sample in known]
        if found:
            first = found[0]
            self.said.append(
                f"{path}: {len(found)} of {len(examples)} examples are also in train.jsonl (the "
                f"first in line {first.line}, there in line {known[first.sample]}), so that what "
                "is measured on them says less"
            )


def read_data(
    folder: Path,
    encoder: Encoder,
    keys: Keys,
    *,
    train: bool,
    test: bool,
    check: Callable[[], None] = no_check,
) -> Data:
    """Read what training needs of a folder (train.jsonl, and valid.jsonl if there is one), what
    testing needs (test.jsonl), or both. `check` is called for each example, and may raise.

    Raises:
        DataError: a file is missing, empty or cannot be read, or lines of it cannot be used.
    """
    _check_folder(folder)
    notices = _Notices()

    def read(name: Split, *, needed: bool) -> tuple[Example, ...]:
        path = folder / f"{name}.jsonl"
        if not path.exists():
            if needed:
                raise DataError(f"{folder} has no {path.name}")
            return ()
        found = _examples(path, encoder, keys, check)
        notices.truncated(path, found, encoder.most)
        return found

    training = read("train", needed=True) if train else ()
    valid = read("valid", needed=False) if train else ()
    tested = read("test", needed=True) if test else ()
    if train and not valid:
        notices.said.append(f"{folder} has no valid.jsonl: nothing is measured while training")
    notices.repeated(folder / "valid.jsonl", valid, training)
    notices.repeated(folder / "test.jsonl", tested, training)
    return Data(training, valid, tested, tuple(notices.said))


def _check_folder(folder: Path) -> None:
    if folder.is_dir():
        return
    if folder.exists():
        raise DataError(f"{folder} is a file; --data names the folder that holds train.jsonl")
    way = ""
    if len(folder.parts) == 2 and not folder.is_absolute():
        way = (
            "; a data set of the hub is fetched with: hf download --repo-type dataset "
            f"{folder} --local-dir DIR"
        )
    raise DataError(f"there is no folder {folder}{way}")


def _examples(
    path: Path, encoder: Encoder, keys: Keys, check: Callable[[], None]
) -> tuple[Example, ...]:
    mistakes = Mistakes(path)
    found = []
    for line, record in read_records(path, keys, mistakes):
        check()
        try:
            sample = encoder.sample(record)
            found.append(Example(line, sample, isinstance(record, Conversation)))
        except (DataError, TokenizerError) as error:
            mistakes.add(line, error)
    mistakes.check()
    if not found:
        raise DataError(f"{path} has no examples")
    return tuple(found)
