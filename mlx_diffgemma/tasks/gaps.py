"""Lays a text with holes over canvases: tokens that are given, and what each hole may hold."""

import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from ..diffusion.automaton import Alternation, Concat, Exactly, Pattern, Repeat
from ..model.diffusion_gemma import DiffusionGemma
from ..text.template import Hole, TemplateError, short
from ..text.vocabulary import Vocabulary, integer

TEXT_LENGTHS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 24, 32)

INTEGER_LENGTHS = (1, 2, 3, 4, 5, 6)

# A quick fill tries fewer lengths: each is a canvas in every step, and an editor's next request
# goes on where this one was a token short.
QUICK_LENGTHS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)

# Tokens behind the last hole that a quick fill sees: some lines. They are decoded in every step.
BEHIND = 48

# Characters before the first hole that a quick fill reads: thousands of tokens.
BEFORE = 1 << 14

# Characters of a window that is so long that what was read of the last one is worth keeping.
WINDOW = 1 << 12

# Sizes of a quick fill's canvas are multiples of this part of a whole one: shapes are few then.
SIZES = 16


_CLOSING = '"`)]}>'


@dataclass(frozen=True)
class Gap:
    """A hole with what it may hold, by length in tokens."""

    hole: Hole
    spaced: bool  # its text begins with the space that stood before it
    patterns: dict[int, Pattern]
    start_length: int  # until it is decided
    any_length: Pattern  # as the encoder writes it, which need not guess


Piece = tuple[int, ...] | Gap


