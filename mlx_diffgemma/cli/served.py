"""The models of `serve`: the one that --model names, or several that are loaded when asked for."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import CheckpointError
from .options import Load, size
from .terminal import fail

if TYPE_CHECKING:
    from ..checkpoint.late import LateModel


@dataclass(frozen=True)
class Served(Load):
    """Loads one model as `Load`, or knows several."""

    models: Annotated[
        list[str] | None,
        typer.Option(
            help="Model that is loaded when a request names it, or a directory of such. Can be "
            "given again; the first, or --model, answers requests that name none.",
        ),
    ] = None
    keep_alive: Annotated[
        float | None,
        typer.Option(
            help="With --models: seconds without a request after which a model is unloaded; -1 is "
            "never. [300]"
        ),
    ] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.models:
            if self.keep_alive is not None:
                fail("--keep-alive goes with --models", code=2)
            return
        for flag, given in (
            ("--shard", self.shard),
            ("--adapter", self.adapter),
            ("--revision", self.revision),
        ):
            if given:
                fail(f"{flag} goes with one model, not with --models", code=2)

    @property
    def seconds(self) -> float:
        """Seconds that a model stays without a request."""
        given = 300.0 if self.keep_alive is None else self.keep_alive
        return given if given >= 0 else float("inf")

    def memory(self) -> int:
        """Bytes that all models may take together."""
        from ..checkpoint.fit import free_memory

        given = size(self.max_memory)
        return free_memory() if given is None else given

    def late(self, memory: int) -> "list[tuple[str, tuple[str, ...], LateModel]]":
        """The models with names and aliases, of which none is loaded.

        An alias that several have, or that is another's name, is nobody's.

        Raises:
            Error: one is damaged, does not fit into so many bytes, or is called as another.
        """
        from ..checkpoint.files import aliases_of, name_of
        from ..checkpoint.late import LateModel

        paths = self._paths()
        names = [name_of(path) for path in paths]
        for i, name in enumerate(names):
            if name in names[:i]:
                first = paths[names.index(name)]
                raise CheckpointError(
                    f"two models are called {name}, {first} and {paths[i]}: rename a directory"
                )
        aliases = [aliases_of(path) for path in paths]
        taken = Counter([*names, *(alias for each in aliases for alias in each)])
        found = []
        for path, name, others in zip(paths, names, aliases, strict=True):
            source = LateModel(path, memory=memory, dtype=self.dtype, speed=self.speed)
            found.append((name, tuple(each for each in others if taken[each] == 1), source))
        return found

    def _paths(self) -> list[str]:
        """What --models names, the one of --model first."""
        from ..checkpoint.files import name_of

        paths = [path for given in self.models or () for path in checkpoints_in(given)]
        if self.model is None:
            return paths
        first = next((each for each in paths if self.model in (each, name_of(each))), self.model)
        first = next((each for each in paths if _same(each, first)), first)
        return [first, *(each for each in paths if each != first)]


def _same(one: str, other: str) -> bool:
    return Path(one).is_dir() and Path(other).is_dir() and Path(one).samefile(other)


def checkpoints_in(given: str) -> Sequence[str]:
    """The checkpoints in a directory that is none itself; else what is given.

    Raises:
        CheckpointError: the directory has none.
    """
    from ..checkpoint.files import on_this_machine

    directory = on_this_machine(given)
    if directory is None or (directory / "config.json").exists():
        return [given]
    try:
        inner = sorted(str(path.parent) for path in directory.glob("*/config.json"))
    except OSError as error:
        raise CheckpointError(f"{directory} cannot be read: {error.strerror}") from None
    if not inner:
        raise CheckpointError(f"{directory} is no checkpoint, and there is none in it")
    return inner
