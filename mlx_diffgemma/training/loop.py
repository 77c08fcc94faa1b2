"""A run of fine-tuning: iterations, and between them reports, measurements and saved files.

What is drawn in an iteration follows from the seed and its number. So a run that goes on needs the
weights, the optimizer's arrays and the gradients summed so far, and comes to the same numbers.
"""

import hashlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ..text.tokenizer import Tokenizer
from .batches import Batches
from .data import Data, Example
from .events import (
    Event,
    Finished,
    Logged,
    Measuring,
    Saved,
    Started,
    Stepped,
    Stopped,
    Succeeded,
    Trained,
    Validated,
)
from .folder import Arrays, Folder, Progress, RunError, Stored
from .measuring import Stop, answer_cases, answerable, clear_cache, validate
from .step import Step, Trainer

_SUMMED = ("batches", "loss", "denoising", "reading", "tokens", "seconds")


@dataclass(frozen=True)
class Run:
    """What is trained, on what, and where it is kept; `stopped` is asked between steps."""

    trainer: Trainer
    tokenizer: Tokenizer
    data: Data
    folder: Folder
    stopped: Stop = lambda: False

    def train(self, progress: Progress | None = None) -> Iterator[Event]:
        """Train from the first iteration, or from where a run has come to (see `resume`).

        Raises:
            Diverged: a loss is not finite; what was saved stays.
            RunError: a file cannot be written.
        """
        for event in self._events(progress or Progress()):
            if isinstance(event, Logged):
                self.folder.log(event)
            yield event

    def _events(self, progress: Progress) -> Iterator[Event]:
        settings, weights = self.trainer.settings, self.trainer.weights
        samples = [each.sample for each in self.data.train]
        lengths = [each.length for each in samples]
        batches = Batches(lengths, settings.batch_size, settings.seed)
        saved = progress.iteration
        count = sum(each.size for each in weights.values())
        yield Started(progress.iteration, settings.iters, len(samples), count)
        while True:
            at = progress.iteration
            last = at == settings.iters
            if progress.evaluated < at and (last or not at % settings.steps_per_eval):
                yield from self._measure(progress)
            stopping = self.stopped()
            due = last or not at % settings.save_every
            if at and (stopping or due) and (saved < at or last):
                yield from self._save(progress, checkpoint=due)
                saved = at
            if last or stopping:
                break
            began = time.perf_counter()
            mx.reset_peak_memory()  # as answers do
            step = self.trainer.step([samples[i] for i in batches.at(at + 1)], at + 1)
            progress.iteration += 1
            _add(progress, step, time.perf_counter() - began)
            clear_cache(settings.clear_cache_threshold)
            yield Stepped(progress.iteration, step.loss)
            at = progress.iteration
            if at == settings.iters or not at % settings.steps_per_report:
                yield self._report(progress)
        self.folder.plot(last=True)
        if not last:
            yield Stopped(progress.iteration)
            return
        best = progress.best[0] if progress.best else None
        yield Finished(progress.iteration, progress.kept, best, progress.untrained)

    def _report(self, progress: Progress) -> Trained:
        """What the iterations since the last report came to."""
        sums, progress.since = progress.since, {}
        count, seconds = sums["batches"], max(sums["seconds"], 1e-9)
        return Trained(
            iteration=progress.iteration,
            loss=sums["loss"] / count,
            denoising=sums["denoising"] / count,
            reading=sums["reading"] / count,
            learning_rate=self.trainer.learning_rate,
            gradient_norm=progress.norm,
            iterations_per_second=count / seconds,
            tokens_per_second=sums["tokens"] / seconds,
            trained_tokens=progress.trained_tokens,
            peak_memory=round(sums["peak"]),
        )

    def _measure(self, progress: Progress) -> Iterator[Event]:
        """Measure, and keep the weights that answer best; what is stopped is measured again."""
        trainer, at = self.trainer, progress.iteration
        settings = trainer.settings
        found: list[Validated | Succeeded] = []
        cases = answerable(self.data.valid, settings.success_cases)
        events: list[Iterator[Measuring | Validated | Succeeded]] = []
        if self.data.valid and settings.val_batches:
            events.append(
                validate(
                    trainer.model,
                    self.data.valid,
                    settings,
                    trainer.end_token,
                    at,
                    self.stopped,
                )
            )
        if cases:
            events.append(
                answer_cases(trainer.model, self.tokenizer, cases, settings, at, self.stopped)
            )
        for each in events:
            for event in each:
                if isinstance(event, Validated | Succeeded):
                    found.append(event)
                yield event
        if len(found) < len(events):
            return  # it was stopped
        progress.evaluated = at
        self.folder.plot(last=False)
        if cases:
            yield from self._keep_better(progress, found)

    def _keep_better(
        self, progress: Progress, found: Sequence[Validated | Succeeded]
    ) -> Iterator[Saved]:
        """Write the weights where others are, if they answer more; of equals, the lower loss."""
        success = next(e.right / e.cases for e in found if isinstance(e, Succeeded))
        loss = next((e.loss for e in found if isinstance(e, Validated)), 0.0)
        if not progress.iteration:
            progress.untrained = success
        elif progress.best is None or [success, -loss] >= progress.best:
            progress.best = [success, -loss]
            yield self._keep(progress, success=success)

    def _keep(self, progress: Progress, **about: float) -> Saved:
        path = self.folder.save_best(self.trainer.weights, progress.iteration, **about)
        progress.kept = progress.iteration
        return Saved(progress.iteration, path.name, best=True)

    def _save(self, progress: Progress, *, checkpoint: bool) -> Iterator[Saved]:
        """Write the state, and at its turn a checkpoint. Where success says nothing about which
        weights are best, the last ones are kept."""
        self.trainer.collect()
        if progress.best is None:
            yield self._keep(progress)
        if checkpoint:
            path = self.folder.save_checkpoint(self.trainer.weights, progress.iteration)
            yield Saved(progress.iteration, path.name)
        self.folder.save_state(arrays_of(self.trainer), progress)


