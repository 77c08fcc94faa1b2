"""The reference (transformers) under test conditions: random checkpoints and recorded runs."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import torch
from transformers.models.diffusion_gemma import generation_diffusion_gemma as generation
from transformers.models.diffusion_gemma.configuration_diffusion_gemma import (
    DiffusionGemmaConfig,
    DiffusionGemmaTextConfig,
)
from transformers.models.diffusion_gemma.modeling_diffusion_gemma import (
    DiffusionGemmaForBlockDiffusion,
)
from transformers.models.gemma4.configuration_gemma4 import Gemma4VisionConfig

from mlx_diffgemma.diffusion.constraints import Choices, best, merge

# The models here are so small that threads would mostly wait for each other.
torch.set_num_threads(1)

STEPS = 8  # of a canvas, unless the stop rule fires
NO_EOS = 10**6  # an end token that no vocabulary here has

# Small enough that a run takes a second, wide enough that no two dimensions agree by accident.
TEXT = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "moe_intermediate_size": 40,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "global_head_dim": 32,
    "num_global_key_value_heads": 1,
    "num_experts": 6,
    "top_k_experts": 2,
    "sliding_window": 64,
    "max_position_embeddings": 4096,
    "use_bidirectional_attention": "vision",
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "patch_size": 4,
    "position_embedding_size": 16,
}
SAMPLER = {
    "max_denoising_steps": STEPS,
    "sampler_config": {"_cls_name": "EntropyBoundSamplerConfig", "entropy_bound": 0.1},
    "t_min": 0.4,
    "t_max": 0.8,
    "stability_threshold": 1,
    "confidence_threshold": 0.005,
    "max_new_tokens": 24,
    "eos_token_id": [NO_EOS],
    "pad_token_id": 0,
}


def layer_types(pattern: str) -> list[str]:
    """ "ssf" -> sliding, sliding, full."""
    return [{"s": "sliding_attention", "f": "full_attention"}[kind] for kind in pattern]


def random_checkpoint(
    directory: Path,
    pattern: str = "sf",
    canvas: int = 24,
    shipped_dialect: bool = True,
    seed: int = 0,
    absent: tuple[str, ...] = (),
    text: dict[str, Any] | None = None,
    sampler: dict[str, Any] | None = None,
) -> DiffusionGemmaForBlockDiffusion:
    """Write a checkpoint with lively random weights as transformers does; the model stays here.

    `shipped_dialect` rewrites config.json to the keys of the published checkpoint; `absent` names
    keys that it then leaves out.
    """
    torch.manual_seed(seed)
    text_config = {**TEXT, **(text or {}), "num_hidden_layers": len(pattern)}
    config = DiffusionGemmaConfig(
        text_config=DiffusionGemmaTextConfig(**text_config, layer_types=layer_types(pattern)),
        vision_config=Gemma4VisionConfig(**VISION),
        canvas_length=canvas,
    )
    model = DiffusionGemmaForBlockDiffusion(config).eval()
    with torch.no_grad():
        for name, parameter in [*model.named_parameters(), *model.named_buffers()]:
            if any(part in name for part in ("vision", "inv_freq", "embed_scale")):
                continue  # vision is not used; the rest is computed, not learnt
            if name.endswith(("norm.weight", "_1.weight", "_2.weight", "scale", "layer_scalar")):
                parameter.uniform_(0.6, 1.4)  # norms, scales and scalars: each one its own
            elif "self_conditioning" in name:
                # Stronger feedback makes the loop of a random model chaotic: float32 rounding
                # then grows tenfold a step, in the reference against itself as well.
                parameter.normal_(0, 0.06)
            else:
                parameter.normal_(0, 0.25)
    values = {**SAMPLER, **(sampler or {})}
    model.generation_config = generation.DiffusionGemmaGenerationConfig(
        **json.loads(json.dumps(values))
    )
    model.save_pretrained(directory)
    (directory / "generation_config.json").write_text(json.dumps(values))
    if shipped_dialect:
        path = directory / "config.json"
        saved = json.loads(path.read_text())
        saved["text_config"].pop("per_layer_config")
        saved["text_config"]["layer_types"] = layer_types(pattern)  # not what was made of them
        for key in ("global_head_dim", "num_global_key_value_heads"):
            saved["text_config"][key] = text_config[key]
        for key in absent:
            saved["text_config"].pop(key, None)  # transformers leaves some defaults out itself
        path.write_text(json.dumps(saved))
    return model


@dataclass
class Run:
    """What a run of the reference drew and did, a list entry a draw or step.

    `tempered` are the logits divided by the step's temperature; `ends` counts the steps up to the
    end of each canvas.
    """

    token_draws: list[np.ndarray] = field(default_factory=list)
    gumbel_draws: list[np.ndarray] = field(default_factory=list)
    accepted: list[np.ndarray] = field(default_factory=list)
    canvas: list[np.ndarray] = field(default_factory=list)
    argmax: list[np.ndarray] = field(default_factory=list)
    logits: list[np.ndarray] = field(default_factory=list)
    tempered: list[np.ndarray] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    sequence: list[int] = field(default_factory=list)
    tokens_per_forward: float = 0.0


class Replay:
    """Our `Draws`, handing out what the reference drew, in its order."""

    def __init__(self, run: Run):
        self._tokens = iter(run.token_draws)
        self._gumbel = iter(run.gumbel_draws)

    def tokens(self, shape: tuple[int, ...]) -> mx.array:
        drawn = next(self._tokens)
        assert drawn.shape == shape
        return mx.array(drawn.astype(np.int32))

    def gumbel(self, shape: tuple[int, ...]) -> mx.array:
        drawn = next(self._gumbel)
        assert drawn.shape == shape
        return mx.array(drawn)

    def categorical(self, shape: tuple[int, ...]) -> "_OneStage":
        drawn = next(self._gumbel)
        assert drawn.shape[:2] == shape
        return _OneStage(mx.array(drawn))


class _OneStage:
    """A number a token of the vocabulary, as torch draws them."""

    def __init__(self, gumbel: mx.array):
        self._gumbel = gumbel
        self._best: list[Choices] = []
        self.state: list[mx.array] = []

    def add(self, weights: mx.array, peak: mx.array, first: int) -> mx.array:
        noise = self._gumbel[..., first : first + weights.shape[-1]]
        self._best.append(best(mx.log(weights) + peak + noise, first))
        return weights.sum(axis=-1, keepdims=True)

    def tokens(self) -> mx.array:
        return merge(self._best).tokens[..., 0]


class _Streamer:
    def __init__(self, run: Run):
        self.run = run

    def put(self, value: torch.Tensor) -> None:
        if self.run.argmax:  # the prompt is put too, before the first step
            self.run.ends.append(len(self.run.argmax))

    def put_draft(self, value: torch.Tensor) -> None:
        self.run.argmax.append(value.numpy().copy())

    def end(self) -> None:
        pass


def record(
    model: DiffusionGemmaForBlockDiffusion, prompt: list[int], seed: int, **flags: Any
) -> Run:
    """Generate with the reference and note every draw, mask and canvas.

    torch.multinomial draws one exponential q a category and takes argmax(p / q); -log q is then
    the Gumbel noise of the same draw, checked here against what multinomial returned.
    """
    run = Run()
    randint, multinomial = torch.randint, torch.multinomial
    accept = generation.EntropyBoundSampler.accept_canvas
    renoise = generation.EntropyBoundSampler.renoise_canvas
    forward = type(model).forward

    def spy_randint(*args: Any, **kwargs: Any) -> torch.Tensor:
        drawn = randint(*args, **kwargs)
        run.token_draws.append(drawn.numpy().copy())
        return drawn

    def spy_multinomial(probs: torch.Tensor, num_samples: int) -> torch.Tensor:
        state = torch.get_rng_state()
        q = torch.empty_like(probs).exponential_(1)
        torch.set_rng_state(state)
        drawn = multinomial(probs, num_samples=num_samples)
        assert torch.equal((probs / q).argmax(-1, keepdim=True), drawn)
        run.gumbel_draws.append(-torch.log(q).numpy()[None])
        return drawn

    def spy_accept(
        self: Any, canvas: torch.Tensor, sampled: torch.Tensor, logits: torch.Tensor, step: int
    ) -> torch.Tensor:
        run.tempered.append(logits.numpy().copy())
        return accept(self, canvas, sampled, logits, step)

    def spy_renoise(self: Any, accepted: torch.Tensor, step: int) -> torch.Tensor:
        canvas = renoise(self, accepted, step)
        run.accepted.append(self.accepted_token_mask.numpy().copy())
        run.canvas.append(canvas.numpy().copy())
        return canvas

    def spy_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = forward(self, *args, **kwargs)
        run.logits.append(out.logits.numpy().copy())
        return out

    torch.manual_seed(seed)
    torch.randint, torch.multinomial = spy_randint, spy_multinomial
    generation.EntropyBoundSampler.accept_canvas = spy_accept
    generation.EntropyBoundSampler.renoise_canvas = spy_renoise
    type(model).forward = spy_forward
    try:
        out = model.generate(torch.tensor([prompt]), streamer=_Streamer(run), **flags)
    finally:
        torch.randint, torch.multinomial = randint, multinomial
        generation.EntropyBoundSampler.accept_canvas = accept
        generation.EntropyBoundSampler.renoise_canvas = renoise
        type(model).forward = forward
    run.sequence = out.sequences[0, len(prompt) :].tolist()
    run.tokens_per_forward = float(out.tokens_per_forward[0])
    return run
