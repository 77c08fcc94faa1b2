"""Count kernels and bytes of one denoising step, from the graphs that MLX is asked to run.

    python scripts/count_kernels.py                                     # ours
    python scripts/count_kernels.py --vlm-python /opt/v/vlm/bin/python  # and mlx-vlm, with ratios

Vocabulary and canvas are the real ones. Width and layers are cut; counts do not depend on the
width, and the cost of a layer is the difference of two layer counts. What the numbers mean:

- Each time arrays are about to be computed (`mx.eval`, `mx.async_eval`, `.item()`, `.tolist()`),
  the graph behind them is exported and counted, then computed as usual. A step is what is computed
  between two snapshots: here between the second and the third, where self-conditioning is on and
  nothing is special.
- A kernel is a primitive that is no view. On Metal `rms_norm`, `rope`, `dequantize` are one kernel
  each, while the CPU backend spells them out: they count as one. Attention counts as spelled out,
  which is what Metal does by default with heads of 256 and 512 (ml-explore/mlx#3658, #3885).
  Inside `mx.compile`, a chain of elementwise primitives is one kernel; that MLX splits those of
  more than 24 arrays is not followed (two kernels of a step of ours).
- Copies that MLX's Metal backend makes on the way are kernels, too, where the graph leaves no
  doubt: joining n arrays is n copies; a reshape is one if strides cannot tell the new shape;
  changing a part of an array first copies the array if its memory cannot be taken over; products,
  softmax and `rms_norm` copy operands whose items or rows do not follow each other as their kernels
  need it. Strides are followed through the graph, from those of arrays that were computed before.
- What a primitive launches by itself does not count: sums, sorts and products of some sizes take
  several kernels, and rotating may copy. So kernels are a lower bound, in the same way for all.
- Bytes are those that a kernel reads and writes. An array is of vocabulary size if its last axis
  has at least 1/64 of the vocabulary, or it has as many elements as the logits; the embedding
  matrix counts apart. Gathers read what they write.

Numbers are counted, not timed. This module needs MLX and numpy alone, so that it runs in mlx-vlm's
environment too; `install` must be called before anything imports `mlx.nn`.
"""

import argparse
import io
import json
import os
import pickle
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import wraps
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.uint8]
VIEWS = frozenset(
    "Reshape Transpose Broadcast BroadcastAxes Slice ExpandDims Squeeze Flatten Unflatten Split "
    "AsStrided View StopGradient Depends NumberOfElements Copy".split()
)
# What mx.compile merges, as in MLX's `is_fusable`.
FUSABLE = frozenset(
    "Abs Add And ArcCos ArcCosh ArcSin ArcSinh ArcTan ArcTan2 ArcTanh AsType BitwiseAnd "
    "BitwiseBinary BitwiseInvert BitwiseOr BitwiseXor Broadcast Ceil Conjugate Cos Cosh Divide "
    "Equal Erf ErfInv Exp Expm1 Floor FloorDivide Full Greater GreaterEqual Imag LeftShift Less "
    "LessEqual Log Log10 Log1p Log2 LogAddExp LogicalAnd LogicalNot LogicalOr Maximum Minimum "
    "Multiply Negative NotEqual Power Real Remainder RightShift Round Rsqrt Select Sigmoid Sign "
    "Sin Sinh Sqrt Square Subtract Tan Tanh".split()
)
# Real numbers of layers: 25 with a sliding window, 5 with full attention.
SLIDING, FULL = 25, 5


@dataclass
class Cost:
    """What was computed: kernels and views by name; vocabulary-sized arrays, and the table.

    `vocabulary_arrays` counts each reading and each writing of one, `syncs` how often the host had
    to wait for something.
    """

    kernels: Counter[str] = field(default_factory=Counter)
    views: Counter[str] = field(default_factory=Counter)
    vocabulary_arrays: int = 0
    vocabulary_read: int = 0
    vocabulary_written: int = 0
    table_read: int = 0
    syncs: int = 0

    def add(self, other: "Cost") -> None:
        for name, value in vars(other).items():
            if isinstance(value, Counter):
                getattr(self, name).update(value)
            else:
                setattr(self, name, getattr(self, name) + value)


@dataclass
class Region:
    """Arrays that went into a function and came out of it; `name` is None where MLX compiles it."""

    name: str | None
    inputs: list[mx.array]
    outputs: list[mx.array]


