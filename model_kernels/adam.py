"""Adam by PyTorch's fused kernel, and how its learning rate falls."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor


class Adam:
    """`torch.optim.Adam` by its fused kernel alone: over one vector, the rest of its step takes as long as the kernel.

    Args:
        parameters: what it trains; those without a gradient are left alone.
        lr: 0-d, read anew at every step, also by a captured one, and the caller's: no checkpoint holds it.
    """

    def __init__(self, parameters: Iterable[Tensor], lr: Tensor):
        self.parameters, self.lr = list(parameters), lr
        self.first = [torch.zeros_like(each) for each in self.parameters]  # moments
        self.second = [torch.zeros_like(each) for each in self.parameters]
        self.steps = [torch.zeros((), device=each.device) for each in self.parameters]

    def minimise(self, loss: Tensor) -> None:
        """One step down the gradient of a loss, 0-d."""
        self.zero_grad()
        loss.backward()
        self.step()

    def zero_grad(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    @torch.no_grad()
    def step(self) -> None:
        mine = zip(self.parameters, self.first, self.second, self.steps, strict=True)
        rows = [(each, each.grad, *state) for each, *state in mine if each.grad is not None]
        if not rows:
            return
        parameters, grads, first, second, steps = map(list, zip(*rows, strict=True))
        torch._foreach_add_(steps, 1)
        numbers = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0, "amsgrad": False, "maximize": False}
        torch._fused_adam_(parameters, grads, first, second, [], steps, lr=self.lr, **numbers)

    def state_dict(self) -> dict[str, list[Tensor]]:
        return {"first": self.first, "second": self.second, "steps": self.steps}

    def load_state_dict(self, state: dict[str, list[Tensor]]) -> None:
        """Raises KeyError, ValueError or RuntimeError where the state is that of other parameters."""
        for name, own in self.state_dict().items():
            for mine, stored in zip(own, state[name], strict=True):
                if mine.shape != stored.shape:
                    raise ValueError(f"Adam's state {name} of {list(stored.shape)} is not {list(mine.shape)}")
                mine.copy_(stored)


def cosine(share: float) -> float:
    """What is left of a learning rate that falls to 0 along a cosine, a share of the run behind, 0 to 1."""
    return 0.5 + 0.5 * math.cos(math.pi * share)
