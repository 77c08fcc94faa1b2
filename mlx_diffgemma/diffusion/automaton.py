"""Which sequences of tokens are allowed: patterns, their automaton, and the best allowed canvas.

A pattern (`Tokens`, `Characters`, `Exactly`, `Concat`, `Alternation`, `Repeat`) describes token
sequences as a regular expression describes strings. `compile_pattern` makes an automaton of it;
`Machine.plan` lays the automaton over a canvas; `plans.Plans` is what the denoising loop asks. This
module knows ids, not text.

The best allowed canvas under a step's logits is a shortest path through (position, state), found by
dynamic programming (Viterbi, 1967). Added Gumbel noise makes it a sample (perturb and MAP:
Papandreou & Yuille, 2011). So every canvas that a step shows or commits is allowed, at any step.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ..errors import Error

Ids = npt.NDArray[np.int64]

FAR = 1 << 30  # a distance no canvas has

# Seconds that compiling may take: the largest pattern within the limits of `Graph` needs about one,
# the rest is for a busy machine.
COMPILE_SECONDS = 10.0

# States, or steps from one to another, between two looks at the clock: well under a millisecond.
UNWATCHED = 256


class PatternError(Error):
    """A pattern that no canvas can follow."""


class PatternTimeout(PatternError):
    """A pattern that takes too long to compile."""


@dataclass(frozen=True)
class Deadline:
    """When to give up: `at` on the monotonic clock, `seconds` after the work began.

    `also` is called at each look at the clock, and may raise, as when a client has left.
    """

    seconds: float
    at: float
    also: Callable[[], None] | None = None

    @classmethod
    def within(
        cls, seconds: float, latest: float = math.inf, also: Callable[[], None] | None = None
    ) -> "Deadline":
        """So many seconds from now, or at `latest` on the monotonic clock if that is sooner."""
        now = time.monotonic()
        at = min(now + seconds, latest)
        return cls(max(at - now, 0.0), at, also)

    def check(self) -> None:
        """Do nothing in time.

        Raises:
            PatternTimeout: it is too late.
        """
        if self.also is not None:
            self.also()
        if time.monotonic() > self.at:
            raise PatternTimeout(
                f"compiling the pattern took longer than {self.seconds:.3g} seconds"
            )


# Patterns ----------------------------------------------------------------------------------------


class Pattern(Protocol):
    """A set of token sequences."""

    def build(self, graph: "Graph", start: int) -> int:
        """Add states and edges after `start`; the state that ends the pattern."""


@dataclass(frozen=True)
class Tokens:
    """One token out of a set, as sorted distinct ids."""

    ids: tuple[int, ...]

    def build(self, graph: "Graph", start: int) -> int:
        if not self.ids:
            raise PatternError("no token of this vocabulary fits")
        end = graph.state()
        graph.edge(start, graph.token_set(self.ids), end)
        return end


@dataclass(frozen=True)
class Exactly:
    """These tokens, one after another."""

    ids: tuple[int, ...]

    def build(self, graph: "Graph", start: int) -> int:
        for token in self.ids:
            start = Tokens((token,)).build(graph, start)
        return start


@dataclass(frozen=True)
class Characters:
    """Tokens that together have `least` to `most` characters; `most` None is any number.

    `by_length[n]` are the ids of n characters.
    """

    by_length: dict[int, tuple[int, ...]]
    least: int = 0
    most: int | None = None

    def build(self, graph: "Graph", start: int) -> int:
        count = self.least if self.most is None else self.most
        states = [graph.state() for _ in range(count + 1)]
        end = graph.state()
        graph.skip(start, states[0])
        for used, state in enumerate(states):
            for length, ids in self.by_length.items():
                after = used + length
                if self.most is None:
                    after = min(after, count)
                if after <= count:
                    graph.edge(state, graph.token_set(ids), states[after])
            if used >= self.least:
                graph.skip(state, end)
        return end


@dataclass(frozen=True)
class Concat:
    """Parts, one after another."""

    parts: tuple[Pattern, ...]

    def build(self, graph: "Graph", start: int) -> int:
        for part in self.parts:
            start = part.build(graph, start)
        return start


@dataclass(frozen=True)
class Alternation:
    """Any one of the options."""

    options: tuple[Pattern, ...]

    def build(self, graph: "Graph", start: int) -> int:
        end = graph.state()
        for option in self.options:
            graph.skip(option.build(graph, start), end)
        return end


@dataclass(frozen=True)
class Repeat:
    """A part `least` to `most` times; `most` None is any number of times."""

    part: Pattern
    least: int = 0
    most: int | None = None

    def build(self, graph: "Graph", start: int) -> int:
        for _ in range(self.least):
            start = self.part.build(graph, start)
        if self.most is None:
            hub = graph.state()
            graph.skip(start, hub)
            graph.skip(self.part.build(graph, hub), hub)
            return hub
        end = graph.state()
        graph.skip(start, end)
        for _ in range(self.most - self.least):
            start = self.part.build(graph, start)
            graph.skip(start, end)
        return end


# Automaton ---------------------------------------------------------------------------------------


@dataclass
class Graph:
    """States and edges under construction; an edge reads one token of a set, a skip reads none.

    Edges and skips are columns of numbers: as many tuples would make Python's garbage collector
    stop all threads for a noticeable time.
    """

    limit: int = 200_000
    deadline: Deadline = field(default_factory=lambda: Deadline.within(COMPILE_SECONDS))
    states: int = 0
    sources: list[int] = field(default_factory=list)
    token_sets: list[int] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)
    skips_from: list[int] = field(default_factory=list)
    skips_to: list[int] = field(default_factory=list)
    sets: list[tuple[int, ...]] = field(default_factory=list)
    _index: dict[tuple[int, ...], int] = field(default_factory=dict)
    _identity: dict[int, tuple[tuple[int, ...], int]] = field(default_factory=dict)

    def state(self) -> int:
        if self.states >= self.limit:
            raise PatternError(f"the pattern needs more than {self.limit:,} states")
        if self.states % UNWATCHED == 0:
            self.deadline.check()
        self.states += 1
        return self.states - 1

    def edge(self, source: int, token_set: int, target: int) -> None:
        if len(self.sources) >= self.limit:
            raise PatternError(f"the pattern needs more than {self.limit:,} edges")
        self.sources.append(source)
        self.token_sets.append(token_set)
        self.targets.append(target)

    def skip(self, source: int, target: int) -> None:
        self.skips_from.append(source)
        self.skips_to.append(target)

    def token_set(self, ids: tuple[int, ...]) -> int:
        # Hashing a large set is slow: the same object is looked up by identity first.
        known = self._identity.get(id(ids))
        if known is not None:
            return known[1]
        if ids not in self._index:
            self._index[ids] = len(self.sets)
            self.sets.append(ids)
        self._identity[id(ids)] = ids, self._index[ids]
        return self._index[ids]


def compile_pattern(pattern: Pattern, deadline: Deadline | None = None) -> "Machine":
    """The automaton of a pattern, without skips and without states that lead nowhere.

    Without a deadline it has `COMPILE_SECONDS`.

    Raises:
        PatternError: the pattern is too large.
        PatternTimeout: it took longer than it may.
    """
    graph = Graph() if deadline is None else Graph(deadline=deadline)
    first = graph.state()
    last = pattern.build(graph, first)
    edge_from, edges = _leaving(graph.sources, graph.states)
    # Keep only states that an edge enters, and give each the edges that skips lead it to.
    sources, token_sets, targets = list[int](), list[int](), list[int]()
    accepting: set[int] = set()
    seen, queue = {first}, deque([first])
    for state, closure in _closures(graph, queue):
        if last in closure:
            accepting.add(state)
        # Several ways may lead to the same edge.
        found: set[tuple[int, int]] = set()
        for member in closure:
            for edge in edges[edge_from[member] : edge_from[member + 1]]:
                found.add((graph.token_sets[edge], graph.targets[edge]))
        for token_set, target in found:
            if len(sources) >= graph.limit:
                raise PatternError(f"the pattern needs more than {graph.limit:,} edges")
            sources.append(state)
            token_sets.append(token_set)
            targets.append(target)
            if target not in seen:
                seen.add(target)
                queue.append(target)
    kept: Ids = np.array(sorted(seen), dtype=np.int64)

    def numbers(states: Iterable[int]) -> Ids:
        return np.searchsorted(kept, np.fromiter(states, dtype=np.int64)).astype(np.int64)

    source_of, target_of = numbers(sources), numbers(targets)
    set_of: Ids = np.array(token_sets, dtype=np.int64)
    order = np.lexsort((set_of, source_of, target_of))
    return Machine(
        states=len(kept),
        first=int(numbers([first])[0]),
        accepting=frozenset(numbers(accepting).tolist()),
        source=source_of[order],
        token_set=set_of[order],
        target=target_of[order],
        sets=tuple(graph.sets),
    )


def _leaving(sources: list[int], states: int) -> tuple[list[int], list[int]]:
    """Sort edges by source; give where each state's edges begin and end, and the list."""
    column = np.array(sources, dtype=np.int64)
    order = np.argsort(column, kind="stable")
    begins = np.searchsorted(column[order], np.arange(states + 1))
    return begins.tolist(), order.tolist()


