"""Which parts of the model get how many bits: recipes are data."""

from dataclasses import dataclass

from mlx_diffgemma.checkpoint.quantization import MODES, Quantization
from mlx_diffgemma.errors import Error

DEFAULT_RECIPE = "mixed-4-8"
EIGHT = Quantization(64, 8)
FOUR = Quantization(64, 4)


class RecipeError(Error):
    """A quantization that MLX does not have."""


@dataclass(frozen=True)
class Recipe:
    """`default` packs the experts and whatever has no rule of its own, `dense` the embedding,
    attention and dense MLP, `router` the router; None leaves a part as it is."""

    description: str
    default: Quantization | None
    dense: Quantization | None
    router: Quantization | None

    def rule(self, module: str) -> Quantization | None:
        """Return the quantization of a module's matrix, None for all of the vision tower."""
        if ".vision_tower." in module:
            return None
        if module.endswith(".router.proj"):
            return self.router
        if module.endswith(".embed_tokens") or ".self_attn." in module or ".mlp." in module:
            return self.dense
        return self.default


RECIPES = {
    "mixed-4-8": Recipe("experts 4 bits; embedding, attention, MLP, router 8", FOUR, EIGHT, EIGHT),
    "8bit": Recipe("everything 8 bits", EIGHT, EIGHT, EIGHT),
    "6bit": Recipe("everything 6 bits, router 8", Quantization(64, 6), Quantization(64, 6), EIGHT),
    "4bit": Recipe("everything 4 bits, router 8", FOUR, FOUR, EIGHT),
    "mxfp4": Recipe("experts mxfp4, the rest 8 bits", Quantization(32, 4, "mxfp4"), EIGHT, EIGHT),
    "nvfp4": Recipe("experts nvfp4, the rest 8 bits", Quantization(16, 4, "nvfp4"), EIGHT, EIGHT),
    "mxfp8": Recipe("experts mxfp8, the rest 8 bits", Quantization(32, 8, "mxfp8"), EIGHT, EIGHT),
    "none": Recipe("no quantization", None, None, None),
}


def uniform(bits: int | None, group_size: int | None, mode: str) -> Recipe:
    """Make a recipe of one format; the router, which is small and fragile, keeps 8 bits.

    None takes the mode's default.

    Raises:
        RecipeError: MLX has no such combination.
    """
    sizes, widths = MODES[mode]
    chosen = Quantization(group_size or sizes[0], bits or widths[0], mode)
    if chosen.group_size not in sizes or chosen.bits not in widths:
        raise RecipeError(
            f"{mode} takes group sizes {_listed(sizes)} and bits {_listed(widths)}, "
            f"not {chosen.group_size} and {chosen.bits}"
        )
    return Recipe(f"everything {chosen.bits} bits {mode}", chosen, chosen, EIGHT)


def _listed(numbers: tuple[int, ...]) -> str:
    return ", ".join(map(str, sorted(numbers)))


def fitting(wanted: Quantization, columns: int) -> Quantization | None:
    """Return `wanted`, or for a matrix whose rows its group does not divide the nearest that fits.

    A smaller affine group of the same bits first, 8-bit affine for the other modes; None if no
    group fits.
    """
    if columns % wanted.group_size == 0:
        return wanted
    bits = wanted.bits if wanted.mode == "affine" else 8
    sizes = [size for size in (64, 32) if columns % size == 0]
    return Quantization(sizes[0], bits) if sizes else None
