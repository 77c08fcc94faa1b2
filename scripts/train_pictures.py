"""Train a small model that sees, on one core, and export it.

    nice python scripts/train_pictures.py --work DIR --eyes 1000 --minutes 25

First the vision tower learns to see for so many steps (scripts/tiny_tower.py), then the text model
to answer behind what the tower makes, for so many minutes of the core over all runs, however many
others share it. `DIR/tiny_vision` is written in Hugging Face layout, again every few minutes; run
it again to resume. Objective and optimiser are those of the other small models
(scripts/train_tiny.py).
"""

import argparse
import json
import math
import os
import random
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from tiny_batches import END, EOS, PAD
from tiny_model import Model, Shape, losses
from tiny_objective import Batch, denoising_loss, right, sample
from tiny_optimiser import Optimiser
from tiny_pictures import KINDS, PLACES, Question, Scene, draw, draw_scene, held_out, questions
from tiny_tower import (
    BUDGET,
    CONFIG,
    OBJECTS,
    PAINTS,
    SIDE,
    TOKENS,
    WIDTH,
    Heads,
    Tower,
    labels_of,
    patches_of,
    pixels_of,
)
from tokenizers import Regex, Tokenizer, pre_tokenizers, trainers
from torch import Tensor, nn
from train_tiny import SHIPPED, export

CANVAS = 16  # tokens of an answer with what fills it
ASKED = 12  # tokens of a question with what stands behind it, at most
VOCAB = 504
EACH = 4  # questions of a picture in a batch
WORDS = r'▁?[A-Za-z]+|[\[\]{},":]+(?:[a-z]+":)?"?|[\s\S]'
BEFORE = "<bos><|turn>user\n<|image>" + TOKENS * "<|image|>" + "<image|>"
AFTER = "{}<turn|>\n<|turn>model\n"
TEMPLATE = """{{ bos_token }}{% for m in messages -%}
<|turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}
{% if m['content'] is string %}{{ m['content'] | trim }}{% else %}{% for part in m['content'] -%}
{{ '<|image|>' if part['type'] == 'image' else part['text'] | trim }}{% endfor %}{% endif %}<turn|>
{% endfor %}{% if add_generation_prompt %}<|turn>model
{% endif %}"""


# Text --------------------------------------------------------------------------------------------


def make_tokenizer() -> Tokenizer:
    """The shipped one with other merges: of whole words, as there are so few."""
    rng = random.Random(1)
    asked = [q for _ in range(2000) for q in questions(rng, draw_scene(rng, False))]
    texts = [f"user\n{q.prompt}\nmodel\n{q.answer}" for q in asked]
    saved = json.loads((SHIPPED / "tokenizer.json").read_text())
    saved["pre_tokenizer"]["pattern"] = {"Regex": WORDS}
    old = list(saved["model"]["vocab"])
    base = old[: old.index("▁") + 1]
    learner = Tokenizer.from_str(json.dumps(saved))
    learner.pre_tokenizer = pre_tokenizers.Split(Regex(WORDS), "isolated")
    letters = [each for each in base if len(each) == 1]
    trainer = trainers.BpeTrainer(
        vocab_size=len(letters) + VOCAB - len(base),
        initial_alphabet=letters,
        limit_alphabet=len(letters),
        min_frequency=1,
        show_progress=False,
    )
    learner.train_from_iterator(texts, trainer)
    learnt = json.loads(learner.to_str())["model"]
    new = [each for each in learnt["vocab"] if each not in base]
    saved["model"]["vocab"] = {each: i for i, each in enumerate([*base, *new])}
    saved["model"]["merges"] = learnt["merges"]
    return Tokenizer.from_str(json.dumps(saved))


