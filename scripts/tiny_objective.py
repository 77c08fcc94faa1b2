"""What the small models are trained for: denoising as the sampler will ask for it, and reading on.

A third of the rows are a first step, without self-conditioning; the others stand one or two steps
into the sampler's own loop: what it accepted, with its mistakes, and noise in all other places, or
a canvas noised from the right one. Noise alone would be seen at the first step only, and the first
step decides most of a short answer: it gets a large share.
"""

from dataclasses import dataclass

import torch
from tiny_model import Cache, Model, accepted, belief, losses
from torch import Tensor

PROMPT_WEIGHT = 0.1  # of the prompt's own tokens, whose content is random, in the reading loss


@dataclass(frozen=True)
class Batch:
    """Rows as tiny_batches.Rows has them, as tensors of int64; (rows,) `task` numbers."""

    prompt: Tensor
    target: Tensor
    start: Tensor
    pinned: Tensor
    length: Tensor
    task: Tensor


def first_canvas(batch: Batch, vocab: int) -> Tensor:
    """Canvases noised by a share t, which for half of the rows is all."""
    shape, device = batch.target.shape, batch.target.device

    def draw(*size: int) -> Tensor:
        return torch.rand(*size, device=device)

    rows = shape[0]
    noise = torch.randint(vocab, shape, device=device)
    level = torch.where(draw(rows, 1) < 0.45, 1.0, draw(rows, 1))
    noised = draw(*shape) < level
    canvas = torch.where(noised, noise, batch.target)
    # Most repairs start from the user's text, as editing does: with noise in it, and with what an
    # earlier step has accepted.
    own = (batch.start >= 0) & (draw(rows, 1) < 0.8)
    text = torch.where(noised | (draw(rows, 1) < 0.5), batch.start, batch.target)
    stray = (draw(*shape) < 0.55 * draw(rows, 1)) & (batch.start != 1)
    canvas = torch.where(own, torch.where(stray, noise, text), canvas)
    return torch.where(batch.pinned > 0, batch.target, canvas)


def loss_of(model: Model, batch: Batch, reading: bool, unroll: int = 2) -> tuple[Tensor, Tensor]:
    """Denoising loss of each row per token of its answer, and the reading loss, 0 if not asked."""
    device = batch.prompt.device
    rows, width = batch.prompt.shape
    table = model.embed_tokens.weight
    real = batch.prompt > 0
    read = torch.zeros(rows, device=device)
    if reading:
        whole = torch.cat([batch.prompt, batch.target], dim=1)
        seen = torch.cat([real, torch.ones_like(batch.target, dtype=torch.bool)], dim=1)
        hidden, cache = model.encode(whole, seen)
        order = torch.arange(batch.target.shape[1], device=device)
        weight = torch.cat([PROMPT_WEIGHT * real, order < batch.length], dim=1)[:, 1:]
        each = losses(hidden[:, :-1].contiguous(), table, whole[:, 1:].contiguous())
        read = (each * weight).sum(1) / batch.length[:, 0]
        # The decoder must not see past the prompt.
        cache = [(keys[:, :, :width], values[:, :, :width]) for keys, values in cache]
    else:
        _, cache = model.encode(batch.prompt, real)
    return denoising_loss(model, batch, cache, real, unroll=unroll), read