@dataclass
class Node:
    """A primitive of an exported graph; arrays are names. Only views know their arguments."""

    name: str
    inputs: list[str]
    outputs: list[str]
    arguments: list[Any] = field(default_factory=list)


class Form(NamedTuple):
    """Shape of an array, bytes of an item, and strides in items if it is computed already."""

    shape: tuple[int, ...]
    width: int
    strides: tuple[int, ...] | None = None


def arrays_in(tree: Any) -> list[mx.array]:
    """All arrays of nested lists, tuples and dicts."""
    if isinstance(tree, mx.array):
        return [tree]
    if isinstance(tree, dict):
        tree = tree.values()
    elif not isinstance(tree, list | tuple | set):
        return []
    return [array for part in tree for array in arrays_in(part)]


class Recorder:
    """Counts what is computed while it is on; `mark` ends a step."""

    def __init__(self) -> None:
        self.steps: list[Cost] = []
        self.vocabulary = self.logits = 0
        self._on = self._busy = False
        self._depth = 0
        self._regions: list[Region] = []

    def start(self, vocabulary: int, canvas: int) -> None:
        self.vocabulary, self.logits = vocabulary, vocabulary * canvas
        self.steps = [Cost()]
        self._on = True

    def stop(self) -> None:
        self._on = False
        self._regions.clear()

    def mark(self) -> None:
        """A step ends here."""
        self.steps.append(Cost())

    def install(self, on_item: Callable[[], None] | None = None) -> None:
        """Watch MLX's evaluations, and its functions that are one kernel or become one.

        `on_item` is called after each `.item()`.
        """
        mx.compile = self._compile
        for name in ("rms_norm", "rope"):
            setattr(mx.fast, name, self._region(name, getattr(mx.fast, name)))
        mx.dequantize = self._region("dequantize", mx.dequantize)
        mx.eval = self._watched(mx.eval)
        mx.async_eval = self._watched(mx.async_eval, waits=False)
        for name in ("item", "tolist", "__bool__", "__int__", "__float__", "__array__"):
            setattr(mx.array, name, self._watched(getattr(mx.array, name)))
        if on_item is not None:
            item, called = mx.array.item, on_item

            def marked(array: mx.array) -> Any:
                value = item(array)
                called()
                return value

            setattr(mx.array, "item", marked)  # noqa: B010 (mypy knows its type)

    def _watched(self, function: Callable[..., Any], waits: bool = True) -> Callable[..., Any]:
        @wraps(function)
        def called(*args: Any, **kwargs: Any) -> Any:
            if self._on:
                self._busy |= self._count(arrays_in(args))
                if waits and self._busy:
                    self.steps[-1].syncs += 1
                    self._busy = False
            return function(*args, **kwargs)

        return called

    def _compile(
        self,
        fun: Callable[..., Any],
        inputs: Any = None,
        outputs: Any = None,
        shapeless: Any = None,
    ) -> Callable[..., Any]:
        # Not compiled, so that shapes stay known; `_fused` says what MLX would have merged.
        return self._region(None, fun)

    def _region(self, name: str | None, function: Callable[..., Any]) -> Callable[..., Any]:
        def called(*args: Any, **kwargs: Any) -> Any:
            nested = name is None and self._depth > 0
            self._depth += name is None
            try:
                result = function(*args, **kwargs)
            finally:
                self._depth -= name is None
            if self._on and not nested:
                self._regions.append(Region(name, arrays_in([args, kwargs]), arrays_in(result)))
            return result

        return called

    def _count(self, wanted: list[mx.array]) -> bool:
        """Add what computing these arrays takes to the current step; whether that is anything."""
        extra = [a for region in self._regions for a in (*region.inputs, *region.outputs)]
        nodes, shapes, names = exported([*wanted, *extra])
        made = {name: node for node in nodes for name in node.outputs}
        goals, named = names[: len(wanted)], iter(names[len(wanted) :])
        regions = []
        for region in self._regions:
            ins = [next(named) for _ in region.inputs]
            outs = [next(named) for _ in region.outputs]
            regions.append((region, ins, outs))
        # A region that has been computed is over.
        self._regions = [r for r, _, outs in regions if any(out in made for out in outs)]
        needed: set[int] = set()
        stack = [made[name] for name in goals if name in made]
        while stack:
            node = stack.pop()
            if id(node) not in needed:
                needed.add(id(node))
                stack += [made[name] for name in node.inputs if name in made]
        nodes = [node for node in nodes if id(node) in needed]
        if not nodes:
            return False
        groups = grouped(nodes, made, [(r.name, ins, outs) for r, ins, outs in regions])
        memory = Memory(nodes, shapes, groups, set(goals))
        normed = {
            f"{region.name} {number}": ins[0]
            for number, (region, ins, _) in enumerate(regions)
            if region.name == "rms_norm"
        }
        cost = self._cost(nodes, shapes, groups, set(goals), memory, normed)
        self.steps[-1].add(cost)
        return True

    def _cost(
        self,
        nodes: list[Node],
        shapes: dict[str, Form],
        groups: dict[int, str],
        goals: set[str],
        memory: "Memory",
        normed: dict[str, str],
    ) -> Cost:
        cost = Cost()
        size = {name: prod(form.shape) for name, form in shapes.items()}
        table = {
            name
            for name, (shape, *_) in shapes.items()
            if len(shape) == 2 and shape[0] == self.vocabulary
        }
        # What a view shows is read, and no more than what it is a view of.
        behind = {name: size[name] * form.width for name, form in shapes.items()}
        group_of = {name: groups.get(id(node)) for node in nodes for name in node.outputs}
        for node in nodes:
            if all(name in table or size[name] == 1 for name in node.inputs) and any(
                name in table for name in node.inputs
            ):
                table.update(node.outputs)
            elif node.name not in VIEWS or node.name == "Broadcast":
                table.difference_update(node.outputs)
            if node.name in VIEWS and groups.get(id(node)) is None:
                for name in node.outputs:
                    behind[name] = min(behind[name], behind[node.inputs[0]])
        readers: dict[str, set[str | int]] = {}
        for node in nodes:
            for name in node.inputs:
                readers.setdefault(name, set()).add(groups.get(id(node)) or id(node))
        seen: set[tuple[str, str]] = set()
        counted: set[str] = set()
        for node in nodes:
            group = groups.get(id(node))
            if group is None and node.name in VIEWS and id(node) not in memory.copied:
                cost.views[node.name] += 1
                continue
            first: list[str] = []  # what is copied before the kernel starts
            if group is None:
                if id(node) in memory.copied:
                    cost.kernels["Copy"] += 1
                else:
                    cost.kernels[node.name] += 1
                    first = memory.rearranged(node)
                if node.name == "Concatenate":
                    joined = sum(size[name] > 0 for name in node.inputs)
                    cost.kernels += Counter(Copy=joined - 1)
                cost.kernels += Counter(Copy=int(memory.overwritten(node)))
            elif group not in counted:
                counted.add(group)
                cost.kernels[group.split(" ")[0]] += 1
                first = memory.unfit(normed[group]) if group in normed else []
            cost.kernels += Counter(Copy=len(first))
            for name in first:
                if self._is_vocabulary(shapes[name].shape) and name not in table:
                    cost.vocabulary_arrays += 2
                    cost.vocabulary_read += behind[name]
                    cost.vocabulary_written += size[name] * shapes[name].width
            written = [
                name
                for name in node.outputs
                if group is None or name in goals or readers.get(name, set()) - {group}
            ]
            read = [name for name in node.inputs if group is None or group_of.get(name) != group]
            if group is not None:  # a kernel reads an array once, however often it is named
                read = [name for name in dict.fromkeys(read) if (group, name) not in seen]
                seen.update((group, name) for name in read)
            for name in written:
                if self._is_vocabulary(shapes[name].shape) and name not in table:
                    cost.vocabulary_arrays += 1
                    cost.vocabulary_written += behind[name]
            for name in read:
                gathers = node.name in ("Gather", "GatherAxis")
                if name in table:
                    cost.table_read += behind[node.outputs[0]] if gathers else behind[name]
                elif self._is_vocabulary(shapes[name].shape):
                    cost.vocabulary_arrays += 1
                    cost.vocabulary_read += behind[node.outputs[0]] if gathers else behind[name]
        return cost

    def _is_vocabulary(self, shape: tuple[int, ...]) -> bool:
        return prod(shape) >= self.logits or (
            bool(shape) and shape[-1] >= self.vocabulary // 64 and prod(shape) > shape[-1]
        )


