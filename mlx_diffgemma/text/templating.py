"""Chat templates come from strangers: they are rendered within bounds of time and of size.

Jinja's sandbox keeps a template from Python's internals, but not from the processor and the memory.
Nothing can stop an operation that has begun (threads have no timers, macOS no limit of memory), so
each one that may grow is measured before it runs, and steps between them are counted.
"""

import re
import string
import time
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from itertools import chain, islice
from typing import Any, cast

from jinja2 import nodes, pass_context
from jinja2.exceptions import SecurityError
from jinja2.ext import loopcontrols
from jinja2.runtime import Context, Undefined, markup_join
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

# Characters of a template: several times the longest in use, compiled in about a second.
MOST_SOURCE = 100_000

# Characters that one value, and that all values together may take, beside multiples of the input.
MOST_OF_ONE, ONE_BY_INPUT = 4_000_000, 4

MOST_IN_ALL, ALL_BY_INPUT = 64_000_000, 16

# An item of a container takes about as much memory as so many characters.
ITEM = 16

# Values nested deeper would exhaust Python's stack somewhere.
MOST_DEPTH = 100

# Seconds of this thread's processor; others' load does not count. A chat takes milliseconds.
MOST_SECONDS = 2.0

# Steps between looks at the clock; one takes some milliseconds at most.
STEPS_A_LOOK = 32

# Bits of a whole number, columns of an indent or digits to round to.
MOST_BITS, MOST_WIDTH = 1 << 16, 1000

# What cannot grow, or is measured below; the rest of Jinja's filters no chat template uses.
FILTERS = (
    "abs attr capitalize count d default dictsort e escape first float forceescape format groupby "
    "indent int items join last length list lower map max min reject rejectattr replace reverse "
    "round safe select selectattr sort string sum title trim truncate unique upper urlencode "
    "wordcount"
).split()

# Methods of strings, lists, dicts and numbers.
METHODS = frozenset(
    "capitalize casefold center copy count endswith find format format_map get index isalnum "
    "isalpha isascii isdecimal isdigit isidentifier islower isnumeric isprintable isspace istitle "
    "isupper items join keys ljust lower lstrip partition removeprefix removesuffix replace rfind "
    "rindex rjust rpartition rsplit rstrip split splitlines startswith strip swapcase title "
    "upper values zfill".split()
)

_METHOD = (types.BuiltinMethodType, types.MethodType)

_SMALL = (bool, int, float, types.NoneType)

_NONE: dict[str, str] = {}

_VIEWS = type(_NONE.keys()), type(_NONE.values()), type(_NONE.items())

_CONTAINERS: tuple[Any, ...] = (list, tuple, set, frozenset, *_VIEWS)

_COMPARING = "eq equalto == ne != gt greaterthan > ge >= lt lessthan < le <= in".split()

# Filters of our own that no template can name.
_STEP, _MADE, _CONCAT = "(step)", "(made)", "(concat)"


class Budget:
    """What one rendering may still take."""

    def __init__(self, *given: object):
        self._known: dict[int, int] = {}  # sizes of the input's containers, which outlive us
        self._one, self._all = MOST_OF_ONE, MOST_IN_ALL
        size = sum(self._size(value, 0, self._known) for value in given)
        self._one += ONE_BY_INPUT * size
        self._all += ALL_BY_INPUT * size
        self._steps = 0
        self._ends = time.thread_time() + MOST_SECONDS

    def step(self) -> None:
        """Count something that takes a bounded time."""
        self._steps += 1
        if not self._steps % STEPS_A_LOOK and time.thread_time() > self._ends:
            raise SecurityError(f"it takes more than {MOST_SECONDS:.0f} seconds")

    def size(self, value: object) -> int:
        """Characters of a value, contents included; what would be too large is refused."""
        if type(value) is str:
            return self.fits(len(value))
        return self._size(value, 0, None)

    def fits(self, size: int) -> int:
        """Refuse to make a value of so many characters."""
        if size > self._one:
            raise SecurityError(f"it makes a value of more than {self._one} characters")
        return size

    def made(self, value: Any) -> Any:
        """Count a value that the template made."""
        if type(value) is str:
            size = len(value)
            if size > self._one:
                self.fits(size)
        elif type(value) in _SMALL or id(value) in self._known:
            return value
        else:
            size = self._size(value, 0, None)
        self._all -= size
        if self._all < 0:
            raise SecurityError("its values take too much memory")
        return value

    def _size(self, value: Any, depth: int, known: dict[int, int] | None) -> int:
        """Of a value, without bound while `known` is filled with the sizes of the input."""
        if isinstance(value, str):
            return self.fits(len(value)) if known is None else len(value)
        if id(value) in self._known:
            return self._known[id(value)] + ITEM
        parts = value
        if isinstance(value, dict):
            size, parts = 2 * ITEM * len(value), chain(value, value.values())
        elif isinstance(value, _CONTAINERS):
            size = ITEM * len(value)
        elif isinstance(value, Namespace):  # whose text is that of all it holds
            raise SecurityError("a namespace inside a value is not supported")
        else:
            return ITEM
        if depth > MOST_DEPTH:
            raise SecurityError("its values are nested too deeply")
        for part in parts:
            size += len(part) if type(part) is str else self._size(part, depth + 1, known)
            if known is None and size > self._one:
                self.fits(size)
        if known is not None:
            known[id(value)] = size
        return size + ITEM