def _closures(graph: Graph, queue: deque[int]) -> Iterator[tuple[int, set[int]]]:
    """Each state of a queue that may grow meanwhile, with the states that skips lead it to."""
    skip_from, skips = _leaving(graph.skips_from, graph.states)
    steps = 0
    while queue:
        state = queue.popleft()
        closure, stack = {state}, [state]
        while stack:
            steps += 1
            if steps % UNWATCHED == 0:
                graph.deadline.check()
            member = stack.pop()
            for skip in skips[skip_from[member] : skip_from[member + 1]]:
                target = graph.skips_to[skip]
                if target not in closure:
                    closure.add(target)
                    stack.append(target)
        yield state, closure


@dataclass(frozen=True, eq=False)
class Machine:
    """A nondeterministic automaton over token sets; edges are sorted by target."""

    states: int
    first: int
    accepting: frozenset[int]
    source: Ids
    token_set: Ids
    target: Ids
    sets: tuple[tuple[int, ...], ...]

    @cached_property
    def distance(self) -> Ids:
        """(states,) fewest tokens from a state to an accepting one."""
        # Edges are sorted by target.
        begins = np.searchsorted(self.target, np.arange(self.states + 1)).tolist()
        sources = self.source.tolist()
        distance = [FAR] * self.states
        queue = deque(self.accepting)
        for state in self.accepting:
            distance[state] = 0
        while queue:
            state = queue.popleft()
            for source in sources[begins[state] : begins[state + 1]]:
                if distance[source] == FAR:
                    distance[source] = distance[state] + 1
                    queue.append(source)
        return np.array(distance, dtype=np.int64)

    @property
    def shortest(self) -> int:
        """Fewest tokens that the pattern can have."""
        return int(self.distance[self.first])

    @cached_property
    def _members(self) -> list[frozenset[int]]:
        return [frozenset(ids) for ids in self.sets]

    def readable(self, token: int) -> list[bool]:
        """Of each token set, whether it has the token."""
        return [token in members for members in self._members]

    def advance(self, states: frozenset[int], tokens: Sequence[int]) -> frozenset[int]:
        """The states that reading tokens can lead to; empty if they are not allowed."""
        reached = np.zeros(self.states, dtype=bool)
        reached[list(states)] = True
        for token in tokens:
            readable = np.array(self.readable(token), dtype=bool)
            taken = self.target[reached[self.source] & readable[self.token_set]]
            reached = np.zeros(self.states, dtype=bool)
            reached[taken] = True
        return frozenset(np.flatnonzero(reached).tolist())

    def accepts(self, tokens: Sequence[int]) -> bool:
        """Tell whether the pattern allows exactly these tokens."""
        return bool(self.advance(frozenset([self.first]), tokens) & self.accepting)

    def union(self, sets: Iterable[int], vocab_size: int) -> npt.NDArray[np.bool_]:
        """(vocabulary,) which tokens one of the token sets has."""
        mask = np.zeros(vocab_size, dtype=bool)
        for each in sets:
            mask[list(self.sets[each])] = True
        return mask

    def sets_behind(self, states: frozenset[int], remaining: int) -> tuple[int, ...]:
        """The token sets of what comes next, where so many tokens may follow in all.

        Raises:
            PatternError: no allowed sequence is that short.
        """
        return self.plan(1, remaining, states).sets_at[0]

    def plan(self, length: int, remaining: int, states: frozenset[int] | None = None) -> "Plan":
        """Lay the automaton over a canvas of `length` tokens, starting in `states`.

        `remaining` is the number of tokens within which an accepting state must be reached; it
        may lie in a later canvas.

        Raises:
            PatternError: no allowed sequence is that short.
        """
        states = states or frozenset([self.first])
        shortest = min((int(self.distance[state]) for state in states), default=FAR)
        if shortest > remaining:
            raise PatternError(
                f"what is asked for needs at least {shortest} tokens, more than {remaining}"
                if shortest < FAR
                else "no text can follow the pattern"
            )
        live = np.zeros((length, len(self.source)), dtype=bool)
        reached = np.zeros(self.states, dtype=bool)
        reached[list(states)] = True
        left = remaining - 1 - np.arange(length)
        for i in range(length):
            # Once the budget is spent, only states that need nothing more may be entered.
            live[i] = reached[self.source] & (self.distance[self.target] <= max(left[i], 0))
            reached = np.zeros(self.states, dtype=bool)
            reached[self.target[live[i]]] = True
        # Backwards: drop what cannot reach the canvas's end.
        for i in range(length - 2, -1, -1):
            onward = np.zeros(self.states, dtype=bool)
            onward[self.source[live[i + 1]]] = True
            live[i] &= onward[self.target]
        if length and not live[0].any():
            raise PatternError("no text can follow the pattern")
        return Plan(self, states, live)


