"""mlx-diffgemma for `compare_mlx_vlm.py`."""

import json
from pathlib import Path
from time import perf_counter

from worker import Answer, between, main, now

from mlx_diffgemma import Done, Draft, PromptCache, load, stream_generate


class System:
    """See `worker.py`."""

    def __init__(self, directory: str):
        # On a CPU the default is float32, whatever is stored.
        dtype = json.loads((Path(directory) / "config.json").read_text())["dtype"]
        self._model, self._tokenizer = load(directory, dtype=dtype)
        self._context: PromptCache | None = None

    def remember(self) -> None:
        """Keep what was read."""
        self._context = PromptCache(self._model)

    def answer(self, prompt: list[int], steps: int, max_tokens: int) -> Answer:
        started = perf_counter()
        drafts: list[tuple[float, float]] = []
        for event in stream_generate(
            self._model,
            self._tokenizer,
            prompt,
            steps=steps,
            max_tokens=max_tokens,
            seed=0,
            context=self._context,
        ):
            if isinstance(event, Draft):
                drafts.append(now())
                tokens = list(event.tokens)
            elif isinstance(event, Done):
                done = event
        seconds = perf_counter() - started
        # Steps 3 to the last but one, as of mlx-vlm, which waits in those alone.
        clock, cpu = between(drafts[1:-1])
        return Answer(
            seconds=seconds,
            first=drafts[0][0] - started,
            prompt_seconds=done.prompt_seconds,
            steps=done.denoising_steps,
            step_seconds=clock,
            step_cpu=cpu,
            tokens=tokens[: done.generated_tokens],
        )


if __name__ == "__main__":
    main(System)
