"""What a run of fine-tuning is asked for: one home of its numbers, named as mlx-lm names them.

Counts are mlx-lm's defaults. The learning rate, its schedule, the optimizer's numbers and the limit
of the gradient are those of the public recipes for this model.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from ..arguments import SettingError, is_number, shown, whole_number

OptimizerName = Literal["adam", "adamw", "muon", "sgd", "adafactor"]

# What optimizers are told where nothing else is said. Adafactor would otherwise ignore the learning
# rate; without a correction of its bias, Adam's first steps are several times too long.
OPTIMIZER_CONFIG: dict[OptimizerName, dict[str, Any]] = {
    "adam": {"betas": [0.95, 0.99], "bias_correction": True},
    "adamw": {"betas": [0.95, 0.99], "bias_correction": True, "weight_decay": 1e-4},
    "muon": {},
    "sgd": {},
    "adafactor": {"relative_step": False, "scale_parameter": False},
}

# Updates over which the learning rate rises, or a tenth of all if that is less; what share of it is
# left at the end.
WARM_UP, LEFT = 25, 0.1

SCHEDULES = ("cosine_decay", "linear_schedule", "exponential_decay", "step_decay")

MOST = 1 << 31  # of a count

LARGEST_SEED = 1 << 62  # so that what is added to it is one, too

ALL = -1  # batches: as many as there are


@dataclass(frozen=True)
class Settings:
    """Numbers of a run; all but the last ones change what is learnt.

    Attributes:
        batch_size: examples of an iteration; the last one of an epoch may have fewer.
        iters: iterations; an update of the weights takes `grad_accumulation_steps` of them.
        max_seq_length: most tokens of an example, prompt and response together.
        learning_rate: at its highest, unless `lr_schedule` says all.
        lr_schedule: as mlx-lm's: `name`, `arguments`, `warmup`, `warmup_init`; None rises for
            `WARM_UP` updates and falls along a cosine to a tenth.
        optimizer_config: arguments by the optimizer's name, over `OPTIMIZER_CONFIG`.
        max_grad_norm: longer gradients are shortened to it; 0 leaves them as they are.
        encoder_weight: of the encoder's loss beside the denoiser's; 0 computes none. An encoder
            that never learnt to read on pulls an adapter away from the task.
        distill: learn to answer in so many steps what the model answers in all its steps.
        seed: of all that is drawn.
        val_batches: batches whose validation loss is measured, each at four levels of noise, which
            is why there are fewer than mlx-lm's 25; -1 is all.
        test_batches: the same of the test's loss.
        success_cases: validation examples that are answered, to count the exact ones; 0 is none.
        test_cases: the same of the test.
        success_steps: denoising steps of such an answer; None are those of `distill`, or the
            checkpoint's setting.
        steps_per_report, steps_per_eval, save_every: iterations between two of these.
        grad_checkpoint: compute each layer twice, which takes a third more time and less memory.
        clear_cache_threshold: bytes that MLX may keep for later between iterations.
    """

    batch_size: int = 4
    iters: int = 1000
    max_seq_length: int = 2048
    grad_accumulation_steps: int = 1
    optimizer: OptimizerName = "adamw"
    optimizer_config: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    learning_rate: float = 1.5e-4
    lr_schedule: Mapping[str, Any] | None = None
    max_grad_norm: float = 1.0
    encoder_weight: float = 1.0
    distill: int | None = None
    seed: int = 0
    val_batches: int = 8
    test_batches: int = 500
    success_cases: int = 16
    test_cases: int = 100
    success_steps: int | None = None
    steps_per_report: int = 10
    steps_per_eval: int = 200
    save_every: int = 100
    grad_checkpoint: bool = False
    clear_cache_threshold: int = 0

    def __post_init__(self) -> None:
        for name in ("batch_size", "iters", "grad_accumulation_steps", "save_every"):
            whole_number(name, getattr(self, name), 1, MOST)
        for name in ("steps_per_report", "steps_per_eval"):
            whole_number(name, getattr(self, name), 1, MOST)
        if self.grad_accumulation_steps > self.iters:
            raise SettingError(
                f"grad_accumulation_steps {self.grad_accumulation_steps} is more than iters "
                f"{self.iters}: the weights would never change"
            )
        for name in ("success_cases", "test_cases", "clear_cache_threshold"):
            whole_number(name, getattr(self, name), 0)
        whole_number("seed", self.seed, 0, LARGEST_SEED)
        for name in ("val_batches", "test_batches"):
            whole_number(name, getattr(self, name), ALL, MOST)
        whole_number("max_seq_length", self.max_seq_length, 2, MOST)
        for name in ("success_steps", "distill"):
            if getattr(self, name) is not None:
                whole_number(name, getattr(self, name), 1, MOST)
        for name in ("learning_rate", "max_grad_norm", "encoder_weight"):
            value = getattr(self, name)
            if not is_number(value) or value < 0:
                raise SettingError(f"{name} must be a number from 0 on, not {shown(value)}")
        if self.optimizer not in get_args(OptimizerName):
            known = ", ".join(get_args(OptimizerName))
            raise SettingError(f"optimizer is one of {known}; not {shown(self.optimizer)}")
        _check_optimizers(self.optimizer_config)
        if self.lr_schedule is not None:
            _check_schedule(self.lr_schedule)

    @property
    def updates(self) -> int:
        """How often the weights change."""
        return self.iters // self.grad_accumulation_steps

    @property
    def schedule(self) -> dict[str, Any]:
        """The schedule of the learning rate, in mlx-lm's words."""
        if self.lr_schedule is not None:
            return dict(self.lr_schedule)
        rate = float(self.learning_rate)
        warm_up = min(WARM_UP, self.updates // 10)
        cosine = {
            "name": "cosine_decay",
            "arguments": [rate, max(1, self.updates - warm_up), LEFT * rate],
        }
        # The first update would do nothing where it began at 0.
        return {**cosine, "warmup": warm_up, "warmup_init": rate / warm_up} if warm_up else cosine

    def arguments(self) -> dict[str, Any]:
        """What the optimizer is told beside its learning rate."""
        return {**OPTIMIZER_CONFIG[self.optimizer], **self.optimizer_config.get(self.optimizer, {})}

    def same_run(self, other: "Settings") -> list[str]:
        """Names of settings in which a run that goes on must not differ, and does."""
        mine, its = vars(self), vars(other)
        return [name for name in mine if name not in _FREE and mine[name] != its[name]]


# Settings that a run which goes on may change: what is learnt does not depend on them, or in the
# case of `iters` only through the schedule; and the learning rate, as one that was too high leads
# to the same loss that is not finite again and again.
_FREE = (
    "iters",
    "learning_rate",
    "lr_schedule",
    "steps_per_report",
    "save_every",
    "test_batches",
    "test_cases",
    "clear_cache_threshold",
)


def _check_optimizers(given: object) -> None:
    """Refuse what is no arguments by the optimizer's name."""
    if not isinstance(given, Mapping):
        raise SettingError(f"optimizer_config must be names with arguments, not {shown(given)}")
    for name, arguments in given.items():
        if name not in OPTIMIZER_CONFIG:
            raise SettingError(f"optimizer_config: there is no optimizer {shown(name)}")
        if not isinstance(arguments, Mapping):
            raise SettingError(f"optimizer_config: {name} has no arguments: {shown(arguments)}")
        for key, value in arguments.items():
            values = value if isinstance(value, list | tuple) else [value]
            known = all(isinstance(each, bool) or is_number(each) for each in values)
            if not isinstance(key, str) or not values or len(values) > 2 or not known:
                raise SettingError(f"optimizer_config: {name}: {shown({key: value})}")


def _check_schedule(given: object) -> None:
    """Refuse what is no schedule of mlx-lm's."""
    if not isinstance(given, Mapping) or given.get("name") not in SCHEDULES:
        raise SettingError(f"lr_schedule has a name, one of {', '.join(SCHEDULES)}")
    if unknown := given.keys() - {"name", "arguments", "warmup", "warmup_init"}:
        raise SettingError(f"lr_schedule has no {shown(min(map(str, unknown)))}")
    arguments = given.get("arguments")
    if not isinstance(arguments, list) or not 2 <= len(arguments) <= 3:
        raise SettingError("lr_schedule has arguments, a list of two or three numbers")
    for value in (*arguments, given.get("warmup_init", 0.0)):
        if not is_number(value):
            raise SettingError(f"lr_schedule: {shown(value)} is no number")
    whole_number("lr_schedule: warmup", given.get("warmup", 0), 0, MOST)
