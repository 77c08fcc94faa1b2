"""The optimizer and the schedule of its learning rate, by their names."""

from collections.abc import Callable
from inspect import signature
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim

from ..arguments import SettingError, shown
from .settings import Settings

_CLASSES = {
    "adam": optim.Adam,
    "adamw": optim.AdamW,
    "muon": optim.Muon,
    "sgd": optim.SGD,
    "adafactor": optim.Adafactor,
}


def make_optimizer(settings: Settings) -> Any:
    """The optimizer that a run asks for, its learning rate on its schedule.

    Raises:
        SettingError: it, or the schedule, does not take these arguments.
    """
    kind, arguments = _CLASSES[settings.optimizer], settings.arguments()
    known = list(signature(kind).parameters)[1:]  # the first is the learning rate
    if unknown := sorted(arguments.keys() - set(known)):
        raise SettingError(
            f"optimizer_config: {settings.optimizer} has no {shown(unknown[0])}; it has "
            f"{', '.join(known)}"
        )
    try:
        return kind(learning_rate=make_schedule(settings), **arguments)
    except (TypeError, ValueError) as error:
        raise SettingError(f"optimizer_config: {settings.optimizer}: {error}") from None


def make_schedule(settings: Settings) -> Callable[[mx.array], mx.array]:
    """The learning rate of each update, counted from 0.

    Raises:
        SettingError: the schedule does not take these arguments.
    """
    from mlx_lm.tuner.utils import build_schedule  # which takes seconds

    try:
        schedule = build_schedule(settings.schedule)
        schedule(mx.array(0))
    except (TypeError, ValueError) as error:
        raise SettingError(f"lr_schedule: {error}") from None
    return schedule
