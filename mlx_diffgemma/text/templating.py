"""Chat templates come with checkpoints of unknown origin: they are rendered within bounds.

Jinja's sandbox keeps a template from Python's internals, but not from the processor and the memory.
Nothing can stop an operation that has begun (threads have no timers, macOS no limit of memory), so
each one that may grow is measured before it runs, and steps between them are counted.
"""

import json
import re
import string
import types
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from functools import wraps
from itertools import islice
from typing import Any, cast

from jinja2 import nodes, pass_context
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import loopcontrols
from jinja2.runtime import Context, Undefined, markup_join
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from .rendering_budget import ITEM, Budget, budget_now

# Characters of a template: several times the longest in use, compiled in about a second.
MOST_SOURCE = 100_000

# Bits of a whole number, columns of an indent or digits to round to.
MOST_BITS, MOST_WIDTH = 1 << 16, 1000

# A date's form in a template: C libraries pad to any width that stands in one.
_DATE = re.compile(r"(?:[^%]|%[-_^#]?[A-Za-z%])*")

_MOST_DATE = 100

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

_COMPARING = "eq equalto == ne != gt greaterthan > ge >= lt lessthan < le <= in".split()

# Filters of our own that no template can name.
_STEP, _MADE, _CONCAT = "(step)", "(made)", "(concat)"


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
        self.filters["tojson"] = _guarded("tojson", _to_json)
        self.globals |= {"raise_exception": _refuse, "strftime_now": _today}
        for name in _COMPARING:
            tests: dict[str, Any] = self.tests
            self.tests[name] = _guarded(name, tests[name])

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        if len(source) > MOST_SOURCE:
            raise SecurityError(f"it has more than {MOST_SOURCE} characters")
        return cast(nodes.Template, _Guards().visit(super()._parse(source, name, filename)))

    def getitem(self, obj: Any, argument: Any) -> Any:
        if type(obj) is dict and argument in obj:
            return obj[argument]
        # Filters follow paths of any length with it, as in `map(attribute="real.real.real")`.
        budget_now.get().step()
        return super().getitem(obj, argument)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        budget = budget_now.get()
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
        budget = budget_now.get()
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
            _check_format(budget_now.get(), value.__self__, (*args, *kwargs.values()))
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
    """Return whether values are written down: nothing of them can be large."""
    return all(isinstance(part, nodes.Const) for part in parts)


def _filtered(node: nodes.Expr, name: str, at: nodes.Node) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=at.lineno)


# Jinja computes filters of constants while compiling, except of those that take the context.
@pass_context
def _step(context: Context, value: Any) -> Any:
    budget_now.get().step()
    return value


@pass_context
def _made(context: Context, value: Any) -> Any:
    return budget_now.get().made(value)


@pass_context
def _concatenated(context: Context, parts: list[Any]) -> str:
    """Compute what `~` means."""
    budget = budget_now.get()
    budget.step()
    budget.fits(sum(len(part) if type(part) is str else budget.size(part) for part in parts))
    text = markup_join(parts) if context.eval_ctx.autoescape else "".join(map(str, parts))
    return cast(str, budget.made(text))


def _merged(parts: Iterable[str]) -> str:
    """Join pieces of output, of the template or of a macro, as one string."""
    budget = budget_now.get()
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
    """Count a value that is about to become text."""
    return value if type(value) is str else budget_now.get().made(value)


def _guarded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Make a filter or test whose arguments and result are measured."""

    @wraps(function)
    def measured(*args: Any, **kwargs: Any) -> Any:
        budget = budget_now.get()
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


def _refuse(message: str) -> None:
    raise TemplateError(message)


def _today(form: str) -> str:
    if len(form) > _MOST_DATE or not _DATE.fullmatch(form):
        raise TemplateError(f"{form[:_MOST_DATE]!r} is not the form of a date")
    return datetime.now().strftime(form)


def _to_json(value: Any, indent: int | None = None) -> str:
    """Write JSON as templates expect it: not escaped for HTML, which Jinja's own filter does."""
    return json.dumps(value, ensure_ascii=False, indent=indent)
