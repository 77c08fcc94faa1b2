"""Reads `generation_config.json`, the one home of every number of the sampler."""

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, TypeGuard

from ..arguments import SIZE_LIMIT, SettingError, is_number, shown, whole_number


@dataclass(frozen=True)
class EntropyBound:
    """The reference's sampler. Nothing stays: each step decides every position anew."""

    bound: float = 0.1
    keeps: ClassVar[bool] = False


@dataclass(frozen=True)
class ConfidenceThreshold:
    """Accept what is likely enough and never look back (the default of mlx-vlm).

    Fewer steps than the entropy bound, and errors stay.
    """

    threshold: float = 0.9
    keeps: ClassVar[bool] = True


Sampler = EntropyBound | ConfidenceThreshold


@dataclass(frozen=True)
class Settling:
    """Says when a position is settled, and so is not decoded again until a pass over all of them.

    It is where it is accepted, its entropy is below a bound, and decoding it has `agreed` so many
    times in a row that the token which stands there is the best one; what is given agrees at once.
    Behind a certain end token that comes early it need not have. The reference decodes all
    positions in each step. How the numbers were chosen is in docs/performance.md.

    Attributes:
        entropy: nats.
        agreed: decodings.
        tighten: what an entropy bound is multiplied by in a pass over some positions, unless the
            answer ends early.
        refresh: a pass over all positions follows when passes over some have left out so many
            canvases, in the sum, of settled positions of the answer; unless it ends early.
        confirm: a canvas ends with a pass over all positions. Of a draft, which the encoder reads
            anyway, it does not have to.
    """

    entropy: float = 0.2
    agreed: int = 1
    tighten: float = 0.2
    refresh: float = 1.0
    confirm: bool = True

    def __post_init__(self) -> None:
        for name in ("entropy", "agreed", "tighten", "refresh"):
            value = getattr(self, name)
            if not value > 0:
                raise SettingError(f"{name} of settling must be positive, not {shown(value)}")


@dataclass(frozen=True)
class Speculation:
    """Says how drafts are made for the encoder, and which of their tokens it takes.

    How the numbers were chosen is in docs/performance.md.

    Attributes:
        steps: denoising steps of the first draft, the last ones of the schedule.
        most_steps: of any draft; how many a later one takes follows from what was accepted.
        spare: a draft that goes on with what another has left has this part of a canvas more.
        settling: which positions later steps of a draft leave out.
        epsilon: a probability above which typical acceptance takes any token,
        delta: or above delta * exp(-entropy), if that is less.
    """

    steps: int = 2
    most_steps: int = 4
    spare: float = 0.125
    settling: Settling | None = field(default_factory=lambda: Settling(confirm=False))
    epsilon: float = 0.09
    delta: float = 0.3

    def __post_init__(self) -> None:
        whole_number("steps of a draft", self.steps, 1)
        whole_number("most steps of a draft", self.most_steps, self.steps)
        for name in ("spare", "epsilon", "delta"):
            value = getattr(self, name)
            if not is_number(value) or not 0 <= value <= 1:
                raise SettingError(f"{name} of speculation is not in 0..1: {shown(value)}")


ENDS_LIMIT = 256  # end tokens; every token written is looked for among them

Speed = Literal["faithful", "balanced", "fast"]