def rows(tokenizer: Tokenizer, asked: list[Question], whole: bool) -> Batch:
    """Questions as rows; `whole` prompts are padded on the left, as all other models' are.

    Else they are what stands behind the picture, with the answer and `<eos>` after it.
    """
    texts = [(BEFORE if whole else "") + AFTER.format(q.prompt) for q in asked]
    prompts = tokenizer.encode_batch(texts, add_special_tokens=False)
    answers = tokenizer.encode_batch([q.answer for q in asked], add_special_tokens=False)
    width = max(len(prompt.ids) for prompt in prompts)
    prompt = torch.full((len(asked), width if whole else ASKED + CANVAS), PAD if whole else EOS)
    target = torch.full((len(asked), CANVAS), EOS)
    for i, (before, answer) in enumerate(zip(prompts, answers, strict=True)):
        ids = [*answer.ids, END]
        target[i, : len(ids)] = torch.tensor(ids)
        if whole:
            prompt[i, width - len(before.ids) :] = torch.tensor(before.ids)
        else:
            prompt[i, : len(before.ids) + len(ids)] = torch.tensor([*before.ids, *ids])
    return Batch(
        prompt=prompt,
        target=target,
        start=torch.full_like(target, -1),
        pinned=torch.zeros_like(target),
        length=torch.tensor([[len(answer.ids) + 1] for answer in answers]),
        task=torch.tensor([KINDS.index(q.kind) for q in asked]),
    )


# Pictures ----------------------------------------------------------------------------------------


class Album:
    """The latest pictures; some are new in each batch, as drawing takes time."""

    def __init__(self, seed: int, digits: float = 0.6, most: int = 12_000):
        self.rng, self._digits = random.Random(seed), digits
        self._most, self._next = most, 0
        self.scenes: list[Scene] = []
        self._pixels = np.zeros((most, SIDE, SIDE, 3), np.uint8)
        self._features = torch.zeros(most, TOKENS, WIDTH)

    @torch.no_grad()
    def grow(self, count: int, tower: Tower | None = None) -> None:
        """Draw new pictures in the place of the oldest, and look at them."""
        first = self._next % self._most
        count = min(count, self._most - first)
        for place in range(first, first + count):
            scene = draw_scene(self.rng, False, self._digits)
            self._pixels[place] = pixels_of(draw(self.rng, scene))
            self.scenes[place : place + 1] = [scene]
        self._next += count
        if tower is not None:
            some = slice(first, first + count)
            self._features[some] = tower.features(patches_of(self._pixels[some]))

    def draw(self, count: int) -> tuple[list[Scene], npt.NDArray[np.uint8], Tensor]:
        """Scenes, pixels and features of so many."""
        chosen = [self.rng.randrange(len(self.scenes)) for _ in range(count)]
        return [self.scenes[i] for i in chosen], self._pixels[chosen], self._features[chosen]


# Run ---------------------------------------------------------------------------------------------


def open_eyes(tower: Tower, work: Path, steps: int, seed: int) -> Heads:
    """Train the tower by its heads, or as much as is left of it; return the heads."""
    path = work / "eyes.pt"
    heads = Heads()
    both = nn.ModuleDict({"tower": tower, "heads": heads})
    tower.embed_vision.requires_grad_(False)
    optimiser = Optimiser(nn.ModuleDict({"tower": tower.vision_tower, "heads": heads}))
    tower.start()
    first = 0
    if path.exists():
        saved = torch.load(path)
        both.load_state_dict(saved["both"])
        first = saved["step"]
    if first < steps:
        album = Album(seed + first, digits=0.8)
        album.grow(600)
        if not first:
            tower.standardize(patches_of(album.draw(200)[1]))
        cases = held_out(200, 20)
        test = patches_of(np.stack([pixels_of(image) for _, image, _ in cases]))
        labels = labels_of([scene for scene, _, _ in cases])
        for step in range(first, steps):
            optimiser.factor.fill_(rate(step - first, step / steps))
            album.grow(6)
            drawn, seen, _ = album.draw(16)
            loss, _ = heads.loss(tower.features(patches_of(seen)), labels_of(drawn))
            loss.backward()
            advance(optimiser, both)
            if (step + 1) % 50 == 0 or step + 1 == steps:
                with torch.no_grad():
                    _, good = heads.loss(tower.features(test), labels)
                print(f"eyes {step + 1}: {loss.item():.3f}, {good.float().mean():.3f}", flush=True)
                torch.save({"both": both.state_dict(), "step": step + 1}, path)
        tower.standardize(patches_of(album.draw(400)[1]))
        torch.save({"both": both.state_dict(), "step": steps}, path)
    tower.embed_vision.requires_grad_(True)
    return heads


