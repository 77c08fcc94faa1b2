"""Servers that several files ask, one of each for a file."""

from collections.abc import Iterator

import pytest
from servers import Server, serving, tiny, writing


@pytest.fixture(scope="module")
def small() -> Iterator[Server]:
    """The small model with default settings."""
    with serving() as server:
        yield server


@pytest.fixture(scope="module")
def random_one() -> Iterator[Server]:
    """A model that knows nothing and is quick about it."""
    with serving(tiny) as server:
        yield server


@pytest.fixture(scope="module")
def fine() -> Iterator[Server]:
    """A template that knows tools and thoughts, and a model with one answer."""
    with serving(writing("Fine.")) as server:
        yield server
