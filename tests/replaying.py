"""Our loop with the reference's draws, and what must be equal then."""

import numpy as np
import torch
from reference import Run
from torch.distributions import Categorical

from mlx_diffgemma.diffusion.decoding import drive
from mlx_diffgemma.diffusion.denoise import DenoisingState
from mlx_diffgemma.diffusion.draws import Draws
from mlx_diffgemma.diffusion.guards import trust
from mlx_diffgemma.diffusion.prompt_cache import PromptCache
from mlx_diffgemma.model.diffusion_gemma import DiffusionGemma
from mlx_diffgemma.tasks.canvases import Committed, decode_tokens
from mlx_diffgemma.tasks.starts import Noise


def steps_of(
    model: DiffusionGemma,
    prompt: list[int],
    draws: Draws,
    chunk: int = 10_000,
    prompt_cache: PromptCache | None = None,
) -> tuple[list[DenoisingState], list[int]]:
    """Every state of a run and all committed tokens."""
    snapshots, tokens = [], []
    start = Noise(model.config.canvas_length)
    cache = prompt_cache or PromptCache(model)
    tokens_of = decode_tokens(model, prompt, model.generation, draws, chunk, start, cache, trust)
    for item in drive(model, tokens_of):
        if isinstance(item, DenoisingState):
            snapshots.append(item)
        elif isinstance(item, Committed):
            tokens += item.tokens
    return snapshots, tokens


def assert_same(snapshots: list[DenoisingState], tokens: list[int], run: Run) -> None:
    """As many steps; each step's accepted mask, canvas, argmax, self-conditioning; same result."""
    assert len(snapshots) == len(run.argmax)
    for i, state in enumerate(snapshots):
        assert np.array_equal(np.array(state.accepted), run.accepted[i]), f"accepted, pass {i}"
        assert np.array_equal(np.array(state.canvas), run.canvas[i]), f"canvas, pass {i}"
        assert np.array_equal(np.array(state.argmax), run.argmax[i]), f"argmax, pass {i}"
        chances = Categorical(logits=torch.tensor(run.tempered[i]))
        nats, most = chances.entropy().numpy(), chances.probs.amax(dim=-1).numpy()
        assert np.abs(np.array(state.entropy) - nats).max() <= 1e-3, f"entropy, pass {i}"
        assert np.abs(np.array(state.probability) - most).max() <= 1e-3, f"probability, pass {i}"
    assert tokens == run.sequence[: len(tokens)]
