"""Where the tests find what is no module."""

from pathlib import Path

TESTS = Path(__file__).parent
ROOT = TESTS.parent
DATA = TESTS / "data"
SUDOKU = DATA / "sudoku6"

# The first small models, which leave more undecided and wrong than those that ship.
FIRST = DATA / "first"

# A small model that was trained to see (scripts/train_pictures.py), with pictures held out.
SEEING = DATA / "tiny_vision"