@torch.no_grad()
def align(tower: Tower, heads: Heads, table: Tensor, tokenizer: Tokenizer) -> None:
    """Let a token of a picture start as the words of what it shows, as far as the heads tell.

    What is to be said is then near what is seen: the text model has to copy it. From a random
    projection it takes several times as many steps.
    """
    ids = [[tokenizer.encode(each).ids for each in names] for names in (OBJECTS, PAINTS, PLACES)]
    sizes = [len(each) for each in ids]
    words = [torch.stack([table[each].mean(0) for each in kind]) for kind in ids]
    told = [each - each.mean(0) for each in heads.told.weight.split(sizes)]
    directions = [each / each.norm(dim=1, keepdim=True).clamp(min=1e-6) for each in told]
    both = zip(words, directions, strict=True)
    projection = sum(((w - w.mean(0)).T @ d for w, d in both), torch.zeros(table.shape[1], WIDTH))
    # Features are of size 1, and embeddings are multiplied by sqrt(hidden).
    size = 2 * table.std() * table.shape[1] ** 0.5
    projection *= size / projection.square().sum(1).mean().sqrt()
    random = tower.embed_vision.embedding_projection.weight
    random.copy_(projection + 0.1 * random)


def rate(step: int, part: float) -> float:
    """What learning rates are multiplied with."""
    warm = min(1.0, (step + 1) / 50)
    return warm * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * part)))


def advance(optimiser: Optimiser, module: nn.Module) -> None:
    """One step; gradients are gone after it."""
    optimiser.step()
    for parameter in module.parameters():
        parameter.grad = None


def loss_behind(
    model: Model, before: Tensor, pictures: Tensor, batch: Batch
) -> tuple[Tensor, Tensor]:
    """Denoising and reading losses of rows; several after each other are of one picture.

    What stands before the question is read once for each picture.
    """
    each = len(batch.prompt) // len(pictures)
    ids = before.expand(len(pictures), -1)
    _, cache = model.encode(ids, torch.ones_like(ids, dtype=torch.bool), pictures)
    cache = [(k.repeat_interleave(each, 0), v.repeat_interleave(each, 0)) for k, v in cache]
    hidden, cache = model.read_on(batch.prompt, cache)
    answer = (batch.prompt == END).int().argmax(1, keepdim=True) + 5  # <turn|>\n<|turn>model\n
    order = torch.arange(CANVAS)
    places = (answer + order).clamp(max=batch.prompt.shape[1]) - 1
    hidden = hidden.gather(1, places[..., None].expand(-1, -1, hidden.shape[-1]))
    wrong = losses(hidden, model.embed_tokens.weight, batch.target) * (order < batch.length)
    first = before.shape[1] + answer
    # The decoder must not see past the prompt.
    real = torch.arange(cache[0][0].shape[2]) < first
    return denoising_loss(model, batch, cache, real, first), wrong.sum(1) / batch.length[:, 0]


def save(model: Model, tower: Tower, tokenizer: Tokenizer, work: Path) -> None:
    """Write the checkpoint."""
    tokenizer.save(str(work / "tokenizer.json"))
    changes = {
        "canvas_length": CANVAS,
        "vision_config": CONFIG,
        "vision_soft_tokens_per_image": BUDGET,
    }
    export(model, work / "tiny_vision", work / "tokenizer.json", changes, tower)
    (work / "tiny_vision" / "chat_template.jinja").write_text(TEMPLATE)


def tested(model: Model, pictures: Tensor, batch: Batch) -> str:
    """Success on held-out pictures, of each kind and of all."""
    written, steps = sample(model, batch, pictures=pictures)
    good = right(written, batch).float()
    each = (f"{kind} {100 * good[batch.task == i].mean():.0f}" for i, kind in enumerate(KINDS))
    return f"{' '.join(each)} all {100 * good.mean():.1f} ({steps.mean():.1f} steps)"