class Memory:
    """How MLX's Metal backend lays arrays out, and what it copies because of that.

    An array is a numpy array of bytes with the same strides; nothing ever touches its memory. An
    axis of length 1 has no stride worth the name, so it never is the reason for a copy.
    """

    def __init__(
        self, nodes: list[Node], forms: dict[str, Form], groups: dict[int, str], goals: set[str]
    ):
        self._forms, self._groups = forms, groups
        self._arrays: dict[str, Array] = {}
        self._owner: dict[str, str] = {}  # whose memory an array shows; its own name by default
        self._made = {name: node for node in nodes for name in node.outputs}
        self.copied: set[int] = set()  # views that cannot be views, by id
        for node in nodes:
            self._lay(node)
        self._held = {self._owner.get(name, name) for name in goals}
        self._readers: dict[str, list[Node]] = {}
        for node in nodes:
            if node.name not in VIEWS or id(node) in self.copied:
                for name in node.inputs:
                    self._readers.setdefault(self._owner.get(name, name), []).append(node)

    def _array(self, name: str) -> Array:
        if name not in self._arrays:
            self._arrays[name] = blank(self._forms[name].shape, self._forms[name].strides)
        return self._arrays[name]

    def _lay(self, node: Node) -> None:
        inputs = [self._array(name) for name in node.inputs]
        shapes = [self._forms[name].shape for name in node.outputs]
        if node.name in VIEWS:
            widths = [self._forms[name].width for name in (node.inputs[0], node.outputs[0])]
            views = shown(node, inputs, shapes, widths[0], widths[1])
            if views is not None:
                self._arrays.update(zip(node.outputs, views, strict=True))
                for i, name in enumerate(node.outputs):
                    source = node.inputs[i if node.name == "Depends" else 0]
                    self._owner[name] = self._owner.get(source, source)
                return
            if id(node) not in self._groups:
                self.copied.add(id(node))
        elif node.name in FUSABLE - {"Full"} and inputs:
            self._arrays[node.outputs[0]] = elementwise(inputs, shapes[0])
        elif node.name.startswith("SliceUpdate") and full(inputs[0]):
            self._arrays[node.outputs[0]] = blank(shapes[0], inputs[0].strides)
        # All else is written row by row, as `_array` has it.

    def rearranged(self, node: Node) -> list[str]:
        """The operands that a product or a softmax has copied, since its kernel needs rows."""
        arrays = [self._array(name) for name in node.inputs]
        match node.name:
            case "Matmul" | "GatherMM":
                a, b = arrays[:2]
                fits = [in_rows_or_columns(a, a.shape[-2] == 1)]
                fits += [in_rows_or_columns(b, b.shape[-1] == 1)]
            case "QuantizedMatmul":
                fits = [in_rows(array) for array in arrays]
            case "GatherQMM":
                fits = [in_rows(array) for array in arrays[:-2]]  # all but indices
            case "Softmax":
                fits = [dense(arrays[0]) and step_is(arrays[0], -1, 1)]
            case _:
                fits = []
        return [name for name, fit in zip(node.inputs, fits, strict=False) if not fit]

    def unfit(self, name: str) -> list[str]:
        """The array again, if `rms_norm` has to copy it."""
        array = self._array(name)
        fits = dense(array) and step_is(array, -1, 1)
        if array.ndim > 1:
            fits = fits and (array.strides[-2] == 0 or step_is(array, -2, array.shape[-1]))
        return [] if fits else [name]

    def overwritten(self, node: Node) -> bool:
        """Whether a node changes a part of an array and has to copy the array first.

        What it depends on has read the array before and is done with it. (On Metal only once the
        command buffer is: there may be a copy more, which is a question of time.)
        """
        kind = node.name.split(" ")[0]
        if kind not in ("Scatter", "ScatterAxis", "SliceUpdate"):
            return False
        base, root = self._array(node.inputs[0]), self._owner.get(node.inputs[0], node.inputs[0])
        fits = full(base) if kind == "SliceUpdate" else base.flags.c_contiguous
        if spread(base) == 1 or not fits:
            return True  # one item everywhere is written out, other layouts are put in order
        if root in self._held or any(self._owner.get(i, i) == root for i in node.inputs[1:]):
            return True
        others = [reader for reader in self._readers[root] if reader is not node]
        if root not in self._made:
            # Who else holds an array that was there before is not known. Buffers of keys and
            # values are made to be taken over, which a test of our cache checks; others are not.
            return kind != "SliceUpdate" or bool(others)
        # MLX does not hand on a buffer that is much too large.
        spare = spread(self._array(root)) * self._forms[root].width
        if spare > prod(base.shape) * self._forms[node.inputs[0]].width + 16384:
            return True
        done = self._before(node)
        over = {self._groups.get(each) for each in done} - {None}
        return any(id(o) not in done and self._groups.get(id(o)) not in over for o in others)

    def _before(self, node: Node) -> set[int]:
        """Nodes that a node depends on, by id."""
        done: set[int] = set()
        stack = [self._made[name] for name in node.inputs if name in self._made]
        while stack:
            each = stack.pop()
            if id(each) not in done:
                done.add(id(each))
                stack += [self._made[name] for name in each.inputs if name in self._made]
        return done


