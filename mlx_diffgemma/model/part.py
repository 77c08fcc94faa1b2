"""Which part of a model a rank has: heads, inner widths and tokens of the vocabulary.

Queries, keys, gates and ups are cut by rows, what reads them by columns, and a sum over ranks puts
its results together. Columns are packed in groups, so borders are multiples of these.
Norms, routers, the residual and the table that ids are looked up in are whole on every rank.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

from ..distributed.share import ALONE, Share
from ..errors import Error
from .config import Config, LayerConfig


class CutError(Error):
    """A model that cannot be cut for so many ranks."""


class Kept(Protocol):
    """What a rank has of a parameter: of `whole` rows or columns of an axis those in the ranges."""

    @property
    def axis(self) -> int:
        """Counted from the last."""

    @property
    def ranges(self) -> tuple[range, ...]:
        """As the model counts them."""

    @property
    def whole(self) -> int:
        """As the model counts them."""

    def stored(self, length: int) -> list[range]:
        """The ranges, where an axis stores all in `length` numbers."""


@dataclass(frozen=True)
class LayerPart:
    """Of one layer: heads of queries and of keys and values, columns of the dense half and of each
    expert. `first` tells whether no rank before this one has the same keys and values."""

    share: Share
    heads: range
    keys: range
    inner: range
    expert: range
    first: bool = True

    @classmethod
    def whole(cls, config: Config, layer: LayerConfig) -> "LayerPart":
        """All of it."""
        return cls(
            ALONE,
            range(config.num_attention_heads),
            range(layer.num_key_value_heads),
            range(config.intermediate_size),
            range(config.moe_intermediate_size),
        )

    def of(self, layer: LayerConfig) -> LayerConfig:
        """The layer's attention, with the heads that are here."""
        return replace(layer, num_key_value_heads=len(self.keys))


@dataclass(frozen=True)
class ModelPart:
    """Of a model; `conditioning` are columns of what takes in the last step's belief, `vocabulary`
    the ids that are read off here."""

    share: Share
    layers: tuple[LayerPart, ...]
    conditioning: range
    vocabulary: range

    @classmethod
    def whole(cls, config: Config) -> "ModelPart":
        """All of it, for one rank."""
        return cls(
            ALONE,
            tuple(LayerPart.whole(config, layer) for layer in config.layers),
            range(config.intermediate_size),
            range(config.vocab_size),
        )


def cut_model(config: Config, share: Share, group: Callable[[str], int], tokens: int) -> ModelPart:
    """A rank's part; `group` is in how many columns a module's weights are packed together, and
    `tokens` are drawn as one.

    Raises:
        CutError: the model has fewer groups or heads than there are ranks.
    """
    if share.size == 1:
        return ModelPart.whole(config)
    layers = []
    for i, layer in enumerate(config.layers):
        path = f"model.decoder.layers.{i}"
        cuts = _heads(config, layer, share, group(f"{path}.self_attn.o_proj"), i)
        heads, keys = cuts[share.rank]
        first = keys not in [each for _, each in cuts[: share.rank]]
        widths = config.intermediate_size, config.moe_intermediate_size
        inner = _cut(share, widths[0], group(f"{path}.mlp.down_proj"), f"layer {i}'s MLP")
        expert = _cut(share, widths[1], group(f"{path}.experts.down_proj"), f"layer {i}'s experts")
        layers.append(LayerPart(share, heads, keys, inner, expert, first))
    path, what = "model.decoder.self_conditioning.down_proj", "the self-conditioning"
    conditioning = _cut(share, config.intermediate_size, group(path), what)
    vocabulary = _cut(share, config.vocab_size, tokens, "the vocabulary")
    return ModelPart(share, tuple(layers), conditioning, vocabulary)


def _cut(share: Share, width: int, unit: int, what: str) -> range:
    units = -(-width // unit)
    if units < share.size:
        raise CutError(
            f"{what} cannot be cut for {share.size} ranks: of its {width} columns, groups of "
            f"{unit} stay together"
        )
    return share.cut(width, unit)


def _heads(
    config: Config, layer: LayerConfig, share: Share, group: int, number: int
) -> list[tuple[range, range]]:
    """Of each rank the heads of queries, and of the keys and values that they look at.

    What cannot be cut for one rank is refused by all: none waits for it.
    """
    count, size = config.num_attention_heads, share.size
    cuts = [_heads_of(rank, size, count, layer.num_key_value_heads) for rank in range(size)]
    borders = [at * layer.head_dim for heads, _ in cuts for at in (heads.start, heads.stop)]
    if not all(heads for heads, _ in cuts) or any(border % group for border in borders):
        raise CutError(
            f"layer {number}'s {count} heads of {layer.head_dim} cannot be cut for {size} "
            f"ranks in groups of {group}"
        )
    return cuts


def _heads_of(rank: int, size: int, count: int, known: int) -> tuple[range, range]:
    """A rank's heads of `count`, and of `known` ones of keys those that they look at.

    Where there are fewer of the latter than ranks, some ranks have the same.
    """
    each = count // known  # heads of queries that share one of keys
    if known >= size:
        keys = Share(rank, size).cut(known)
        return range(keys.start * each, keys.stop * each), keys
    mine = rank * known // size
    beside = [other for other in range(size) if other * known // size == mine]
    own = Share(beside.index(rank), len(beside)).cut(each)
    return range(mine * each + own.start, mine * each + own.stop), range(mine, mine + 1)
