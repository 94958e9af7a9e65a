"""Mixtures of experts from other operators: the reference's, torch's, and native ones of weights that come in parts."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.ops import GateMul, Linear, MatMul, Mixture, Norm, RMSNorm


def mix(matmul: MatMul, rms_norm: RMSNorm, silu_mul: GateMul, x: Tensor, mixture: Mixture, *, norm: Norm) -> Tensor:
    """As kernels.ops.Mix, by these operators: expert by expert, the rows that have chosen it."""
    normed = rms_norm(x, norm.weight, eps=norm.eps)
    logits = torch.empty(len(x), mixture.router.N, dtype=torch.float32, device=x.device)
    chosen, shares = route(matmul(normed, mixture.router, out=logits), mixture.active, mixture.normalized)
    total = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for number in chosen.unique().tolist():  # rising
        expert, (rows, places) = mixture.experts[number], torch.where(chosen == number)
        inner = gated(matmul, silu_mul, normed[rows], expert.gate_up)
        out = matmul(inner, expert.down, out=total.new_empty(len(rows), expert.down.N))
        total.index_add_(0, rows, out.mul_(shares[rows, places, None]))
    return total.add_(x).to(x.dtype)


def route(logits: Tensor, active: int, normalized: bool) -> tuple[Tensor, Tensor]:
    """(experts int64 [T, active], their shares float32) by a router's logits, float32 [T, experts]."""
    chosen = logits.sort(dim=-1, descending=True, stable=True).indices[:, :active]
    shares = logits.softmax(-1).gather(1, chosen)
    return chosen, shares / shares.sum(-1, keepdim=True) if normalized else shares


def gated(matmul: MatMul, multiply: GateMul, x: Tensor, gate_up: Linear, norm: Norm | None = None) -> Tensor:
    """What ``multiply`` makes of gate and up, [T, intermediate]; a gated weight does so by itself."""
    parts = [matmul(x, weight, norm=norm) for weight in gate_up]
    return parts[0] if len(parts) == 1 else multiply(torch.cat(parts, dim=1))