_budget: ContextVar[Budget] = ContextVar("budget")


@contextmanager
def within(*given: object) -> Iterator[None]:
    """Render or compile with a fresh budget that grows with the input."""
    before = _budget.set(Budget(*given))
    try:
        yield
    finally:
        _budget.reset(before)


class Environment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox with the settings of Hugging Face's templates, and bounds."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols], finalize=_shown
        )
        self.concat = _merged  # type: ignore[method-assign]
        del self.globals["lipsum"]
        known: dict[str, Any] = self.filters
        self.filters = {name: _guarded(name, known[name]) for name in FILTERS}
        self.filters |= {_STEP: _step, _MADE: _made, _CONCAT: _concatenated}
        for name in _COMPARING:
            tests: dict[str, Any] = self.tests
            self.tests[name] = _guarded(name, tests[name])

    def add_filter(self, name: str, function: Callable[..., Any]) -> None:
        """One more filter, within the same bounds."""
        self.filters[name] = _guarded(name, function)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        if len(source) > MOST_SOURCE:
            raise SecurityError(f"it has more than {MOST_SOURCE} characters")
        return cast(nodes.Template, _Guards().visit(super()._parse(source, name, filename)))

    def getitem(self, obj: Any, argument: Any) -> Any:
        if type(obj) is dict and argument in obj:
            return obj[argument]
        # Filters follow paths of any length with it, as in `map(attribute="real.real.real")`.
        _budget.get().step()
        return super().getitem(obj, argument)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        budget = _budget.get()
        budget.step()
        if operator == "+":
            if isinstance(left, str | list | tuple):
                budget.fits(budget.size(left) + budget.size(right))
        elif operator == "%":
            _check_percent(budget, left, right)
        elif isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length()
            bits = bits * right if operator == "**" else bits + right.bit_length()
            if bits > MOST_BITS:
                raise SecurityError("it computes a number of too many digits")
        elif operator == "*":
            for value, times in ((left, right), (right, left)):
                if isinstance(times, int) and not isinstance(value, float):
                    budget.fits(budget.size(value) * max(times, 1))
        return budget.made(super().call_binop(context, operator, left, right))

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        budget = _budget.get()
        budget.step()
        if isinstance(__obj, _METHOD):
            owner = __obj.__self__
            if isinstance(__obj, types.BuiltinMethodType) or isinstance(owner, str):
                if __obj.__name__ not in METHODS:
                    raise SecurityError(f"the method {__obj.__name__} is not supported")
                args = _check_growth(budget, __obj.__name__, owner, args, kwargs)
        for value in (*args, *kwargs.values()) if kwargs else args:
            if type(value) is not str and not isinstance(value, Namespace):
                budget.size(value)
        result = super().call(__context, __obj, *args, **kwargs)
        return result if type(result) is Namespace else budget.made(result)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        formats = super().wrap_str_format(value)
        if formats is None:
            return None

        def checked(*args: Any, **kwargs: Any) -> str:
            _check_format(_budget.get(), value.__self__, (*args, *kwargs.values()))
            return formats(*args, **kwargs)

        return checked