def denoising_loss(
    model: Model,
    batch: Batch,
    cache: Cache,
    real: Tensor,
    first: Tensor | None = None,
    unroll: int = 2,
) -> Tensor:
    """Loss of each row per token of its answer, whose canvas stands behind the cache."""
    device = batch.target.device
    rows = len(batch.target)
    table, vocab = model.embed_tokens.weight, model.shape.vocab
    canvas = first_canvas(batch, vocab)
    believed = torch.zeros(*canvas.shape, model.shape.hidden, device=device)
    moves = torch.rand(rows, 1, device=device) < 0.65
    with torch.no_grad():
        for i in range(unroll):
            # Rows are in no order: the first ones go on for longest.
            some = slice(0, rows * (unroll - i) // (unroll + 1))
            past = [(keys[some], values[some]) for keys, values in cache]
            place = None if first is None else first[some]
            hidden = model.decode(canvas[some], believed[some], past, real[some], place)
            shape = canvas[some].shape
            temperature = 0.4 + 0.6 * torch.rand(shape[0], 1, 1, device=device)
            uniform = torch.rand(*shape, vocab, device=device)
            soft, entropy, _, drawn = belief(hidden, table, temperature, uniform)
            pinned, start, target = batch.pinned[some] > 0, batch.start[some], batch.target[some]
            entropy = torch.where(pinned, 0.0, entropy)
            noise = torch.randint(vocab, shape, device=device)
            after = torch.where(accepted(entropy), drawn, torch.where(start >= 0, start, noise))
            after = torch.where(pinned, target, after)
            canvas = torch.cat([torch.where(moves[some], after, canvas[some]), canvas[some.stop :]])
            soft = torch.where(pinned[..., None], model.embed(target), soft)
            believed = torch.cat([soft, believed[some.stop :]])
    hidden = model.decode(canvas, believed, cache, real, first)
    each = losses(hidden, table, batch.target)
    return each.sum(1) / batch.length[:, 0]


@torch.no_grad()
def sample(
    model: Model, batch: Batch, steps: int = 48, pictures: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Canvases as the package's sampler writes them, without its constraints; and their steps."""
    vocab, device = model.shape.vocab, batch.prompt.device
    real = batch.prompt > 0
    pinned, own = batch.pinned > 0, batch.start >= 0
    _, cache = model.encode(batch.prompt, real, pictures)
    noise = torch.randint(vocab, batch.target.shape, device=device)
    canvas = torch.where(own, batch.start, noise)
    editing = own[:, :1]
    stray = editing & (torch.rand(canvas.shape, device=device) < 0.4) & (batch.start != 1)
    canvas = torch.where(pinned, batch.target, torch.where(stray, noise, canvas))
    believed = torch.zeros(*canvas.shape, model.shape.hidden, device=device)
    result, done = canvas, torch.zeros(len(canvas), 1, dtype=torch.bool, device=device)
    taken = torch.zeros(len(canvas), device=device)
    for step in range(1, steps + 1):
        # An edit enters the schedule at its last 0.4.
        place = torch.where(editing, min(step + round(0.6 * (steps - 1)), steps), step)
        temperature = 0.4 + 0.4 * (steps - place + 1)[..., None] / steps
        hidden = model.decode(canvas, believed, cache, real)
        uniform = torch.rand(*canvas.shape, vocab, device=device)
        soft, entropy, best, drawn = belief(hidden, model.embed_tokens.weight, temperature, uniform)
        best = torch.where(pinned, batch.target, best)
        entropy = torch.where(pinned, 0.0, entropy)
        noise = torch.randint(vocab, canvas.shape, device=device)
        canvas = torch.where(accepted(entropy), drawn, torch.where(own, batch.start, noise))
        canvas = torch.where(pinned, batch.target, canvas)
        believed = torch.where(pinned[..., None], model.embed(batch.target), soft)
        free = (~pinned).sum(1, keepdim=True).clamp(min=1)
        taken += ~done[:, 0]
        last = result
        result = torch.where(done, result, best)
        sure = entropy.sum(1, keepdim=True) / free < 0.005
        done = done | (sure & (last == best).all(1, keepdim=True) & (step > 1))
        if step % 8 == 0 and done.all():
            break
    return result, taken


@torch.no_grad()
def read_on(model: Model, batch: Batch) -> Tensor:
    """What the encoder writes, the best token at a time."""
    written = batch.prompt
    ids = torch.full_like(batch.target, 1)
    over = torch.zeros(len(written), dtype=torch.bool, device=written.device)
    for i in range(ids.shape[1]):
        real = torch.cat([batch.prompt > 0, torch.ones_like(ids[:, :i], dtype=torch.bool)], dim=1)
        hidden, _ = model.encode(written, real)
        ids[:, i] = torch.where(over, 1, model.logits(hidden[:, -1]).argmax(-1))
        over = over | (ids[:, i] == 6)
        written = torch.cat([written, ids[:, i : i + 1]], dim=1)
        if over.all():
            break
    return ids


def right(written: Tensor, batch: Batch) -> Tensor:
    """Whether each canvas is right up to its end token."""
    order = torch.arange(written.shape[1], device=written.device)
    return ((written == batch.target) | (order >= batch.length)).all(1)