class Run:
    """The text model's training: its state, and how far it is."""

    def __init__(self, tower: Tower, heads: Heads, tokenizer: Tokenizer, path: Path):
        shape = Shape(VOCAB, hidden=64, intermediate=128, expert=16, layers=3, heads=4, experts=4)
        self.model, self.tower, self.tokenizer, self.path = Model(shape), tower, tokenizer, path
        self.model.start()
        align(tower, heads, self.model.embed_tokens.weight, tokenizer)
        self.trained = nn.ModuleDict({"text": self.model, "embed_vision": tower.embed_vision})
        self.optimiser = Optimiser(self.trained)
        self.before = torch.tensor([tokenizer.encode(BEFORE, add_special_tokens=False).ids])
        self.step, self.spent = 0, 0.0
        self.sums: dict[int, Tensor] = defaultdict(lambda: torch.zeros(3))
        if path.exists():
            saved = torch.load(path)
            self.trained.load_state_dict(saved["trained"])
            self.optimiser.restore(saved["optimiser"])
            self.step, self.spent = saved["step"], saved["spent"]

    def save(self) -> None:
        """Write all that a later run needs."""
        state = {"trained": self.trained.state_dict(), "optimiser": self.optimiser.state()}
        fresh = self.path.with_name("new.pt")
        torch.save({**state, "step": self.step, "spent": self.spent}, fresh)
        os.rename(fresh, self.path)
        save(self.model, self.tower, self.tokenizer, self.path.parent)

    def advance(self, album: Album, pictures: int, part: float) -> None:
        """One step, on `EACH` questions of each picture."""
        scenes, _, features = album.draw(pictures)
        asked = []
        for scene in scenes:
            asked += [*questions(album.rng, scene), *questions(album.rng, scene)][:EACH]
        batch = rows(self.tokenizer, asked, whole=False)
        self.optimiser.factor.fill_(rate(self.step, part))
        embedded = self.tower.embed_vision(features)
        denoised, read = loss_behind(self.model, self.before, embedded, batch)
        (denoised.mean() + read.mean()).backward()
        advance(self.optimiser, self.trained)
        self.step += 1
        for task, *both in zip(batch.task.tolist(), denoised.tolist(), read.tolist(), strict=True):
            self.sums[task] += torch.tensor([*both, 1.0])

    def report(self) -> str:
        """Mean losses since the last report: denoising and reading."""
        told = {KINDS[k]: (v / v[2]).tolist() for k, v in sorted(self.sums.items())}
        self.sums.clear()
        means = " ".join(f"{k} {d:.3f}/{r:.3f}" for k, (d, r, _) in told.items())
        return f"{self.spent:.0f} s, step {self.step}: {means}"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="state and export go here")
    parser.add_argument("--eyes", type=int, default=1000, help="steps of the tower by itself")
    parser.add_argument("--minutes", type=float, default=25, help="of the core then, over all runs")
    parser.add_argument("--pictures", type=int, default=12, help="in a batch")
    parser.add_argument("--fresh", type=int, default=3, help="drawn for each batch")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--test", type=float, default=2, help="minutes between tests")
    return parser.parse_args()


def main() -> None:
    given = arguments()
    torch.manual_seed(given.seed)
    torch.set_num_threads(1)
    given.work.mkdir(parents=True, exist_ok=True)
    tower = Tower(64)
    heads = open_eyes(tower, given.work, given.eyes, given.seed)
    run = Run(tower, heads, make_tokenizer(), given.work / "state.pt")
    print(f"{sum(p.numel() for p in run.trained.parameters()) / 1e6:.2f} M of text", flush=True)
    cases = held_out(120, 20)
    test = rows(run.tokenizer, [question for _, _, question in cases], whole=True)
    with torch.no_grad():
        pixels = np.stack([pixels_of(image) for _, image, _ in cases])
        seen = run.tower.features(patches_of(pixels))
    album = Album(given.seed + 1 + run.step)
    while len(album.scenes) < 800:
        album.grow(50, run.tower)
    total = given.minutes * 60
    began, tested_at, told_at = time.process_time() - run.spent, run.spent, run.spent
    while run.spent < total:
        album.grow(given.fresh, run.tower)
        run.advance(album, given.pictures, run.spent / total)
        run.spent = time.process_time() - began
        if run.spent - told_at > 30 or run.spent >= total:
            told_at = run.spent
            print(run.report(), flush=True)
        if run.spent - tested_at > 60 * given.test or run.spent >= total:
            tested_at = run.spent
            run.save()
            with torch.no_grad():
                pictures = run.tower.embed_vision(seen)
            print(f"held out: {tested(run.model, pictures, test)}", flush=True)


if __name__ == "__main__":
    main()
