"""What `generation_config.json` says: the one home of every number of the sampler."""

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from .arguments import SettingError, whole_number
from .sampler import ConfidenceThreshold, EntropyBound, Sampler

Speed = Literal["faithful", "balanced", "fast"]


@dataclass(frozen=True)
class GenerationConfig:
    """Sampler settings. The defaults are the reference's, for checkpoints that say nothing.

    The reference has neither `plateau`, the number of steps without a change of the best canvas
    after which it is taken however uncertain it is, nor `min_steps`, before which nothing stops.
    """

    max_new_tokens: int = 256
    max_denoising_steps: int = 48
    t_min: float = 0.4
    t_max: float = 0.8
    stability_threshold: int = 1
    confidence_threshold: float = 0.005
    sampler: Sampler = field(default_factory=EntropyBound)
    eos_token_ids: tuple[int, ...] = (1,)
    pad_token_id: int = 0
    plateau: int | None = None
    min_steps: int = 1

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise SettingError(f"max tokens must be at least 1, not {self.max_new_tokens}")
        if self.max_denoising_steps < 1:
            raise SettingError(
                f"denoising steps must be at least 1, not {self.max_denoising_steps}"
            )
        if not 0 < self.t_min <= self.t_max:
            raise SettingError(f"temperatures must be 0 < {self.t_min} <= {self.t_max}")
        if self.stability_threshold < 0:
            raise SettingError(
                f"stability threshold must not be negative: {self.stability_threshold}"
            )
        if self.plateau is not None and self.plateau < 1:
            raise SettingError(f"a plateau has at least one step, not {self.plateau}")
        if isinstance(self.sampler, ConfidenceThreshold):
            if not 0 <= self.sampler.threshold <= 1:
                raise SettingError(f"confidence threshold {self.sampler.threshold} is not in 0..1")
        elif self.sampler.bound <= 0:
            raise SettingError(f"entropy bound must be positive, not {self.sampler.bound}")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "GenerationConfig":
        """From the contents of `generation_config.json`; keys it does not know are left alone.

        Raises:
            SettingError: a value out of range, or a sampler that is not the entropy bound.
        """
        names = (
            "max_new_tokens",
            "max_denoising_steps",
            "t_min",
            "t_max",
            "stability_threshold",
            "confidence_threshold",
            "pad_token_id",
        )
        known = {name: values[name] for name in names if values.get(name) is not None}
        sampler = values.get("sampler_config")
        if sampler is not None:
            if sampler.get("_cls_name", "EntropyBoundSamplerConfig") != "EntropyBoundSamplerConfig":
                raise SettingError(f"sampler {sampler['_cls_name']!r} is not supported")
            known["sampler"] = EntropyBound(sampler["entropy_bound"])
        eos = values.get("eos_token_id")
        if eos is not None:
            known["eos_token_ids"] = tuple(eos) if isinstance(eos, list) else (eos,)
        return cls(**known)

    def override(
        self,
        *,
        max_new_tokens: int | None = None,
        max_denoising_steps: int | None = None,
        sampler: Sampler | None = None,
    ) -> "GenerationConfig":
        """A copy in which what was given replaces the checkpoint's; None leaves it.

        Raises:
            SettingError: one is out of range, or no whole number.
        """
        for name, value in (
            ("max tokens", max_new_tokens),
            ("denoising steps", max_denoising_steps),
        ):
            if value is not None:
                whole_number(name, value, 1)
        given: dict[str, Any] = {
            "max_new_tokens": max_new_tokens,
            "max_denoising_steps": max_denoising_steps,
            "sampler": sampler,
        }
        return replace(self, **{name: v for name, v in given.items() if v is not None})

    def at(self, speed: Speed) -> "GenerationConfig":
        """A copy that denoises in fewer steps; what it costs is in docs/performance.md.

        "faithful" is the checkpoint's settings.
        """
        return replace(self, **_SPEEDS[speed])


_SPEEDS: dict[Speed, dict[str, Any]] = {
    "faithful": {},
    "balanced": {"stability_threshold": 0, "plateau": 6, "min_steps": 2},
    "fast": {
        "stability_threshold": 0,
        "confidence_threshold": 0.02,
        "plateau": 2,
        "min_steps": 2,
        "max_denoising_steps": 24,
    },
}