def _add(progress: Progress, step: Step, seconds: float) -> None:
    values = (1, step.loss, step.denoising, step.reading, step.tokens, seconds)
    since = progress.since
    for name, value in zip(_SUMMED, values, strict=True):
        since[name] = since.get(name, 0) + value
    since["peak"] = max(since.get("peak", 0), mx.get_peak_memory())
    progress.trained_tokens += step.tokens
    progress.norm = progress.norm if step.norm is None else step.norm


def arrays_of(trainer: Trainer) -> Arrays:
    """All arrays that a run needs to go on, by names that `put_arrays` reads."""
    found = {f"weights.{name}": array for name, array in trainer.weights.items()}
    for name, value in (trainer.gradients or {}).items():
        found[f"gradients.{name}"] = value
    for name, value in trainer.optimizer.state.items():
        if isinstance(value, dict):
            found |= {f"optimizer.{name}.{leaf}": array for leaf, array in value.items()}
        else:
            found[f"optimizer.{name}"] = value
    return found


def resume(trainer: Trainer, stored: Stored) -> Progress:
    """Bring a trainer to where a run has come.

    Raises:
        RunError: the state is of another model, adapter or optimizer.
    """
    own, given = arrays_of(trainer), stored.arrays
    summed = {name for name in given if name.startswith("gradients.")}
    expected = {name: (array.shape, array.dtype) for name, array in own.items()}
    for name in summed:
        expected[name] = expected.get(name.replace("gradients.", "weights.", 1), ((), mx.float32))
    found = {name: (array.shape, array.dtype) for name, array in given.items()}
    if found != expected:
        wrong = min(n for n in found.keys() | expected.keys() if found.get(n) != expected.get(n))
        raise RunError(f"the training state is of another run: {wrong} is not what it would be")
    put_arrays(trainer, given)
    return stored.progress


def put_arrays(trainer: Trainer, given: Arrays) -> None:
    """Go on from arrays that `arrays_of` has named."""
    kinds: dict[str, Arrays] = {"weights": {}, "gradients": {}, "optimizer": {}}
    for name, array in given.items():
        kind, _, rest = name.partition(".")
        kinds[kind][rest] = array
    trainer.take(**kinds)


def digest(examples: Sequence[Example]) -> str:
    """Tells examples from others: a run goes on with the same ones alone."""
    found = hashlib.sha256()
    for example in examples:
        for ids in (example.sample.prompt, example.sample.response):
            found.update(np.array([len(ids), *ids], np.int64).tobytes())
    return found.hexdigest()