@dataclass(frozen=True)
class GenerationConfig:
    """Sampler settings. The defaults are the reference's, for checkpoints that say nothing.

    The reference has neither `plateau`, the number of steps without a change of the best canvas
    after which it is taken however uncertain it is, nor `min_steps`, before which nothing stops,
    nor `settling`, by which a step decodes only positions that are undecided, nor `speculation`.
    """

    max_new_tokens: int = 256
    max_denoising_steps: int = 48
    t_min: float = 0.4
    t_max: float = 0.8
    stability_threshold: int = 1
    confidence_threshold: float = 0.005
    sampler: Sampler = field(default_factory=EntropyBound)
    eos_token_ids: tuple[int, ...] = (1,)
    plateau: int | None = None
    min_steps: int = 1
    settling: Settling | None = None
    speculation: Speculation = field(default_factory=Speculation)

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise SettingError(f"max tokens must be at least 1, not {self.max_new_tokens}")
        if self.max_denoising_steps < 1:
            raise SettingError(
                f"denoising steps must be at least 1, not {self.max_denoising_steps}"
            )
        # Steps end short of `t_min`, which may be 0 as in the reference; `t_max` is met.
        if not (0 <= self.t_min <= self.t_max and self.t_max > 0):
            raise SettingError(
                f"temperatures must be 0 <= {self.t_min} <= {self.t_max}, not 0 both"
            )
        if self.stability_threshold < 0:
            raise SettingError(
                f"stability threshold must not be negative: {self.stability_threshold}"
            )
        if self.plateau is not None and self.plateau < 1:
            raise SettingError(f"a plateau has at least one step, not {self.plateau}")
        if isinstance(self.sampler, ConfidenceThreshold):
            threshold = self.sampler.threshold
            if not is_number(threshold) or not 0 <= threshold <= 1:
                raise SettingError(f"confidence threshold {shown(threshold)} is not in 0..1")
        elif not isinstance(self.sampler, EntropyBound):
            raise SettingError(
                f"a sampler is an EntropyBound or a ConfidenceThreshold, not {shown(self.sampler)}"
            )
        elif not is_number(self.sampler.bound) or not self.sampler.bound > 0:
            raise SettingError(f"entropy bound must be positive, not {shown(self.sampler.bound)}")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "GenerationConfig":
        """From the contents of `generation_config.json`; keys it does not know are left alone.

        Raises:
            SettingError: a value out of range or of another type, or a sampler that is not the
                entropy bound.
        """
        known = {n: values[n] for n in (*_WHOLE, *_NUMBERS) if values.get(n) is not None}
        for name, value in known.items():
            if name in _WHOLE and not _is_whole(value):
                raise SettingError(f"{name} = {shown(value)} is not a whole number")
            if not is_number(value):
                raise SettingError(f"{name} = {shown(value)} is not a number")
        sampler = values.get("sampler_config")
        if sampler is not None:
            known["sampler"] = EntropyBound(_bound(sampler))
        eos = values.get("eos_token_id")
        if eos is not None:
            known["eos_token_ids"] = _ends(eos)
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

    def with_speed(self, speed: Speed) -> "GenerationConfig":
        """A copy that denoises in fewer steps; what it costs is in docs/performance.md.

        "faithful" is the checkpoint's settings.
        """
        return replace(self, **_SPEEDS[speed])


# Keys of `generation_config.json`.
_WHOLE = ("max_new_tokens", "max_denoising_steps", "stability_threshold")

_NUMBERS = ("t_min", "t_max", "confidence_threshold")


def _is_whole(value: object) -> TypeGuard[int]:
    """Tell whether it is a whole number of sensible size; true and 1.0 are not."""
    return type(value) is int and abs(value) <= SIZE_LIMIT


def _bound(sampler: Any) -> float:
    """The entropy bound of a sampler_config."""
    if not isinstance(sampler, dict):
        raise SettingError(f"sampler_config = {shown(sampler)} is not a JSON object")
    name = sampler.get("_cls_name", "EntropyBoundSamplerConfig")
    if name != "EntropyBoundSamplerConfig":
        raise SettingError(f"sampler {shown(name)} is not supported")
    bound = sampler.get("entropy_bound")
    if not is_number(bound):
        raise SettingError(f"entropy_bound = {shown(bound)} is not a number")
    return bound


def _ends(given: Any) -> tuple[int, ...]:
    """The ids of an eos_token_id, which is one or a list of them."""
    ids = given if isinstance(given, list) else [given]
    if not ids or len(ids) > ENDS_LIMIT or not all(_is_whole(i) and i >= 0 for i in ids):
        raise SettingError(f"eos_token_id = {shown(given)} is neither an id nor a list of ids")
    return tuple(dict.fromkeys(ids))


_SPEEDS: dict[Speed, dict[str, Any]] = {
    "faithful": {},
    "balanced": {"plateau": 2, "min_steps": 2, "settling": Settling()},
    "fast": {
        "confidence_threshold": 0.02,
        "plateau": 2,
        "min_steps": 2,
        "max_denoising_steps": 24,
        "settling": Settling(tighten=0.5, refresh=2.0),
    },
}
