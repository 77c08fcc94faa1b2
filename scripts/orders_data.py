"""Make examples of a new form to fine-tune `tiny` to: orders, as records with other keys.

    python scripts/orders_data.py DIR

writes DIR/train.jsonl, valid.jsonl and test.jsonl. `tiny` reads the same lines of facts, and writes
them with the keys item, count, price and to. No order of one side is on another.
"""

import argparse
import json
import random
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from splits import Example, example, side, write

GOODS = (
    "apples bags books boxes cakes chairs clocks coats cups desks dolls eggs hats keys lamps maps "
    "nails nuts pears pens plates ropes shoes socks spoons tables tents tools toys wheels"
).split()
NAMES = (
    "Ada Adam Alan Alice Amy Anna Ben Carl Clara David Diana Emma Eric Eva Frank Fred Grace Hans "
    "Helen Ivan Jack Jane John Julia Karl Kate Laura Leo Lisa Lucy Mark Martin Mary Nina Oscar "
    "Paul Peter Rosa Ruth Sam Sara Simon Tina Tom Vera Victor"
).split()


def orders(rng: random.Random, wanted: str) -> Iterator[Example]:
    """Orders of one side, in three wordings."""
    while True:
        goods, name = rng.choice(GOODS), rng.choice(NAMES)
        number, price = rng.randint(2, 99), rng.randint(1, 999)
        record = {"what": goods, "many": number, "each": price, "for": name}
        answer = json.dumps(record, separators=(",", ":"))
        prompt = rng.choice(
            [
                f"Record: {number} {goods} at {price} to {name}",
                f"Record: {name} gets {number} {goods}, {price} each",
                f"Record: {goods} for {name}, price {price}, count {number}",
            ]
        )
        if side(answer) == wanted:
            yield example(prompt, answer)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--train", type=int, default=2000, help="examples to train on")
    parser.add_argument("--valid", type=int, default=100)
    parser.add_argument("--test", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    counts = {"train": given.train, "valid": given.valid, "test": given.test}
    rng = random.Random(given.seed)
    write(given.directory, {name: islice(orders(rng, name), n) for name, n in counts.items()})


if __name__ == "__main__":
    main()
