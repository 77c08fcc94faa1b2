"""Several ranks that learn together: each of a part of every batch, with one sum of gradients.

Rank 0 says what the others do next, measures, and writes all files. They wait for its word, not in
an exchange: it may measure for minutes.
"""

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx

from ..arguments import SettingError
from ..checkpoint.adapter import AdapterConfig, add_adapter
from ..distributed.share import Share
from ..model.diffusion_gemma import DiffusionGemma
from .batches import Batches
from .exchange import Together, summed
from .loop import arrays_of, put_arrays
from .measuring import clear_cache
from .objective import Sample
from .settings import Settings
from .step import COLLECT, Trainer


@dataclass(frozen=True)
class Work:
    """What all ranks learn; the examples go to them as ids, from rank 0's files."""

    samples: tuple[Sample, ...]
    settings: Settings
    adapter: AdapterConfig

    @property
    def tokens(self) -> int:
        """Those of the longest example."""
        return max(each.length for each in self.samples)


def check_ranks(settings: Settings, size: int) -> None:
    """Refuse what several ranks cannot learn together.

    Raises:
        SettingError: it is that.
    """
    if settings.batch_size < size:
        raise SettingError(
            f"batch_size {settings.batch_size} is divided among {size} ranks: one would have no "
            "example of any batch"
        )
    if settings.distill is not None and size > 1:
        raise SettingError("distill is for one process")


def begin_alike(trainer: Trainer) -> None:
    """Give all ranks rank 0's weights and optimizer: another one has no files to go on from."""
    share = trainer.share
    if share.size == 1:
        return
    own = {n: a for n, a in arrays_of(trainer).items() if not n.startswith("gradients.")}
    told = summed(share, {n: mx.zeros_like(a) for n, a in own.items()} if share.rank else own)
    if share.rank:
        put_arrays(trainer, told)


def learn_along(
    model: DiffusionGemma, work: Work, share: Share, hear: Callable[[], bytes | None]
) -> None:
    """In another rank than 0, do what that one says, until it says no more.

    Raises:
        Diverged: as in rank 0, where it is told.
    """
    settings = work.settings
    mx.random.seed(settings.seed)
    add_adapter(model, work.adapter)
    trainer = Trainer(model, settings, model.generation.eos_token_ids[0], Together(share))
    begin_alike(trainer)
    lengths = [each.length for each in work.samples]
    batches = Batches(lengths, settings.batch_size, settings.seed)
    while (word := hear()) is not None:
        if word == COLLECT:
            trainer.collect()
            continue
        at = int(word)
        trainer.step([work.samples[i] for i in batches.at(at)], at)
        clear_cache(settings.clear_cache_threshold)
