"""Text <-> ids and chat -> text, from a checkpoint's own files, without transformers."""

import json
import os
import re
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
from tokenizers import Tokenizer as Backend

from ..errors import Error
from ..files import is_text
from .pieces import SentencePieceError, read_pieces
from .rendering_budget import within
from .templating import MOST_SOURCE, Environment

Message = dict[str, Any]

Declaration = dict[str, Any]  # of a function, as the openai client sends it

# Of what a template says went wrong; it may say anything.
_SAID = 300

_BYTE = re.compile("<0x[0-9A-F]{2}>")  # how a byte is spelled in a vocabulary

# Characters of a long text that are encoded at once to count its tokens: a few hundredths of a
# second, and some ten megabytes.
COUNTED_AT_ONCE = 1 << 16

# What a template is tried with, to see what it makes of tools and thoughts.
_HELLO: Message = {"role": "user", "content": "hello"}

_TOOL: Declaration = {
    "type": "function",
    "function": {
        "name": "now",
        "description": "Tells the time.",
        "parameters": {"type": "object", "properties": {}},
    },
}

MOST_BYTES = 4  # of a character in UTF-8: a tokenizer may take a token for each


class TokenizerError(Error):
    """A tokenizer file or chat template that cannot be used, or a chat it refuses."""


class TooLong(Error):
    """A text that has too many tokens, which was seen before all of it was encoded."""


def no_check() -> None:
    """Check nothing."""


