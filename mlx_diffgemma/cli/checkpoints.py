"""Commands about checkpoints: `convert`, `recipes`, `info`."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from .options import Adapter, DType, DTypeName, MaxMemory, Revision, size, with_options
from .terminal import fail, put, say

if TYPE_CHECKING:
    from ..checkpoint.files import Headers
    from ..checkpoint.info import Info
    from ..convert import Recipe, Summary

app = typer.Typer()

QuantMode = Literal["affine", "mxfp4", "nvfp4", "mxfp8"]


def _recipes(begun: str) -> list[str]:
    """Names that a shell completes."""
    from ..convert import RECIPES

    return [name for name in RECIPES if name.startswith(begun)]


@dataclass(frozen=True)
class Quantization:
    """What becomes of the weights."""

    recipe: Annotated[
        str | None,
        typer.Option(
            help="Named recipe, see `mlx-diffgemma recipes`. [mixed-4-8]", autocompletion=_recipes
        ),
    ] = None
    quantize: Annotated[
        bool, typer.Option("--quantize", "-q", help="Quantize uniformly, as --q-* say.")
    ] = False
    q_bits: Annotated[int | None, typer.Option(help="Bits of a weight.")] = None
    q_group_size: Annotated[int | None, typer.Option(help="Weights that share a scale.")] = None
    q_mode: Annotated[QuantMode | None, typer.Option(help="Number format. [affine]")] = None
    dtype: Annotated[DTypeName | None, typer.Option(help="Type of what is not quantized.")] = None
    dequantize: Annotated[
        bool, typer.Option("--dequantize", "-d", help="Unpack a quantized checkpoint.")
    ] = False

    def __post_init__(self) -> None:
        if self.recipe is not None and self._uniform:
            fail("--recipe and -q/--q-* exclude each other", code=2)
        if self.dequantize and (self.recipe or self._uniform):
            fail("--dequantize goes with neither --recipe nor -q/--q-*", code=2)

    @property
    def _uniform(self) -> bool:
        return bool(self.quantize or self.q_bits or self.q_group_size or self.q_mode)

    def chosen(self) -> "Recipe | None":
        """The recipe that the options ask for; None is the default one."""
        from ..convert import RECIPES, uniform

        if self._uniform:
            return uniform(self.q_bits, self.q_group_size, self.q_mode or "affine")
        if self.recipe is None:
            return None
        if self.recipe not in RECIPES:
            fail(f"there is no recipe {self.recipe}; there are {', '.join(RECIPES)}", code=2)
        return RECIPES[self.recipe]


@app.command()
@with_options
def convert(
    source: Annotated[
        str | None, typer.Argument(help="Checkpoint directory or hub name.", show_default=False)
    ] = None,
    destination: Annotated[
        Path | None, typer.Argument(help="Directory to write; must not exist.", show_default=False)
    ] = None,
    *,
    hf_path: Annotated[
        str | None, typer.Option("--hf-path", help="The source, as mlx-lm takes it.")
    ] = None,
    mlx_path: Annotated[
        Path | None, typer.Option("--mlx-path", help="The directory to write, as mlx-lm takes it.")
    ] = None,
    quantization: Quantization,
    upload_repo: Annotated[
        str | None, typer.Option(help="Then upload to this hub repository.")
    ] = None,
    keep_download: Annotated[
        bool,
        typer.Option("--keep-download", help="Fetch all into the hub's cache, and keep it."),
    ] = False,
    revision: Revision = None,
) -> None:
    """Convert Hugging Face weights to quantized MLX weights."""
    import logging

    source, destination = _ends(source, destination, hf_path, mlx_path)

    from ..convert import Summary, stream_convert, upload, workspace_of
    from .converting import progress

    # Of the hub's library each request that is made again would be a warning.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    events = stream_convert(
        source,
        destination,
        recipe=quantization.chosen(),
        dtype=quantization.dtype,
        dequantize=quantization.dequantize,
        revision=revision,
        keep_download=keep_download,
    )
    try:
        with progress(source) as show:
            for event in events:
                if isinstance(event, Summary):
                    report = event
                else:
                    show(event)
    except KeyboardInterrupt:
        events.close()
        if workspace_of(destination).exists():
            say("what is done is kept: the same command goes on where this one stopped")
        raise
    _tell_conversion(report)
    if upload_repo:
        say(f"uploaded to {upload(report.directory, upload_repo)}")
    put(str(report.directory))


def _ends(
    source: str | None, destination: Path | None, hf_path: str | None, mlx_path: Path | None
) -> tuple[str, Path]:
    """Source and destination, each as an argument or as an option."""
    words = [str(each) for each in (source, destination) if each is not None]
    begin = hf_path if hf_path is not None or not words else words.pop(0)
    end = mlx_path if mlx_path is not None or not words else Path(words.pop(0))
    if begin is None or end is None or words:
        fail("convert takes one source and one directory to write, as arguments or options", code=2)
    return begin, end


def _tell_conversion(report: "Summary") -> None:
    from rich.filesize import decimal

    say(
        f"{decimal(report.source_bytes)} -> {decimal(report.bytes)}, "
        f"{report.bits_per_weight:.2f} bits per weight, {report.shards} file"
        f"{'s' if report.shards > 1 else ''}, {report.seconds:.1f} s"
    )
    if report.unpacked:
        say(f"left as they are, no group size divides them: {', '.join(report.unpacked)}")


@app.command()
def recipes() -> None:
    """List the recipes that convert knows."""
    from ..convert import DEFAULT_RECIPE, RECIPES

    for name, recipe in RECIPES.items():
        print(f"{name:<12}{recipe.description}{' (default)' if name == DEFAULT_RECIPE else ''}")


@app.command()
def info(
    model: Annotated[str, typer.Argument(help="Checkpoint directory or hub name.")],
    *,
    revision: Revision = None,
    dtype: DType = None,
    max_memory: MaxMemory = None,
    adapter: Adapter = None,
    recipes: Annotated[
        bool, typer.Option("--recipes", help="Say what each recipe would make of it, as on a Mac.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what a checkpoint is: size by part, quantization, memory it needs.

    Of a checkpoint on the hub no weights are fetched.
    """
    from dataclasses import asdict

    from ..checkpoint.adapter import find_adapter, read_adapter, with_adapter
    from ..checkpoint.hub import headers_of
    from ..checkpoint.info import info_of
    from ..checkpoint.load import computed_in

    given = size(max_memory)
    stored = None if adapter is None else read_adapter(find_adapter(adapter))
    headers = headers_of(model, revision=revision)
    if recipes:
        _tell_recipes(headers, dtype, as_json)
        return
    found = info_of(headers, computed_in(dtype))
    if stored is not None:
        found = with_adapter(found, stored)
    if as_json:
        print(json.dumps(asdict(found)))
        return
    if stored is not None:
        put(f"adapter: {stored}")
    _tell_sizes(found)
    _tell_fit(found, given)


