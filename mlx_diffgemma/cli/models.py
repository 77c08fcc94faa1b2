"""Commands about models that are on this machine: `models list`, `models pull`, `models rm`."""

import json
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .options import MaxMemory, Revision, size
from .terminal import fail, put, say, write

if TYPE_CHECKING:
    from ..checkpoint.info import Info

app = typer.Typer()

models = typer.Typer(help="Models on this machine: list, pull, rm.", invoke_without_command=True)
app.add_typer(models, name="models")

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@models.callback()
def default(context: typer.Context) -> None:
    """List models, unless a command says something else."""
    if context.invoked_subcommand is None:
        list_models()


@models.command("list")
def list_models(*, max_memory: MaxMemory = None, as_json: AsJson = False) -> None:
    """List the models in the hub's cache and those that ship, and say which run here."""
    from rich.filesize import decimal

    from ..checkpoint.cache import scan
    from ..checkpoint.files import SHIPPED
    from ..checkpoint.info import inspect
    from ..checkpoint.load import computed_in

    given = size(max_memory)
    dtype = computed_in(None)
    found = scan(dtype)
    rows: list[tuple[str, str, int, Info | None, str | None, Path]] = []
    for name, directory in SHIPPED.items():
        shipped = inspect(directory, dtype)
        rows.append((name, "", shipped.bytes, shipped, None, directory))
    for each in found.models:
        commit = ", ".join((*each.refs, each.commit[:8]))
        rows.append((each.name, commit, each.bytes, each.info, each.lacks, each.directory))
    if as_json:
        keys = ("name", "revision", "bytes", "runs", "here", "directory")
        values = [(*row[:3], *_here(row[3], row[4], given), str(row[5])) for row in rows]
        print(json.dumps([dict(zip(keys, each, strict=True)) for each in values]))
        return
    width = max(len(row[0]) for row in rows)
    for name, commit, taken, info, lacks, _ in rows:
        _, said = _here(info, lacks, given)
        put(f"{name:<{width}}  {decimal(taken):>9}  {said}{f'  ({commit})' if commit else ''}")
    if found.others:
        count = len(found.others)
        what = "1 other repository" if count == 1 else f"{count} other repositories"
        say(f"{what} in the hub's cache: no models of this package")


def _here(info: "Info | None", lacks: str | None, memory: int | None) -> tuple[bool, str]:
    """Whether a model runs in so much memory, and a phrase that says how, or why not."""
    from ..checkpoint.fit import TooLarge, fit

    if info is None:
        return False, lacks or ""
    try:
        return True, f"runs here with a context of {fit(info, memory).context:,}"
    except TooLarge as error:
        return False, f"too large: {error}"


@models.command()
def pull(
    name: Annotated[str, typer.Argument(help="Name on the hub.")], *, revision: Revision = None
) -> None:
    """Fetch a model into the hub's cache; `--model NAME` then finds it there."""
    from rich.filesize import decimal

    from ..checkpoint.files import on_this_machine, resolve
    from ..checkpoint.hub import cached, look_up, read_remote
    from ..checkpoint.info import info_of
    from ..checkpoint.load import computed_in

    if on_this_machine(name) is not None:
        fail(f"{name} is on this machine already")
    repository = look_up(name, revision)
    # Its headers first: what is no model of ours, or too large for the disk, is not fetched.
    info = info_of(read_remote(repository, Path(name)), computed_in(None))
    files = [repository.files[each] for each in repository.weights]
    missing = sum(file.size for file in files if cached(repository, file) is None)
    _check_room(missing)
    say(f"{name}: {decimal(info.bytes)}, {decimal(missing)} of it to be fetched")
    runs, said = _here(info, None, None)
    if not runs:
        say(f"{said} (convert fetches a file at a time, and keeps none)")
    put(str(resolve(name, revision=revision)))


def _check_room(needed: int) -> None:
    from huggingface_hub import constants
    from rich.filesize import decimal

    place = Path(constants.HF_HUB_CACHE)
    place.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(place).free
    if needed > free:
        fail(f"{place} has too little room: {decimal(needed)} are needed, {decimal(free)} are free")


@models.command()
def rm(
    names: Annotated[list[str], typer.Argument(help="Names of models in the hub's cache.")],
    *,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Remove without asking.")] = False,
) -> None:
    """Remove models from the hub's cache, and nothing that is no model of this package."""
    from rich.filesize import decimal

    from ..checkpoint.cache import removable, remove

    found = {name: removable(name) for name in names}  # all of them, before any is removed
    for name, repo in found.items():
        what = f"{name}, {decimal(repo.size_on_disk)} in {repo.repo_path}"
        if not yes:
            if not sys.stdin.isatty():
                fail(f"to remove {what} without being asked, give --yes")
            write(f"Remove {what}? [y/N] ", sys.stderr)
            if sys.stdin.readline().strip().lower() not in ("y", "yes"):
                continue
        say(f"removed {name}: {decimal(remove(name))} are free again")
