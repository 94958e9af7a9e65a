"""Mixtures of experts from other operators: the reference's, torch's, and native ones of weights that come in parts."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.ops import GateMul, Linear, MatMul, Mixture, Norm, RMSNorm
from kernels.scores import SOFTMAX, Scores


def mix(
    matmul: MatMul,
    rms_norm: RMSNorm,
    silu_mul: GateMul,
    gelu_mul: GateMul,
    x: Tensor,
    mixture: Mixture,
    *,
    norm: Norm,
    alone: bool = False,
) -> Tensor:
    """As kernels.ops.Mix, by these operators: expert by expert, the rows that have chosen it."""
    multiply = gelu_mul if mixture.gelu else silu_mul
    normed = rms_norm(x, norm.weight, eps=norm.eps, offset=norm.offset)
    asked = normed if mixture.norm is None else rms_norm(x, mixture.norm, eps=norm.eps, offset=norm.offset)
    total = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    logits = matmul(asked, mixture.router, out=total.new_empty(len(x), mixture.router.N))
    chosen, shares = route(logits, mixture.active, mixture.normalized, mixture.scores, mixture.correction)
    shares = shares if mixture.gains is None else shares * mixture.gains[chosen]
    for number in chosen.unique().tolist():  # rising
        expert, (rows, places) = mixture.experts[number], torch.where(chosen == number)
        inner = gated(matmul, multiply, normed[rows], expert.gate_up)
        out = matmul(inner, expert.down, out=total.new_empty(len(rows), expert.down.N))
        total.index_add_(0, rows, out.mul_(shares[rows, places, None]))
    if mixture.shared is not None:
        inner = gated(matmul, multiply, normed, mixture.shared.gate_up)
        if mixture.shared_gate is not None:
            inner *= matmul(normed, mixture.shared_gate, out=total.new_empty(len(x), 1)).sigmoid_()
        total += matmul(inner, mixture.shared.down, out=torch.empty_like(total))
    return (total if alone else total.add_(x)).to(x.dtype)


def route(
    logits: Tensor, active: int, normalized: bool, scores: Scores = SOFTMAX, correction: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(experts int64 [T, active], their shares float32) by a router's logits, float32 [T, experts]."""
    found = logits.sigmoid() if scores.sigmoid else logits.softmax(-1)
    keys = found if correction is None else found + correction
    if keys is found and not scores.sigmoid and scores.groups == 1:
        keys = logits  # in the order of a softmax's scores, and apart where those are both 0
    chosen = _sorted(keys if scores.groups == 1 else _of_groups(keys, scores))[:, :active]
    shares = found.gather(1, chosen)
    least = 0.0 if keys is logits else scores.least
    shares = shares / shares.sum(-1, keepdim=True).clamp(min=least) if normalized else shares
    return chosen, shares * scores.scale


def _of_groups(keys: Tensor, scores: Scores) -> Tensor:
    """-inf in place of the keys of all experts that stand in other groups than a token's."""
    groups = keys.view(len(keys), scores.groups, -1)
    chosen = _sorted(groups.topk(scores.best).values.sum(-1))[:, : scores.chosen_groups]
    others = torch.ones(groups.shape[:2], dtype=torch.bool, device=keys.device).scatter_(1, chosen, False)
    return groups.masked_fill(others[:, :, None], float("-inf")).flatten(1)


def _sorted(keys: Tensor) -> Tensor:
    """Places of the largest first, of equal ones in their order."""
    return keys.sort(dim=-1, descending=True, stable=True).indices


def gated(matmul: MatMul, multiply: GateMul, x: Tensor, gate_up: Linear, norm: Norm | None = None) -> Tensor:
    """What ``multiply`` makes of gate and up, [T, intermediate]; a gated weight does so by itself."""
    parts = [matmul(x, weight, norm=norm) for weight in gate_up]
    return parts[0] if len(parts) == 1 else multiply(torch.cat(parts, dim=1))