def _tell_recipes(headers: "Headers", dtype: str | None, as_json: bool) -> None:
    """What each recipe would make of a checkpoint that is not packed yet."""
    from dataclasses import asdict

    from rich.filesize import decimal

    from ..convert import estimates

    found = estimates(headers, dtype)
    if as_json:
        print(json.dumps([asdict(each) for each in found]))
        return
    memory = f"memory at {found[0].context:,}"
    print(f"{'recipe':<12}{'disk':>9}{memory:>18}  Macs")
    for each in found:
        macs = f"{each.macs[0]} GB and more" if each.macs else "none of up to 64 GB"
        print(f"{each.recipe:<12}{decimal(each.disk):>9}{decimal(each.memory):>18}  {macs}")


def _tell_sizes(found: "Info") -> None:
    """What the checkpoint's files say, whatever machine this is."""
    from rich.filesize import decimal

    from ..model.vision_config import BUDGETS

    print(f"{found.parameters / 1e6:,.1f} M parameters, {decimal(found.bytes)}")
    print(
        f"{found.layers} layers, vocabulary {found.vocabulary:,}, canvas {found.canvas_length}, "
        f"context {found.context:,}"
    )
    for part in found.parts:
        put(
            f"  {part.name:<18}{part.parameters / 1e6:>12,.2f} M{decimal(part.bytes):>12}  "
            f"{'; '.join(part.formats)}"
        )
    if found.picture_tokens:
        budgets = ", ".join(map(str, BUDGETS[:-1]))
        print(
            f"pictures take up to {found.picture_tokens} tokens each, or {budgets} or "
            f"{BUDGETS[-1]}; the first loads {decimal(found.vision_bytes)}"
        )
    for context in sorted({min(4096, found.context), found.context}):
        needed = decimal(found.memory_needed(context))
        print(f"needs about {needed} with {context:,} tokens of context")


def _tell_fit(found: "Info", given: int | None) -> None:
    """What loading would decide, by the memory that is given or free now."""
    from rich.filesize import decimal

    from ..checkpoint.fit import TooLarge, fit

    try:
        here = fit(found, given)
    except TooLarge as error:
        put(f"here: {error}")
        return
    print(f"here: a context of {here.context:,} tokens")
    if found.picture_tokens:
        try:
            seeing = fit(found, given, pictures=True)
            print(f"here: with pictures a context of {seeing.context:,} tokens")
        except TooLarge as error:
            put(f"here, with pictures: {error}")
    if found.table_bytes:
        table = "kept dequantized" if here.keep_table else "dequantized at each step"
        print(f"here: embedding table {table} ({decimal(found.table_bytes)})")
