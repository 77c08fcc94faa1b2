"""The optimiser of the small models: every step is in place, so that a CUDA graph can hold it."""

from collections import defaultdict

import torch
from torch import Tensor, nn

MUON, ADAM, DECAY = 0.012, 2e-3, 0.02


class Optimiser:
    """Muon (K. Jordan, 2024) for matrices, AdamW for embeddings, norms and scales.

    Attributes:
        factor: what the learning rates are multiplied with now, a tensor that may be filled.
    """

    def __init__(self, model: nn.Module):
        self.matrices: dict[tuple[int, ...], list[nn.Parameter]] = defaultdict(list)
        self.others: list[nn.Parameter] = []
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2 and "embed" not in name:
                self.matrices[tuple(parameter.shape)].append(parameter)
            else:
                self.others.append(parameter)
        self._all = list(model.parameters())
        device = self._all[0].device
        self.factor = torch.zeros((), device=device)
        self.count = torch.zeros((), device=device)
        self.momentum = [
            torch.zeros(len(group), *shape, device=device) for shape, group in self.matrices.items()
        ]
        self.first = [torch.zeros_like(p) for p in self.others]
        self.second = [torch.zeros_like(p) for p in self.others]

    def state(self) -> list[Tensor]:
        """All that a later run needs."""
        return [self.count, *self.momentum, *self.first, *self.second]

    def restore(self, saved: list[Tensor]) -> None:
        """Take over what `state` gave."""
        for own, other in zip(self.state(), saved, strict=True):
            own.copy_(other)

    @torch.no_grad()
    def step(self) -> None:
        """Clip the gradients to a norm of 1, and step."""
        gradients = [p.grad for p in self._all]
        total = torch.stack([g.square().sum() for g in gradients if g is not None]).sum().sqrt()
        scale = 1 / total.clamp(min=1.0)
        for momentum, group in zip(self.momentum, self.matrices.values(), strict=True):
            gradient = torch.stack([p.grad for p in group]) * scale
            momentum.mul_(0.95).add_(gradient)
            update = orthogonal(gradient + 0.95 * momentum)
            rows, columns = update.shape[-2:]
            rate = self.factor * MUON * max(1.0, rows / columns) ** 0.5
            for p, change in zip(group, update.unbind(), strict=True):
                p.mul_(1 - self.factor * MUON * DECAY).sub_(rate * change)
        self.count += 1
        for p, first, second in zip(self.others, self.first, self.second, strict=True):
            gradient = p.grad * scale
            first.lerp_(gradient, 0.1)
            second.lerp_(gradient.square(), 0.02)
            mean = first / (1 - 0.9**self.count)
            deviation = (second / (1 - 0.98**self.count)).sqrt() + 1e-8
            rate = self.factor * ADAM
            p.mul_(1 - rate * DECAY).sub_(rate * mean / deviation)


def orthogonal(x: Tensor) -> Tensor:
    """The nearest orthogonal matrices, nearly, by five Newton-Schulz steps."""
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = 3.4445 * x + (-4.775 * square + 2.0315 * square @ square) @ x
    return x.mT if tall else x