# Plans -------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Plan:
    """An automaton laid over one canvas: `live` (L, edges) are the edges a position may take."""

    machine: Machine
    states: frozenset[int]
    live: npt.NDArray[np.bool_]

    @cached_property
    def sets_at(self) -> list[tuple[int, ...]]:
        """The token sets that each position may draw from."""
        found: list[tuple[int, ...]] = []
        for row in self.live:
            used = np.zeros(len(self.machine.sets), dtype=bool)
            used[self.machine.token_set[row]] = True
            found.append(tuple(np.flatnonzero(used).tolist()))
        return found

    def forced(self) -> list[int | None]:
        """The token of each position that has no choice, else None."""
        found: list[int | None] = []
        for sets in self.sets_at:
            single = len(sets) == 1 and len(self.machine.sets[sets[0]]) == 1
            found.append(self.machine.sets[sets[0]][0] if single else None)
        return found

    def front(self, length: int) -> "Plan":
        """The plan of the first positions; what follows can still follow."""
        return Plan(self.machine, self.states, self.live[:length])

    def best_path(self, scores: npt.NDArray[np.float64]) -> list[int]:
        """The token set of each position on the path with the highest sum of (L, sets) scores."""
        machine = self.machine
        best = np.full(machine.states, -np.inf)
        best[list(self.states)] = 0.0
        # Of each position, the states that can be entered and the edge that each is entered by.
        back: list[tuple[Ids, Ids]] = []
        for row, live in zip(scores, self.live, strict=True):
            edges = np.flatnonzero(live)
            target = machine.target[edges]
            # Edges are sorted by target: those into one state are a run.
            first = np.ones(len(target), dtype=bool)
            np.not_equal(target[1:], target[:-1], out=first[1:])
            starts = np.flatnonzero(first)
            along = best[machine.source[edges]] + row[machine.token_set[edges]]
            top = np.maximum.reduceat(along, starts)
            ties = along == top[first.cumsum() - 1]
            winners = np.minimum.reduceat(np.where(ties, edges, FAR), starts)
            best.fill(-np.inf)
            entered = target[starts]
            best[entered] = top
            back.append((entered, winners))
        state = int(np.argmax(best))
        path: list[int] = []
        for entered, winners in reversed(back):
            edge = winners[np.searchsorted(entered, state)]
            path.append(int(machine.token_set[edge]))
            state = int(machine.source[edge])
        return path[::-1]
