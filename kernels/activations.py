"""What MLPs without a gate do between their products: in plain torch on any device, in place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.layout import ACTIVATED_AT_ONCE

Activation = Callable[[Tensor], Tensor]
"""Of [T, N] in any float dtype, which is overwritten -> [T, N]."""


def relu2(x: Tensor) -> Tensor:
    """The square of what is positive."""
    return x.relu_().square_()


@dataclass(frozen=True)
class XIELU:
    """Huang 2024: positive * x^2 + beta * x above 0, elsewhere negative * (exp(min(x, least)) - 1 - x) + beta * x."""

    positive: float
    negative: float
    beta: float
    least: float

    @classmethod
    def of(cls, alpha_p: Tensor, alpha_n: Tensor, beta: float, least: float) -> XIELU:
        """From what checkpoints store; the alphas, [1] each, go through a softplus."""
        positive, negative = (torch.nn.functional.softplus(alpha.float()).item() for alpha in (alpha_p, alpha_n))
        return cls(positive, beta + negative, beta, least)

    def __call__(self, x: Tensor) -> Tensor:
        for part in x.split(max(1, ACTIVATED_AT_ONCE // x.shape[1])):
            wide = part.float()
            below = torch.expm1(wide.clamp(max=self.least)).sub_(wide).mul_(self.negative)
            part.copy_(torch.where(wide > 0, wide.square().mul_(self.positive), below).add_(wide, alpha=self.beta))
        return x