def blank(shape: tuple[int, ...], strides: tuple[int, ...] | None = None) -> Array:
    """An array with these strides; without any, rows follow each other."""
    if strides is None or not prod(shape) or min(strides, default=0) < 0:
        return np.empty(shape, np.uint8)
    last = sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
    return np.ndarray(shape, np.uint8, np.empty(last + 1, np.uint8), strides=strides)


def shown(
    node: Node, inputs: list[Array], shapes: list[tuple[int, ...]], width: int, other: int
) -> list[Array] | None:
    """What a view shows of arrays; None if it must copy. Items have `width` bytes, then `other`."""
    array, shape = inputs[0], shapes[0]
    if not array.size or not prod(shape):
        return [blank(each) for each in shapes]
    match node.name:
        case "Transpose":
            return [array.transpose(node.arguments[0])]
        case "Slice":
            parts = []
            for first, step, n in zip(node.arguments[0], node.arguments[2], shape, strict=True):
                end = first + step * n
                parts.append(slice(first, None if end < 0 else end, step))
            return [array[tuple(parts)]]
        case "Split":
            return list(np.split(array, node.arguments[0], node.arguments[1]))
        case "Broadcast" | "BroadcastAxes":
            return [np.broadcast_to(array, shape)]
        case "AsStrided":
            _, strides, offset = node.arguments
            return [np.ndarray(shape, np.uint8, array.reshape(-1)[offset:], strides=strides)]
        case "Reshape" | "Flatten" | "Unflatten" | "ExpandDims" | "Squeeze":
            try:
                return [np.reshape(array, shape, copy=False)]
            except ValueError:
                return None
        case "View" if width != other:
            fits = array.flags.c_contiguous or (other < width and array.strides[-1] == 1)
            return [blank(shape)] if fits else None
        case "NumberOfElements":
            return [blank(shape)]
        case _:
            return inputs[: len(shapes)]