class _Guards(NodeTransformer):
    """Puts our filters where a template loops, compares, or makes a value without a call."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        step = nodes.Filter(nodes.Const(True), _STEP, [], [], None, None)
        node.body.insert(0, nodes.ExprStmt(step, lineno=node.lineno))
        if node.test is not None:
            node.test = nodes.And(step, node.test)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(nodes.List(node.nodes), _CONCAT, node)

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        (first, *more) = node.ops
        equal = first.op in ("eq", "ne") and (
            isinstance(node.expr, nodes.Const) or isinstance(first.expr, nodes.Const)
        )
        listed = first.op in ("in", "notin") and isinstance(first.expr, nodes.List | nodes.Tuple)
        return node if not more and (equal or listed) else _filtered(node, _STEP, node)

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(node, _MADE, node) if isinstance(node.arg, nodes.Slice) else node

    def visit_List(self, node: nodes.List) -> nodes.Node:
        self.generic_visit(node)
        return node if _constants(node.items) else _filtered(node, _MADE, node)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        self.generic_visit(node)
        return (
            node if _constants(node.items) or node.ctx != "load" else _filtered(node, _MADE, node)
        )

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(node, _MADE, node)


def _constants(parts: Sequence[nodes.Node]) -> bool:
    """Whether values are written down: nothing of them can be large."""
    return all(isinstance(part, nodes.Const) for part in parts)


def _filtered(node: nodes.Expr, name: str, at: nodes.Node) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=at.lineno)


# Jinja computes filters of constants while compiling, except of those that take the context.
@pass_context
def _step(context: Context, value: Any) -> Any:
    _budget.get().step()
    return value


@pass_context
def _made(context: Context, value: Any) -> Any:
    return _budget.get().made(value)


@pass_context
def _concatenated(context: Context, parts: list[Any]) -> str:
    """What `~` means."""
    budget = _budget.get()
    budget.step()
    budget.fits(sum(len(part) if type(part) is str else budget.size(part) for part in parts))
    text = markup_join(parts) if context.eval_ctx.autoescape else "".join(map(str, parts))
    return cast(str, budget.made(text))


def _merged(parts: Iterable[str]) -> str:
    """Pieces of output, of the template or of a macro, as one string."""
    budget = _budget.get()
    if isinstance(parts, list):  # of a macro
        budget.fits(sum(map(len, parts)))
        return cast(str, budget.made("".join(parts)))
    kept, size, left = list[str](), 0, iter(parts)
    while some := list(islice(left, 1000)):
        size += sum(map(len, some))
        budget.fits(size)
        kept += some
    return cast(str, budget.made("".join(kept)))


def _shown(value: Any) -> Any:
    """A value that is about to become text."""
    return value if type(value) is str else _budget.get().made(value)


def _guarded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter or test whose arguments and result are measured."""

    @wraps(function)
    def measured(*args: Any, **kwargs: Any) -> Any:
        budget = _budget.get()
        budget.step()
        # Some filters take what Jinja calls the evaluation context first.
        head = args[:1] if isinstance(args[0], nodes.EvalContext) else ()
        owner, *rest = args[len(head) :]
        if name == "join" and not isinstance(owner, str | Undefined):
            owner = list(owner)
        given = (*rest, *kwargs.values())
        for value in (owner, *given):
            budget.size(value)
        if name == "format":
            _check_percent(budget, str(owner), given)
        elif name == "join":
            separator = len(str(given[0])) if given else 0
            budget.fits(budget.size(owner) + separator * len(owner))
        elif name == "replace":
            _check_growth(budget, "replace", str(owner), tuple(map(str, given)), {})
        elif name in ("indent", "round", "tojson", "truncate"):
            _check_widths(budget, owner, given)
        return budget.made(function(*head, owner, *rest, **kwargs))

    return measured


def _check_growth(
    budget: Budget, name: str, owner: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, ...]:
    """Refuse a method of a string whose result would be too long; gives its arguments."""
    given = (*args, *kwargs.values())
    if name in ("center", "ljust", "rjust", "zfill"):
        budget.fits(max((value for value in given if isinstance(value, int)), default=0))
    elif name == "replace" and len(given) >= 2 and isinstance(given[0], str):
        found = owner.count(given[0])
        budget.fits(len(owner) + found * len(str(given[1])))
    elif name == "join" and len(args) == 1:
        items = list(args[0])
        budget.fits(budget.size(items) + len(owner) * len(items))
        return (items,)
    return args


def _check_widths(budget: Budget, owner: Any, given: Sequence[Any]) -> None:
    """Refuse numbers (or texts) that a filter would repeat something by."""
    widths = [abs(value) for value in given if isinstance(value, int)]
    widths += [len(value) for value in given if isinstance(value, str)]
    width = max(widths, default=0)
    if width > MOST_WIDTH:
        raise SecurityError(f"it indents, cuts or rounds to more than {MOST_WIDTH}")
    lines = owner.count("\n") + 1 if isinstance(owner, str) else budget.size(owner) // ITEM
    budget.fits(budget.size(owner) + lines * width)


def _check_percent(budget: Budget, form: Any, values: Any) -> None:
    """Refuse `form % values` if it is text that would be too long."""
    if not isinstance(form, str):
        return
    if "*" in form and "%" in form.replace("%%", ""):
        raise SecurityError("a width of * is not supported")
    widths = sum(int(digits[:20]) for digits in re.findall(r"\d+", form))
    budget.fits(len(form) + widths + form.count("%") * budget.size(values))


def _check_format(budget: Budget, form: str, values: tuple[Any, ...]) -> None:
    """Refuse `form.format(...)` whose result would be too long."""
    size, each = len(form), budget.size(values)
    for _, field, spec, _ in string.Formatter().parse(form):
        if "{" in (spec or ""):
            raise SecurityError("a width in braces is not supported")
        size += sum(int(digits[:20]) for digits in re.findall(r"\d+", spec or ""))
        size += each * (field is not None)
    budget.fits(size)
