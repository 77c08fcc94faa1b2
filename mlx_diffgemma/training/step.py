"""One step of training: losses and gradients of a batch, and what they do to the weights.

The trained parameters are a flat dictionary of arrays, an argument of the function whose gradient
is taken: the rest of the model is frozen, and may be packed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.optimizers import clip_grad_norm
from mlx.utils import tree_map, tree_unflatten

from ..checkpoint.adapter import trained
from ..errors import Error
from ..model.diffusion_gemma import DiffusionGemma
from .batches import NOISE, draws
from .distill import along_schedule
from .exchange import BY_ITSELF, Arrays, Together, summed
from .objective import Losses, Noised, Objective, Sample, losses, noised
from .optimizers import make_optimizer
from .settings import Settings

# What rank 0 tells the others beside the number of an iteration.
COLLECT = b"collect"


class Diverged(Error):
    """A loss or gradient that is not finite; the weights are those before it."""


@dataclass(frozen=True)
class Step:
    """What an iteration came to. `norm` is the gradient's where the weights were updated."""

    loss: float
    denoising: float
    reading: float
    tokens: int
    norm: float | None


def put(model: DiffusionGemma, weights: Arrays) -> None:
    """Give a model its trained parameters."""
    model.update(tree_unflatten(list(weights.items())))


def gradients_of(
    model: DiffusionGemma,
    weights: Arrays,
    batch: Noised,
    objective: Objective,
    *,
    checkpointed: bool = False,
) -> tuple[Losses, Arrays]:
    """Losses of a batch, and their gradient by the weights. Nothing is evaluated."""

    def total(given: Arrays) -> tuple[mx.array, mx.array, mx.array]:
        put(model, given)
        found = losses(model, batch, objective, checkpointed=checkpointed)
        return found.total, found.denoising, found.reading

    try:
        (loss, denoising, reading), gradients = mx.value_and_grad(total)(weights)
    finally:
        put(model, weights)
    return Losses(denoising, reading, loss), gradients


def scalar(value: mx.array) -> float:
    """A scalar; waits until it is computed."""
    return float(np.array(value))


class Trainer:
    """Holds what changes while a model is trained: weights, optimizer, gradients so far.

    Several ranks may learn together. Each has all weights, and gradients of its part of a batch;
    the sums of these change all weights alike.
    """

    def __init__(
        self,
        model: DiffusionGemma,
        settings: Settings,
        end_token: int,
        together: Together = BY_ITSELF,
    ):
        self.model, self.settings = model, settings
        self.together, self.share = together, together.share
        self.objective = Objective(encoder_weight=settings.encoder_weight)
        self.end_token = end_token
        self.optimizer = make_optimizer(settings)
        self.weights = trained(model)
        self.optimizer.init(self.weights)
        self.gradients: Arrays | None = None  # summed since the last update, of this rank

    @property
    def learning_rate(self) -> float:
        """That of the last update."""
        return float(self.optimizer.learning_rate.item())

    def take(self, weights: Arrays, gradients: Arrays, optimizer: Arrays) -> None:
        """Go on from other weights, sums of gradients and arrays of the optimizer."""
        # In the order that they had: the length of a gradient is a sum over all of them.
        self.weights = weights = {name: weights[name] for name in self.weights}
        self.gradients = {name: gradients[name] for name in weights} if gradients else None
        state: dict[str, Any] = {}
        for name, array in optimizer.items():
            owner, _, leaf = name.rpartition(".")
            if owner:
                state.setdefault(owner, {})[leaf] = array
            else:
                state[name] = array
        self.optimizer.state = state
        put(self.model, weights)
        mx.eval(weights, gradients, state)

    def batch(self, samples: Sequence[Sample], iteration: int) -> Noised:
        """What an iteration asks: its noise follows from the seed and its number."""
        rng = draws(self.settings.seed, NOISE, iteration)
        config, share = self.model.config, self.share
        batch = noised(samples, rng, config, self.end_token, self.objective, share=share)
        if self.settings.distill is None:
            return batch
        self.model.eval()
        return along_schedule(self.model, batch, rng, self.settings.distill)

    def step(self, samples: Sequence[Sample], iteration: int) -> Step:
        """Learn from a batch; the weights change where enough gradients are summed.

        Raises:
            Diverged: before anything changes.
        """
        self.together.tell(b"%d" % iteration)
        found, gradients = self._of_part(samples, iteration)
        if self.gradients is not None:
            gradients = tree_map(mx.add, gradients, self.gradients)
        mx.eval(found.total, found.denoising, found.reading, gradients)
        total, denoising, reading = self.share.sums(found.total, found.denoising, found.reading)
        _check(total, "the loss", iteration)
        norm = None
        if iteration % self.settings.grad_accumulation_steps:
            self.gradients = gradients
        else:
            norm = self._update(gradients, iteration)
        tokens = sum(each.length for each in samples)
        return Step(scalar(total), scalar(denoising), scalar(reading), tokens, norm)

    def collect(self) -> None:
        """Put all ranks' gradients since the last update together in rank 0, for it to save."""
        if self.share.size == 1 or (not self.share.rank and self.gradients is None):
            return
        self.together.tell(COLLECT)
        zeros = {name: mx.zeros_like(each) for name, each in self.weights.items()}
        found = summed(self.share, self.gradients or zeros)
        self.gradients = None if self.share.rank else found

    def _of_part(self, samples: Sequence[Sample], iteration: int) -> tuple[Losses, Arrays]:
        """Losses and gradients of this rank's part of a batch, the last one of an epoch perhaps
        none."""
        if not samples[self.share.rank :: self.share.size]:
            nothing = mx.zeros(())
            zeros = {name: mx.zeros_like(each) for name, each in self.weights.items()}
            return Losses(nothing, nothing, nothing), zeros
        # Dropout draws from MLX's own generator, which others use between two steps.
        seed = self.settings.seed + (iteration << 32) + (self.share.rank << 56)
        mx.random.seed(seed & (1 << 64) - 1)
        batch = self.batch(samples, iteration)
        self.model.train()
        return gradients_of(
            self.model,
            self.weights,
            batch,
            self.objective,
            checkpointed=self.settings.grad_checkpoint,
        )

    def _update(self, gradients: Arrays, iteration: int) -> float:
        """Change the weights; gives the length of the gradient."""
        count = self.settings.grad_accumulation_steps
        if count > 1:
            gradients = {name: each / count for name, each in gradients.items()}
        gradients, norm = clip_grad_norm(  # type: ignore[no-untyped-call]
            summed(self.share, gradients), self.settings.max_grad_norm or float("inf")
        )
        _check(norm, "the gradient", iteration)
        self.gradients = None
        self.weights = self.optimizer.apply_gradients(gradients, self.weights)
        put(self.model, self.weights)
        mx.eval(self.weights, self.optimizer.state)
        return scalar(norm)


def _check(value: mx.array, what: str, iteration: int) -> None:
    if not mx.isfinite(value).item():
        raise Diverged(
            f"{what} of iteration {iteration} is not a finite number: with a lower "
            "--learning-rate, --resume goes on from what was saved last, --resume-adapter-file "
            "from a checkpoint"
        )