def elementwise(inputs: list[Array], shape: tuple[int, ...]) -> Array:
    """The layout of what an elementwise kernel writes: if it can be, that of what it reads."""
    wide = [array for array in inputs if spread(array) > 1]
    if not wide:
        return blank(shape, inputs[0].strides)
    alone = len(inputs) < 3 and len(wide) == 1 and dense(wide[0])
    if alone or all(array.flags.f_contiguous for array in wide):
        return blank(shape, wide[0].strides)
    return blank(shape)


def spread(array: Array) -> int:
    """Items in memory: those that a broadcast repeats count once."""
    return prod(n for n, step in zip(array.shape, array.strides, strict=True) if step)


def dense(array: Array) -> bool:
    """Whether an array has no holes, in whatever order its axes lie."""
    size = 1
    for step, n in sorted(zip(array.strides, array.shape, strict=True)):
        if n > 1 and step:
            if step != size:
                return False
            size *= n
    return True


def full(array: Array) -> bool:
    """Whether an array has no holes and repeats nothing."""
    return dense(array) and spread(array) == array.size


def step_is(array: Array, axis: int, step: int) -> bool:
    """Whether an axis has this stride, or only one place, where any stride will do."""
    return array.strides[axis] == step or array.shape[axis] == 1


def in_rows(array: Array) -> bool:
    """Whether rows follow each other in each matrix of a stack."""
    return step_is(array, -1, 1) and (array.ndim < 2 or step_is(array, -2, array.shape[-1]))


