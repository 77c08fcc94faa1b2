"""`fuse`: an adapter becomes part of a checkpoint's weights."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .options import Quiet, Revision
from .terminal import put, say

if TYPE_CHECKING:
    from ..convert import Fused

app = typer.Typer()


@app.command()
def fuse(
    *,
    model: Annotated[
        str, typer.Option("--model", "-m", help="Checkpoint directory, or a name on the hub.")
    ],
    adapter: Annotated[
        str,
        typer.Option(
            "--adapter-path", "--adapter", help="Adapter: a directory, or a name on the hub."
        ),
    ] = "adapters",
    save_path: Annotated[
        Path, typer.Option("--save-path", help="Directory to write; must not exist.")
    ] = Path("fused_model"),
    dequantize: Annotated[
        bool,
        typer.Option("--dequantize", "-d", help="Unpack all weights, which are rounded no more."),
    ] = False,
    q_bits: Annotated[
        int | None, typer.Option(help="Bits of the quantized matrices that change. [as they were]")
    ] = None,
    upload_repo: Annotated[
        str | None, typer.Option(help="Then upload to this hub repository.")
    ] = None,
    revision: Revision = None,
    compare: Annotated[
        bool,
        typer.Option(help="Then load both, and say where they prefer other tokens."),
    ] = True,
    quiet: Quiet = False,
) -> None:
    """Make an adapter part of the weights."""
    from ..convert import Fused, stream_fuse, upload
    from .converting import progress

    with progress(model) as show:
        for event in stream_fuse(
            model, adapter, save_path, dequantize=dequantize, bits=q_bits, revision=revision
        ):
            if isinstance(event, Fused):
                report = event
            elif not quiet:
                show(event)
    if not quiet:
        _tell(report)
        if compare:
            _compare(model, adapter, revision, report)
    if upload_repo:
        say(f"uploaded to {upload(report.directory, upload_repo)}")
    put(str(report.directory))


def _tell(report: "Fused") -> None:
    from rich.filesize import decimal

    say(
        f"{report.changed} tensors changed; {decimal(report.bytes)}, {report.shards} "
        f"file{'s' if report.shards > 1 else ''}, {report.seconds:.1f} s"
    )


def _compare(model: str, adapter: str, revision: str | None, report: "Fused") -> None:
    """Say how much of what the adapter does was lost by packing the weights again."""
    from ..checkpoint.fit import TooLarge
    from ..convert import changed_argmax

    try:
        share = changed_argmax(model, adapter, report.directory, revision=revision)
    except TooLarge as error:
        say(f"not compared with the model before: {error}")
        return
    way = "; --q-bits 8 or --dequantize loses less" if share > 0.05 and report.packed else ""
    say(
        f"fused, it prefers another token than with the adapter beside it at {100 * share:.1f} % "
        f"of a sample's positions{way}"
    )
