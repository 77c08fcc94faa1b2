"""mlx-vlm driven through its public entry points, on text alone; runs in its own environment."""

from collections.abc import Iterator
from time import perf_counter
from typing import Any

import mlx.core as mx
import mlx_vlm
from worker import Answer, between, main, now


def load(directory: str) -> tuple[Any, Any]:
    """Model and processor."""
    made: tuple[Any, Any] = mlx_vlm.load(directory)
    return made


def stream(
    model: Any,
    processor: Any,
    prompt: list[int],
    steps: int,
    max_tokens: int = 256,
    apc: Any = None,
) -> Iterator[Any]:
    """Its events, with the reference's sampler: its defaults are a greedy one of its own.

    `apc` is what its server keeps prompts in; the library's own users have no such thing here.
    """
    events: Iterator[Any] = mlx_vlm.stream_generate(
        model,
        processor,
        "",
        input_ids=mx.array([prompt]),
        max_tokens=max_tokens,
        max_denoising_steps=steps,
        temperature=1.0,
        diffusion_sampler="entropy-bound",
        diffusion_full_canvas=True,
        prefill_step_size=2048,
        **({"_apc_manager": apc} if apc is not None else {}),
    )
    return events


class System:
    """See `worker.py`."""

    def __init__(self, directory: str):
        self._model, self._processor = load(directory)
        self._apc: Any = None
        if mx.default_device() == mx.Device(mx.cpu):
            mx.gather_mm = in_float32(mx.gather_mm)

    def remember(self) -> None:
        """Keep prompts, as its server does."""
        from mlx_vlm.apc import APCManager

        self._apc = APCManager()

    def answer(self, prompt: list[int], steps: int, max_tokens: int) -> Answer:
        waits: list[tuple[float, float]] = []
        item = mx.array.item

        def timed(array: mx.array) -> Any:
            value = item(array)
            waits.append(now())
            return value

        # It says nothing before the end, but it waits once a step.
        mx.array.item = timed
        started = perf_counter()
        first = 0.0
        written: list[int] = []
        try:
            for event in stream(self._model, self._processor, prompt, steps, max_tokens, self._apc):
                first = first or perf_counter() - started
                if event.token is not None and not event.diffusion_block_complete:
                    written.append(int(event.token))
                last = event
        finally:
            mx.array.item = item
        seconds = perf_counter() - started
        # Of one canvas: it waits in steps 2 to the last but one.
        clock, cpu = between(waits[-(steps - 2) :] if steps > 3 else [])
        return Answer(
            seconds=seconds,
            first=first,
            prompt_seconds=last.prompt_tokens / last.prompt_tps,
            steps=last.diffusion_denoising_steps,
            step_seconds=clock,
            step_cpu=cpu,
            tokens=written,
        )


def in_float32(gather_mm: Any) -> Any:
    """MLX's CPU backend gathers in float32 only; on a Mac nothing is converted."""

    def gathered(a: mx.array, b: mx.array, **named: Any) -> mx.array:
        wide = gather_mm(a.astype(mx.float32), b.astype(mx.float32), **named)
        return wide.astype(a.dtype)

    return gathered


if __name__ == "__main__":
    main(System)