class Tokenizer:
    """`tokenizer.json`, or `tokenizer.model`, plus the checkpoint's chat template.

    The template runs in Jinja's sandbox, within bounds of time and size (`templating.py`): nothing
    from a repository is executed as code.
    """

    def __init__(self, backend: Backend, settings: dict[str, Any], template: str | None):
        self._backend = backend
        self._template_source = template
        self._special = {
            key: value["content"] if isinstance(value, dict) else value
            for key, value in settings.items()
            if key.endswith("_token") and value
        }

    def __repr__(self) -> str:
        template = "no chat template" if self._template_source is None else "a chat template"
        return f"Tokenizer({self.vocab_size:,} tokens, {template})"

    @classmethod
    def from_directory(cls, directory: Path) -> "Tokenizer":
        """Read `tokenizer.json`, `tokenizer_config.json` and the template that stands beside them.

        Where the first is missing, `tokenizer.model` of sentencepiece is read instead.

        Raises:
            TokenizerError: a file is missing or damaged.
        """
        path = directory / "tokenizer.json"
        settings: dict[str, Any] = {}
        special: dict[str, str] = {}
        if has_pieces_alone(directory):
            try:
                backend, special = read_pieces(directory / "tokenizer.model")
            except SentencePieceError as error:
                raise TokenizerError(str(error)) from None
        else:
            backend = _read_backend(path)
        config = directory / "tokenizer_config.json"
        if config.exists():
            try:
                settings = json.loads(config.read_text(encoding="utf-8"))
            except ValueError as error:
                raise TokenizerError(f"{config} is not JSON: {error}") from None
        if not isinstance(settings, dict):
            raise TokenizerError(f"{config} is not a JSON object")
        file = directory / "chat_template.jinja"
        template = _read_template(file) if file.exists() else None
        if template is None and isinstance(settings.get("chat_template"), str):
            template = settings["chat_template"]
        said = {key: value for key, value in settings.items() if value is not None}
        return cls(backend, {**special, **said}, template)

    def save(self, directory: Path) -> None:
        """Write `tokenizer.json`, and into `tokenizer_config.json` the special tokens it lacks.

        Raises:
            OSError: the disk refuses.
        """
        (directory / "tokenizer.json").write_text(self._backend.to_str(), encoding="utf-8")
        config = directory / "tokenizer_config.json"
        settings = json.loads(config.read_text(encoding="utf-8")) if config.exists() else {}
        said = {key: value for key, value in settings.items() if value is not None}
        text = json.dumps({**self._special, **said}, ensure_ascii=False, indent=2)
        config.write_text(text, encoding="utf-8")

    @property
    def vocab_size(self) -> int:
        """Number of ids, special ones included."""
        return self._backend.get_vocab_size()

    @property
    def largest_id(self) -> int:
        """The largest id that encoding can give."""
        return max(self._backend.get_vocab().values(), default=0)

    def token_id(self, token: str) -> int | None:
        """Return the id of a token written exactly so, or None."""
        return self._backend.token_to_id(token)

    def token(self, number: int) -> str | None:
        """Return how a token is written, or None if there is no such id."""
        return self._backend.id_to_token(number)

    def encode(self, text: str) -> list[int]:
        """Encode text as it stands: special tokens are recognised, none is added.

        Raises:
            TokenizerError: the text has half of a surrogate pair.
        """
        try:
            # `encode` of the library keeps all other threads waiting until it is done; this is the
            # same in a batch of one, and lets them run.
            (found,) = self._backend.encode_batch_fast([text], add_special_tokens=False)
        except TypeError:
            raise TokenizerError("the text has half of a surrogate pair, no character") from None
        return found.ids

    @cached_property
    def longest(self) -> int:
        """Characters of the longest token: of n tokens no text is longer than n times that."""
        return max(map(len, self._backend.get_vocab()), default=1)

    def encode_within(
        self, text: str, most: int, what: str, check: Callable[[], None] = no_check
    ) -> list[int]:
        """Encode as `encode`, but refuse early a text that must have more than `most` tokens.

        A text that has a few more may pass. `what` names it in the error; `check` is called between
        pieces of work and may raise.

        Raises:
            TooLong: as said.
            TokenizerError: as `encode`.
        """
        if len(text) > most * self.longest:
            raise TooLong(
                f"{what} has {len(text):,} characters; {most:,} tokens of at most {self.longest} "
                f"characters have room for {most * self.longest:,}"
            )
        if len(text) > max(COUNTED_AT_ONCE, most // MOST_BYTES):
            # Encoding takes hundreds of bytes a token. Cut into pieces, the text has nearly as many
            # tokens as in one; where it has twice what may be, it has too many.
            count = 0
            for start in range(0, len(text), COUNTED_AT_ONCE):
                check()
                count += len(self.encode(text[start : start + COUNTED_AT_ONCE]))
                if count > 2 * most:
                    raise TooLong(f"{what} has far more than {most:,} tokens")
        check()
        return self.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """Decode ids.

        Tokens that only frame a turn (padding, begin, end, turn marks) leave no trace; markers of
        channels and tools stay, since a caller has to see them.
        """
        kept = [i for i in ids if i not in self._framing]
        return self._backend.decode(kept, skip_special_tokens=False)

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """Decode each id by itself; part of a character is U+FFFD."""
        return [self.decode([i]) for i in ids]

    @cached_property
    def plain(self) -> dict[int, str]:
        """The text that each ordinary id adds to what stands before it.

        Left out are special tokens, single bytes and whatever else is not whole characters by
        itself, so that texts of these ids may be concatenated.
        """
        special = self._backend.get_added_tokens_decoder()
        ids = [i for i in range(self.vocab_size) if i not in special]
        ids = [i for i in ids if not _BYTE.fullmatch(self._backend.id_to_token(i) or "<0x00>")]
        # Some decoders strip a leading space, which therefore must not be at the front.
        anchor = self.encode("a")
        before = self._backend.decode(anchor, skip_special_tokens=False)
        texts = self._backend.decode_batch([[*anchor, i] for i in ids], skip_special_tokens=False)
        found = {i: text.removeprefix(before) for i, text in zip(ids, texts, strict=True)}
        return {i: text for i, text in found.items() if text and "\ufffd" not in text}

    @cached_property
    def framing(self) -> tuple[str, ...]:
        """How tokens are written that only frame a turn: padding, begin, end, turn marks."""
        kinds = ("pad_token", "bos_token", "eos_token")
        names = ["<|turn>", "<turn|>", *(self._special[k] for k in kinds if k in self._special)]
        return tuple(name for name in names if self.token_id(name) is not None)

    def special_id(self, kind: str) -> int | None:
        """Return the id of a token by what it is for, such as "bos_token", or None."""
        return self.token_id(self._special[kind]) if kind in self._special else None

    @cached_property
    def _framing(self) -> frozenset[int]:
        return frozenset(i for i in map(self.token_id, self.framing) if i is not None)

    def apply_chat_template(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        enable_thinking: bool = False,
        tools: Sequence[Declaration] | None = None,
        pictures: bool = False,
    ) -> str:
        """Render a chat as the text that the model was trained on.

        With `pictures`, a part {"type": "image"} of a content is written as its marker.

        Raises:
            TokenizerError: there is no message or no template, or it refuses these messages, fails,
                or takes too much time or memory; or a message holds something else than text.
        """
        if not messages:
            raise TokenizerError("there is no message in this chat")
        for message in messages:
            _refuse_media(message.get("content"), pictures)
        template = self._template
        try:
            with within(messages, tools):
                text = template.render(
                    messages=messages,
                    add_generation_prompt=add_generation_prompt,
                    enable_thinking=enable_thinking,
                    tools=tools,
                    **self._special,
                )
        except Exception as error:  # a template may raise whatever Python can
            raise TokenizerError(
                f"the chat template refuses these messages: {_said(error)}"
            ) from None
        if not is_text(text):  # which cannot become ids
            raise TokenizerError("the chat template gives half of a surrogate pair, no character")
        return text

    @cached_property
    def knows_thinking(self) -> bool:
        """Tell whether asking for thoughts changes what the chat template writes."""
        return self._changes(enable_thinking=True)

    @cached_property
    def knows_tools(self) -> bool:
        """Tell whether the chat template writes tools down, and calls of them are marked."""
        return self.token_id("<|tool_call>") is not None and self._changes(tools=[_TOOL])

    def _changes(
        self, *, enable_thinking: bool = False, tools: Sequence[Declaration] | None = None
    ) -> bool:
        if self._template_source is None:
            return False
        try:
            plain = self.apply_chat_template([_HELLO])
            asked = self.apply_chat_template([_HELLO], enable_thinking=enable_thinking, tools=tools)
        except TokenizerError:  # whoever asks for it is told why
            return True
        return plain != asked

    @cached_property
    def _template(self) -> jinja2.Template:
        if self._template_source is None:
            raise TokenizerError("this checkpoint has no chat template (chat_template.jinja)")
        try:
            with within():
                return Environment().from_string(self._template_source)
        except Exception as error:  # parsing, and Python's compiler behind it
            raise TokenizerError(f"the chat template is damaged: {_said(error)}") from None


def has_pieces_alone(directory: Path) -> bool:
    """Whether a directory has a `tokenizer.model`, and no `tokenizer.json` that says the same."""
    present = (directory / "tokenizer.model").exists()
    return present and not os.path.lexists(directory / "tokenizer.json")


def _read_backend(path: Path) -> Backend:
    try:
        backend = Backend.from_str(path.read_text(encoding="utf-8"))
    except OSError:
        raise TokenizerError(f"{path} is missing") from None
    except Exception as error:  # the library raises bare Exception
        raise TokenizerError(f"{path} is not a tokenizer: {error}") from None
    # A file may ask for both; the first cuts prompts, the second writes ids of its choice.
    backend.no_truncation()
    backend.no_padding()
    return backend


def _read_template(path: Path) -> str:
    """Read a template's source; of one that is too long, enough to be refused."""
    try:
        with path.open(encoding="utf-8") as file:
            return file.read(MOST_SOURCE + 1)
    except OSError as error:
        raise TokenizerError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError:
        raise TokenizerError(f"{path} is not UTF-8") from None


def _said(error: Exception) -> str:
    """Put an error of a template in one short line."""
    said = " ".join(str(error)[: 2 * _SAID].split())[:_SAID]
    return said if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: {said}"


def _refuse_media(content: Any, pictures: bool) -> None:
    """Refuse what is no text: a template writes a placeholder, which nothing would ever fill."""
    if not isinstance(content, list | tuple):
        return
    for part in content:
        if pictures and part == {"type": "image"}:
            continue
        if not isinstance(part, dict) or part.get("type") != "text":
            said = "text and images are supported, no audio or files"
            raise TokenizerError(
                said if pictures else "only text content is supported, no images, audio or files"
            )
