"""Numbers within bounds, as patterns of their digits."""

from collections.abc import Callable, Iterator, Mapping
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal
from typing import Any

from ..diffusion.automaton import Alternation, Concat, Pattern, Repeat
from .schema_characters import OneOf, Spelled

# Digits of a number that its schema does not bound: within what every JSON reader keeps exactly.
MOST_DIGITS = 15

MOST_DECIMALS = 6


def within_bounds(
    rules: Mapping[str, Any], kind: str, count: Callable[[int], None]
) -> list[Pattern]:
    """Return patterns of numbers ("number" or "integer") within the bounds of `rules`, if any fits.

    `count` is told how many parts a pattern has, before it is made, and may raise.
    """
    low, high = _bound(rules, "minimum"), _bound(rules, "maximum")
    edge_low = _bound(rules, "exclusiveMinimum")
    edge_high = _bound(rules, "exclusiveMaximum")
    limit = Decimal(10) ** MOST_DIGITS - 1
    options: list[Pattern] = []
    bounds = [b for b in (low, high, edge_low, edge_high) if b is not None]
    decimals = [0]
    if kind == "number":
        if not bounds:
            return [any_number()]
        finest = max(-int(b.as_tuple().exponent) for b in bounds)
        decimals += sorted({1, 2, max(finest, 1), finest + 1})
    for places in decimals:
        unit = Decimal(10) ** -places
        # In units of the last decimal place the bounds are whole numbers, both included.
        floor = max(_up(low, unit), _above(edge_low, unit), -int(limit / unit))
        ceiling = min(_down(high, unit), _below(edge_high, unit), int(limit / unit))
        if floor <= ceiling:
            options += _between(floor, ceiling, places, count)
    return options


def any_number() -> Pattern:
    """Return the pattern of numbers of `MOST_DIGITS` digits, `MOST_DECIMALS` decimals at most."""
    digit = OneOf("0123456789")
    more = Repeat(digit, 0, MOST_DIGITS - 1)
    whole = Alternation((Spelled("0"), Concat((OneOf("123456789"), more))))
    sign = Alternation((Concat(()), Spelled("-")))
    decimals = Concat((Spelled("."), digit, Repeat(digit, 0, MOST_DECIMALS - 1)))
    return Concat((sign, whole, Alternation((Concat(()), decimals))))


def _between(low: int, high: int, places: int, count: Callable[[int], None]) -> list[Pattern]:
    """Return patterns of low..high, in units of 10 ** -places, with just as many decimals."""
    options: list[Pattern] = []
    if low < 0:
        negative = _digits(max(1, -high), -low, places, count)
        options += [Concat((Spelled("-"), part)) for part in negative]
    if high >= 0:
        options += _digits(max(0, low), high, places, count)
    return options


def _digits(low: int, high: int, places: int, count: Callable[[int], None]) -> Iterator[Pattern]:
    """Yield patterns of the numbers low..high without a sign, as `_between` has them."""
    for classes in digit_ranges(low, high, places + 1):
        count(len(classes))
        parts: list[Pattern] = []
        for i, digits in enumerate(classes):
            if places and i == len(classes) - places:
                parts.append(Spelled("."))
            parts.append(Spelled(digits) if len(digits) == 1 else OneOf(digits))
        yield Concat(tuple(parts))


def _bound(rules: Mapping[str, Any], name: str) -> Decimal | None:
    value = rules.get(name)
    return None if value is None else Decimal(str(value))


def _up(bound: Decimal | None, unit: Decimal) -> int:
    return -(10**40) if bound is None else int((bound / unit).to_integral_value(ROUND_CEILING))


def _down(bound: Decimal | None, unit: Decimal) -> int:
    return 10**40 if bound is None else int((bound / unit).to_integral_value(ROUND_FLOOR))


def _above(bound: Decimal | None, unit: Decimal) -> int:
    return -(10**40) if bound is None else _down(bound, unit) + 1


def _below(bound: Decimal | None, unit: Decimal) -> int:
    return 10**40 if bound is None else _up(bound, unit) - 1


def digit_ranges(low: int, high: int, width: int) -> Iterator[list[str]]:
    """Yield low..high as classes of digits, at least `width` of them: 13..99 -> 1[3-9], [2-9]x."""
    for digits in range(max(width, len(str(low))), max(width, len(str(high))) + 1):
        first = max(low, 10 ** (digits - 1) if digits > width else 0)
        last = min(high, 10**digits - 1)
        if first <= last:
            yield from _same_width(str(first).zfill(digits), str(last).zfill(digits))


def _same_width(low: str, high: str) -> Iterator[list[str]]:
    """Yield the same of two numbers that are written with as many digits."""
    if not low:
        yield []
        return
    if low[0] == high[0]:
        yield from ([low[0], *rest] for rest in _same_width(low[1:], high[1:]))
        return
    nines, zeros = "9" * (len(low) - 1), "0" * (len(low) - 1)
    first, last = int(low[0]), int(high[0])
    if low[1:] != zeros:
        yield from ([low[0], *rest] for rest in _same_width(low[1:], nines))
        first += 1
    if high[1:] != nines:
        last -= 1
    if first <= last:
        yield ["0123456789"[first : last + 1], *["0123456789"] * (len(low) - 1)]
    if high[1:] != nines:
        yield from ([high[0], *rest] for rest in _same_width(zeros, high[1:]))