def _gap(
    vocabulary: Vocabulary,
    hole: Hole,
    spaced: bool,
    closing: str,
    room: int,
    check: Callable[[], None],
    lengths: Sequence[int],
) -> Gap:
    patterns: dict[int, Pattern] = {}
    any_length: Pattern | None = None
    if hole.kind == "choice":
        by_length: dict[int, list[Pattern]] = {}
        for option in hole.options:
            check()
            literal = vocabulary.literal(" " + option if spaced else option)
            by_length.setdefault(len(literal.ids), []).append(literal)
        patterns = {n: Alternation(tuple(options)) for n, options in by_length.items()}
    elif hole.kind == "int":
        patterns = {n: integer(vocabulary, n) for n in INTEGER_LENGTHS}
    else:
        counts = [n for n in lengths if hole.most is None or n <= hole.most]
        if hole.tokens is not None:
            counts = [hole.tokens]
        # What closes the hole cannot stand in it, and only a hole that says its length has lines.
        unknown = hole.tokens is None and hole.most is None
        lines = "\n" if unknown or hole.line else ""
        inner = vocabulary.text_without(closing + lines)
        first = vocabulary.words_without(closing + "\n") if spaced else inner
        patterns = {n: Concat((first, Repeat(inner, n - 1, n - 1))) for n in counts}
        if unknown:
            any_length = Concat((first, Repeat(inner, 0, max(counts) - 1)))
    patterns = {n: pattern for n, pattern in patterns.items() if n <= room}
    if not patterns:
        raise TemplateError(
            f"the hole {short(hole.name)} is longer than a canvas of {room + 1} tokens"
        )
    lengths = sorted(patterns)
    any_length = any_length or Alternation(tuple(patterns.values()))
    return Gap(hole, spaced, patterns, lengths[len(lengths) // 3], any_length)


def pieces_of(
    model: DiffusionGemma,
    vocabulary: Vocabulary,
    parts: list[str | Hole],
    check: Callable[[], None],
    quick: bool,
) -> list[Piece]:
    """The template in tokens. A space before a hole moves into it, if words begin with theirs.

    What stands behind a hole as a closing quote or bracket cannot stand in it; in code that is
    filled quickly it can, as brackets nest there.
    """
    pieces: list[Piece] = []
    room = model.config.canvas_length - 1
    for i, part in enumerate(parts):
        check()
        after = parts[i + 1] if i + 1 < len(parts) else None
        if isinstance(part, Hole):
            before = parts[i - 1] if i else ""
            spaced = isinstance(before, str) and _lends_space(vocabulary, before, part)
            closes = isinstance(after, str) and after[:1] in _CLOSING and not quick
            closing = after[:1] if isinstance(after, str) and closes else ""
            lengths = QUICK_LENGTHS if quick else TEXT_LENGTHS
            pieces.append(_gap(vocabulary, part, spaced, closing, room, check, lengths))
            continue
        lends = isinstance(after, Hole) and _lends_space(vocabulary, part, after)
        text = part[:-1] if lends else part
        pieces.append(tuple(vocabulary.tokenizer.encode(text)))
    return pieces


def _lends_space(vocabulary: Vocabulary, text: str, hole: Hole) -> bool:
    if not vocabulary.words_begin_with_spaces:
        return False
    return hole.kind != "int" and len(text) > 1 and text[-1] == " " and not text[-2].isspace()


@dataclass(frozen=True)
class Row:
    """One canvas: its pattern, where its holes lie, where the template's text ends."""

    pattern: Pattern
    spans: dict[str, tuple[int, int]]
    end: int


def row_of(
    vocabulary: Vocabulary, pieces: Iterable[Piece], lengths: dict[str, int], room: int, last: bool
) -> Row:
    """Lay pieces over a canvas of `room` tokens; what does not fit is cut off at its end."""
    patterns: list[Pattern] = []
    spans: dict[str, tuple[int, int]] = {}
    used = 0
    for piece in pieces:
        if isinstance(piece, Gap):
            length = lengths[piece.hole.name]
            if used + length > room:
                last = False
                break
            spans[piece.hole.name] = used, used + length
            patterns.append(piece.patterns[length])
        else:
            shown = piece[: room - used]
            last = last and len(shown) == len(piece)
            length = len(shown)
            patterns.append(Exactly(shown))
        used += length
    if last and used < room:
        patterns.append(Exactly(tuple(vocabulary.ending(room - used))))
    else:
        patterns.append(Repeat(vocabulary.anything, room - used, room - used))
    return Row(Concat(tuple(patterns)), spans, used)


def near_text(
    parts: Sequence[str | Hole], longest: int, context: int
) -> tuple[list[str | Hole], bool]:
    """What a quick fill looks at, and whether that is all behind the last hole.

    Of the text before the first hole it is what is nearest, of the text behind the last one the
    beginning; `longest` is a token's most characters, `context` the model's tokens, of which few
    have less than a character.
    """
    near = list(parts)
    if isinstance(first := near[0], str):
        near[0] = steady(first, min(BEFORE, context))
    whole = True
    if isinstance(last := near[-1], str):
        most = (BEHIND + max(QUICK_LENGTHS)) * longest
        whole, near[-1] = len(last) <= most, last[:most]
    return [part for part in near if part != ""], whole


def steady(text: str, most: int = BEFORE) -> str:
    """The nearest part of a text that ends at the cursor, which begins where it began before.

    An editor sends a window of lines that moves with the cursor: were all of it read, no prompt
    would begin as the last one did. So it begins with that line of the first quarter whose checksum
    is the least, which stays the same until the window has left it behind.
    """
    near = text[-most:]
    if len(near) < WINDOW:
        return near
    begins: list[tuple[int, int]] = []
    begin = 0
    for line in near.splitlines(keepends=True):
        if begin > len(near) // 4:
            break
        whole = begin > 0 or len(near) == len(text)
        if whole and line.strip():
            begins.append((zlib.crc32(line.encode("utf-8", "surrogatepass")), begin))
        begin += len(line)
    return near[min(begins)[1] :] if begins else near


def quick_room(canvas_length: int, pieces: Sequence[Piece], whole: bool, fits: bool) -> int:
    """Positions of a quick fill's canvas: of the longest holes, and of the text behind up to an end
    token, where it is `whole`, or of its beginning.

    The text left of the first hole counts where all `fits` into a canvas; else it is context.
    """
    if not fits:
        _, pieces = split_left(pieces)
    given = {p.hole.name: max(p.patterns) for p in pieces if isinstance(p, Gap)}
    size = -(-canvas_length // SIZES)
    if whole:
        needed = -(-(size_of(pieces, given) + 1) // size) * size
    else:
        needed = (size_of(pieces[:-1], given) + BEHIND) // size * size
    return min(canvas_length, needed)


def split_left(pieces: Sequence[Piece]) -> tuple[list[int], Sequence[Piece]]:
    """The tokens left of the first hole, and the pieces from it on."""
    left: list[int] = []
    for i, piece in enumerate(pieces):
        if isinstance(piece, Gap):
            return left, pieces[i:]
        left += piece
    return left, ()


def cut_behind(pieces: Sequence[Piece]) -> tuple[tuple[Piece, ...], bool]:
    """The pieces without what stands far behind the last hole, and whether they are all."""
    last = pieces[-1]
    if isinstance(last, Gap):
        return tuple(pieces), True
    most = BEHIND + max((max(p.patterns) for p in pieces if isinstance(p, Gap)), default=0)
    return (*pieces[:-1], last[:most]), len(last) <= most


def size_of(pieces: Iterable[Piece], lengths: dict[str, int]) -> int:
    return sum(lengths[p.hole.name] if isinstance(p, Gap) else len(p) for p in pieces)