def in_rows_or_columns(array: Array, vector: bool) -> bool:
    """Whether rows, or columns, have their items side by side; a vector's must also be close."""
    rows, columns = array.shape[-2:]
    plain = step_is(array, -1, 1) and (not vector or step_is(array, -2, columns))
    return plain or (step_is(array, -2, 1) and (not vector or step_is(array, -1, rows)))


def exported(
    arrays: list[mx.array],
) -> tuple[list[Node], dict[str, Form], list[str]]:
    """The graph behind arrays: nodes in order, the form of each array by name, and their names.

    What is computed already is a constant and has no node. `mx.export_to_dot` knows the nodes but
    no shapes; `mx.export_function` knows shapes, but merges equal nodes, in the graph itself. So
    the latter runs in a forked process, and both graphs are walked side by side.
    """
    nodes, names = drawn(arrays)
    theirs, shape_of, others = in_fork(lambda: traced(arrays))
    made = {name: node for node in nodes for name in node.outputs}
    other_made = {name: node for node in theirs for name in node.outputs}
    shapes: dict[str, Form] = {}
    pairs = list(zip(names, others, strict=True))
    while pairs:
        mine, other = pairs.pop()
        if mine in shapes:
            continue
        shapes[mine] = shape_of[other]
        if mine in made:
            node = made[mine]
            if node.name == "StopGradient":  # which the export leaves out
                pairs.append((node.inputs[0], other))
                continue
            match = other_made[other]
            node.arguments = match.arguments
            pairs += zip(node.inputs, match.inputs, strict=True)
            pairs += zip(node.outputs, match.outputs, strict=True)
    return nodes, shapes, names


def drawn(arrays: list[mx.array]) -> tuple[list[Node], list[str]]:
    """Nodes of the graph as MLX draws it, and the name of each array."""

    def draw(numbers: list[int]) -> list[str]:
        text = io.StringIO()
        mx.export_to_dot(text, *arrays, **{f"a{i}": arrays[i] for i in numbers})
        return text.getvalue().splitlines()

    lines = draw(list(range(len(arrays))))
    nodes: dict[str, Node] = {}
    for line in lines:
        if found := re.match(r'\{ (\d+) \[label ="(View|[^"]+)', line):
            nodes[found[1]] = Node(found[2], [], [])
        elif found := re.match(r'"(\w+)" -> (\d+)', line):
            nodes[found[2]].inputs.append(found[1])
        elif found := re.match(r'(\d+) -> "(\w+)"', line):
            nodes[found[1]].outputs.append(found[2])
    # Two arrays may be one: only one of its names was drawn. Draw again to see which it is.
    names = {f"a{i}": f"a{i}" for i in range(len(arrays))}
    known = set(re.findall(r'"(a\d+)"', "\n".join(lines)))
    missing = [i for i in range(len(arrays)) if f"a{i}" not in known]
    while missing:
        found_now = {}
        for old, new in zip(lines, draw(missing), strict=True):
            for mine, other in zip(
                re.findall(r'"(\w+)"', old), re.findall(r'"(\w+)"', new), strict=True
            ):
                found_now[other] = mine
        left = [i for i in missing if f"a{i}" not in found_now]
        names |= {f"a{i}": found_now[f"a{i}"] for i in missing if i not in left}
        if left == missing:
            break  # arrays computed already that nothing here reads
        missing = left
    return list(nodes.values()), [names[f"a{i}"] for i in range(len(arrays))]


