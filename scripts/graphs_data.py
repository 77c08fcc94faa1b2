"""Make examples of graphs in three colours to fine-tune on, and count what `fill` gets right.

    python scripts/graphs_data.py make DIR
    python scripts/graphs_data.py score DIR --model MODEL --adapter A

The prompt has the edges of a connected graph as a matrix. The canvas is that matrix with colours:
the node's own in its own cell, its neighbours' in the cells of their edges. A graph is on the side
of its class: graphs that differ in the numbers of their nodes alone are on one side.

DIR/cases.jsonl has test graphs with some colours pinned, DIR/valid-cases.jsonl others to choose by.
A case is right where `fill` keeps the pins, a node has one colour everywhere, and no edge joins
equal colours.
"""

import argparse
import json
import random
import re
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import combinations, islice, permutations, product
from pathlib import Path

from splits import Example, example, side, write

COLOURS = "123"

HOLE = f"{{{{:{'|'.join(COLOURS)}}}}}"

Edges = tuple[tuple[int, int], ...]  # of nodes from 1 on, the lower number first


@cache
def classes(nodes: int) -> dict[Edges, Edges]:
    """Connected graphs that three colours suffice for, and the first graph of each one's class."""
    pairs = list(combinations(range(1, nodes + 1), 2))
    renamings = [dict(enumerate(order, 1)) for order in permutations(range(1, nodes + 1))]
    moved = [[pairs.index(_pair(names[a], names[b])) for a, b in pairs] for names in renamings]
    first: dict[int, int] = {}
    for bits in range(1 << len(pairs)):
        if bits in first:
            continue
        own = [i for i in range(len(pairs)) if bits >> i & 1]
        for place in moved:
            first.setdefault(sum(1 << place[i] for i in own), bits)

    def edges(bits: int) -> Edges:
        return tuple(pair for i, pair in enumerate(pairs) if bits >> i & 1)

    kept = {bits for bits in set(first.values()) if _fits(edges(bits), nodes)}
    return {edges(bits): edges(kind) for bits, kind in first.items() if kind in kept}


def _pair(a: int, b: int) -> tuple[int, int]:
    return min(a, b), max(a, b)


def _fits(edges: Edges, nodes: int) -> bool:
    """Whether a graph is connected and has a colouring."""
    reached = {1}
    for _ in range(nodes):
        reached |= {b for pair in edges for b in pair if reached & set(pair)}
    return len(reached) == nodes and bool(colourings(edges, nodes))


@cache
def colourings(edges: Edges, nodes: int) -> list[str]:
    """All proper colourings, a letter a node."""
    return [
        "".join(letters)
        for letters in product(COLOURS, repeat=nodes)
        if all(letters[a - 1] != letters[b - 1] for a, b in edges)
    ]


def graphs(rng: random.Random, wanted: str, nodes: int) -> Iterator[Edges]:
    """Graphs of one side, their classes equally often."""
    by_class: dict[Edges, list[Edges]] = {}
    for edges, kind in classes(nodes).items():
        if side(str(kind)) == wanted:
            by_class.setdefault(kind, []).append(edges)
    kinds = sorted(by_class)
    while True:
        yield rng.choice(by_class[rng.choice(kinds)])


def prompt_of(edges: Edges, nodes: int) -> str:
    """The matrix of the edges, a dot where there is none."""
    joined = {*edges, *((b, a) for a, b in edges)}
    numbers = range(1, nodes + 1)
    return "\n".join("".join("x" if (a, b) in joined else "." for b in numbers) for a in numbers)


def canvas_of(edges: Edges, colours: Sequence[str]) -> str:
    """The matrix with the colour of each node in its own cell and in those of edges to it."""
    joined = {*edges, *((b, a) for a, b in edges)}
    numbers = range(1, len(colours) + 1)
    return "\n".join(
        "".join(colours[b - 1] if a == b or (a, b) in joined else "." for b in numbers)
        for a in numbers
    )


def examples(rng: random.Random, wanted: str, nodes: int) -> Iterator[Example]:
    """Graphs of one side with one of their colourings."""
    for edges in graphs(rng, wanted, nodes):
        colours = rng.choice(colourings(edges, nodes))
        yield example(prompt_of(edges, nodes), canvas_of(edges, colours))


def cases(rng: random.Random, wanted: str, nodes: int, pinned: int) -> Iterator[dict[str, object]]:
    """Graphs of one side as templates: the colours of some nodes are given, from a colouring."""
    for edges in graphs(rng, wanted, nodes):
        colours = rng.choice(colourings(edges, nodes))
        given = rng.sample(range(nodes), pinned)
        pins = [colour if i in given else HOLE for i, colour in enumerate(colours)]
        yield {"prompt": prompt_of(edges, nodes), "template": canvas_of(edges, pins)}


def is_right(case: dict[str, str], text: str) -> bool:
    """Whether a text is the template with one colour a node, and another at the ends of an edge."""
    rows = text.split("\n")
    if not re.fullmatch(re.escape(case["template"]).replace(re.escape(HOLE), "[123]"), text):
        return False
    for node, column in enumerate(zip(*rows, strict=True)):
        own = rows[node][node]
        if set(column) - {".", own} or rows[node].count(own) > 1:
            return False
    return True


def score(given: argparse.Namespace) -> None:
    """Fill the cases of a file, and count."""
    from mlx_diffgemma import fill, load

    model, tokenizer = load(given.model, adapter=given.adapter)
    lines = (given.directory / f"{given.cases}.jsonl").read_text().splitlines()[: given.limit]
    right = steps = 0
    for number, line in enumerate(lines, 1):
        case = json.loads(line)
        done = fill(model, tokenizer, case["template"], prompt=case["prompt"], seed=number)
        right += is_right(case, done.text)
        steps += done.steps
    print(
        f"{right} of {len(lines)} are right ({100 * right / len(lines):.1f} %), "
        f"{steps / len(lines):.1f} steps each"
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["make", "score"])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--nodes", type=int, default=6)
    parser.add_argument("--pinned", type=int, default=2, help="colours that a case gives")
    parser.add_argument("--train", type=int, default=8000, help="examples to train on")
    parser.add_argument("--test", type=int, default=200, help="examples, and cases, of other sides")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", help="that is asked")
    parser.add_argument("--adapter", help="of the model that is asked")
    parser.add_argument("--cases", default="cases", choices=["cases", "valid-cases"])
    parser.add_argument("--limit", type=int, help="most cases that are asked")
    return parser.parse_args()


def main() -> None:
    given = arguments()
    if given.what == "score":
        score(given)
        return
    rng, nodes = random.Random(given.seed), given.nodes
    counts = {"train": given.train, "valid": given.test, "test": given.test}
    files = {name: [*islice(examples(rng, name, nodes), n)] for name, n in counts.items()}
    pinned = {
        "cases": [*islice(cases(rng, "test", nodes, given.pinned), given.test)],
        "valid-cases": [*islice(cases(rng, "valid", nodes, given.pinned), given.test)],
    }
    write(given.directory, {**files, **pinned})


if __name__ == "__main__":
    main()