def traced(
    arrays: list[mx.array],
) -> tuple[list[Node], dict[str, Form], list[str]]:
    """As `exported`, with equal nodes merged."""
    nodes: list[Node] = []
    shapes: dict[str, Form] = {}
    names: list[str] = []
    strides: dict[str, tuple[int, ...]] = {}

    def take(event: dict[str, Any]) -> None:
        if event["type"] == "constants":
            for name, array in event["constants"]:
                view = memoryview(array)
                strides[name] = tuple(step // view.itemsize for step in view.strides)
            return
        if event["type"] == "outputs":
            names.extend(name for name, _, _ in event["outputs"])
            known = event["outputs"]
        elif event["type"] == "primitive":
            inputs, outputs = event["inputs"], event["outputs"]
            # Other arguments do not matter, and a type goes through no pipe.
            told = event["arguments"] if event["name"] in VIEWS - {"View"} else []
            nodes.append(
                Node(event["name"], [n for n, *_ in inputs], [n for n, *_ in outputs], told)
            )
            known = [*inputs, *outputs]
        else:
            return
        shapes.update(
            {
                name: Form(tuple(shape), dtype.size, strides.get(name))
                for name, shape, dtype in known
            }
        )

    mx.export_function(take, lambda: arrays)
    return nodes, shapes, names


def in_fork(function: Callable[[], Any]) -> Any:
    """What a function answers, called in a copy of this process."""
    mx.synchronize()
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            with os.fdopen(writing, "wb") as pipe:
                pickle.dump(function(), pipe)
            os._exit(0)
        except BaseException as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            os._exit(1)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        answer = pipe.read()
    if os.waitpid(child, 0)[1]:
        raise SystemExit("the graph could not be exported")
    return pickle.loads(answer)


def grouped(
    nodes: list[Node],
    made: dict[str, Node],
    regions: list[tuple[str | None, list[str], list[str]]],
) -> dict[int, str]:
    """Node -> the kernel that it is part of, by id; nodes that are a kernel alone are missing.

    Named regions are one kernel. In compiled ones an elementwise node joins the node that reads it,
    if nobody else does.
    """
    needed = {id(node) for node in nodes}
    groups: dict[int, str] = {}
    compiled: dict[int, int] = {}
    ordered = sorted(enumerate(regions), key=lambda pair: pair[1][0] is None)
    for number, (name, ins, outs) in ordered:
        inside: list[Node] = []
        stack = [made[out] for out in outs if out in made]
        while stack:
            node = stack.pop()
            if id(node) in needed and node not in inside:
                inside.append(node)
                stack += [made[i] for i in node.inputs if i in made and i not in ins]
        for node in inside:
            if name is not None:
                groups.setdefault(id(node), f"{name} {number}")
            elif id(node) not in groups:
                compiled.setdefault(id(node), number)
    readers: dict[str, list[Node]] = {}
    for node in nodes:
        for name in node.inputs:
            readers.setdefault(name, []).append(node)
    for node in reversed(nodes):
        if id(node) not in compiled or node.name not in FUSABLE:
            continue
        users = [user for name in node.outputs for user in readers.get(name, [])]
        theirs = {groups.get(id(user)) for user in users}
        same = all(compiled.get(id(user)) == compiled[id(node)] for user in users)
        if users and same and len(theirs) == 1 and None not in theirs:
            groups[id(node)] = str(theirs.pop())
        else:
            groups[id(node)] = f"compiled {id(node)}"
    return groups


def run_ours(directory: str, recorder: Recorder) -> Cost:
    """The third step of mlx-diffgemma."""
    recorder.install()
    from mlx_diffgemma import PromptCache, load
    from mlx_diffgemma.diffusion.decoding import drive
    from mlx_diffgemma.diffusion.denoise import denoise
    from mlx_diffgemma.diffusion.draws import SeededDraws

    # On a CPU the default is float32, whatever is stored.
    dtype = json.loads((Path(directory) / "config.json").read_text())["dtype"]
    model, _ = load(directory, dtype=dtype)
    prompt_cache = PromptCache(model)
    prompt_cache.read(list(range(100, 164)))
    draws = SeededDraws(0, model.config.vocab_size)
    config = model.generation.override(max_denoising_steps=4)
    recorder.start(model.config.vocab_size, model.config.canvas_length)
    for snapshot in drive(model, denoise(model, prompt_cache.cache, config, draws)):
        recorder.mark()
        if snapshot.step == 3:
            break
    recorder.stop()
    return recorder.steps[2]


def run_vlm(directory: str, recorder: Recorder) -> Cost:
    """The third step of mlx-vlm, through its public generator."""
    recorder.install(on_item=recorder.mark)
    from vlm_worker import load, stream

    model, processor = load(directory)
    text = model.config.text_config
    recorder.start(text.vocab_size, model.config.canvas_length)
    for _ in stream(model, processor, list(range(100, 164)), steps=4):
        pass
    recorder.stop()
    # Its loop waits once a step, from the second step on; other waits have no argmax in them.
    steps = [cost for cost in recorder.steps if cost.kernels["ArgReduce"]]
    return steps[1]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--vocabulary", type=int, default=262144)
    parser.add_argument(
        "--kind",
        choices=("float32", "bfloat16", "quantized"),
        default="float32",
        help="of weights; quantized is the published 4-bit layout",
    )
    parser.add_argument("--layers", type=int, help="count this many, instead of a real model's 30")
    parser.add_argument("--vlm-python", help="Python of an environment with mlx-vlm")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--run", choices=("ours", "vlm"), help=argparse.SUPPRESS)
    parser.add_argument("--directory", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        run = run_ours if arguments.run == "ours" else run_vlm
        print(json.dumps(vars(run(arguments.directory, Recorder()))))
        return
    systems = {"ours": sys.executable}
    if arguments.vlm_python:
        systems["vlm"] = arguments.vlm_python
    # The cost of a layer does not depend on the vocabulary: one run with the real one is enough.
    sizes = [(1, arguments.vocabulary), (1, 4096), (2, 4096), (7, 4096)]
    if arguments.layers:
        sizes = [(arguments.layers, arguments.vocabulary)]
    found: dict[str, list[Cost]] = {name: [] for name in systems}
    with tempfile.TemporaryDirectory() as folder:
        from small_checkpoint import write_small

        for number, (layers, vocabulary) in enumerate(sizes):
            place = Path(folder) / str(number)
            directory = write_small(place, layers, arguments.hidden, vocabulary, arguments.kind)
            for name, python in systems.items():
                found[name].append(count_in_process(python, name, directory))
    results = {
        name: costs[0] if arguments.layers else whole(*costs) for name, costs in found.items()
    }
    if arguments.json:
        print(json.dumps({name: vars(cost) for name, cost in results.items()}))
        return
    title = f"{arguments.layers or SLIDING + FULL} layers"
    for name, cost in results.items():
        report(f"{name}, {title}", cost)
        if not arguments.layers:
            _, one, two, _ = found[name]
            print(f"  a sliding layer: {two.kernels.total() - one.kernels.total()} kernels")
    if len(results) == 2:
        ours, theirs = results["ours"], results["vlm"]
        print(
            f"ours / vlm: kernels {ours.kernels.total() / theirs.kernels.total():.2f}, "
            f"without copies {primitives(ours) / primitives(theirs):.2f}, "
            f"vocabulary bytes {total(ours) / total(theirs):.2f}"
        )


def count_in_process(python: str, run: str, directory: Path) -> Cost:
    """Count in a process of its own: each system has its own environment."""
    command = [python, __file__, "--run", run, "--directory", str(directory)]
    made = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    values = json.loads(made.stdout.splitlines()[-1])
    return Cost(**{k: Counter(v) if isinstance(v, dict) else v for k, v in values.items()})


def whole(real: Cost, one: Cost, two: Cost, seven: Cost) -> Cost:
    """The real model's cost, of one layer with its vocabulary and of layers with a small one.

    One layer has full attention; two are a sliding and a full one, seven five and two.
    """
    made = replace(real, kernels=Counter(real.kernels), views=Counter(real.views))
    for name in ("kernels", "views"):
        first, second, third = (getattr(cost, name) for cost in (one, two, seven))
        for key in {**first, **second, **third}:
            sliding = second[key] - first[key]
            full = third[key] - first[key] - 5 * sliding
            getattr(made, name)[key] += SLIDING * sliding + (FULL - 1) * full
    return made


def total(cost: Cost) -> int:
    """Bytes of vocabulary-sized arrays that a step moves."""
    return cost.vocabulary_read + cost.vocabulary_written


def primitives(cost: Cost) -> int:
    """Kernels that are a primitive of the graph, or a chain of them."""
    return cost.kernels.total() - cost.kernels["Copy"]


def report(title: str, cost: Cost) -> None:
    print(
        f"{title}: {cost.kernels.total()} kernels ({primitives(cost)} without copies), "
        f"{cost.views.total()} views, {cost.syncs} syncs"
    )
    print("  " + ", ".join(f"{name} {n}" for name, n in cost.kernels.most_common() if n))
    print("  views: " + ", ".join(f"{name} {n}" for name, n in cost.views.most_common() if n))
    print(
        f"  vocabulary: {cost.vocabulary_arrays} arrays, {cost.vocabulary_read / 1e9:.2f} GB read, "
        f"{cost.vocabulary_written / 1e9:.2f} GB written; table {cost.table_read / 1e6:.0f} MB read"
    )


if __name__ == "__main__":
    main()
