"""Mixtures of experts on a card: all experts' weights in one stretch of memory, and two launches for all that tokens have chosen.

::

    weights   words [E, ..], params [E, ..] as in weights.py (dense: [E, outputs, K]); expert e begins at e times an expert's size
    x         normalized rows [T, hidden]        -> routing.py: shares, pairs expert by expert, blocks of pairs of one expert
    gate, up  program (n, block): its expert's   -> inner [T * A, intermediate], silu(gate) * up, by pair
              outputs n, for the pairs of a block
    down      program (n, block, split)          -> parts float32 [splits * A, T, hidden], times the pair's share
    shared    an MLP of all rows, where there is one -> one part more, times its share (plain products)

The parts are those of any product that was cut along its inputs: whoever reads them next (the norm behind, with the residual)
adds them in order, expert after expert. No atomics, so results repeat; how much is launched depends on shapes alone.

A program has gate and up of the same outputs, eight of each in turn: matrix instructions leave lines eight apart in one thread::

    line of the tile   0 .. 7        8 .. 15     16 .. 23       24 .. 31    ..
    output             gate 0 .. 7   up 0 .. 7   gate 8 .. 15   up 8 .. 15  ..
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.mixture import gated
from kernels.ops import MLP, GateMul, Mixture, Norm, Weight
from kernels.triton.elementwise import gelu_mul, silu_mul
from kernels.triton.gate import gate_mul
from kernels.triton.kv import capability
from kernels.triton.matmul import FEW, FINISH_BLOCK, REGISTERS, UNKNOWN, Card, matmul
from kernels.triton.norm import rms_norm
from kernels.triton.routing import Routes, logits, route
from kernels.triton.tiled import _dot, _zeros, finish, sums
from kernels.triton.weights import NAMES, TILE, TritonWeight
from kernels.tune import AMPERE, Launch, choose_experts

INPUTS = 64  # of a dense weight, at a time


def join_experts(experts: Iterable[MLP], count: int) -> tuple[MLP, ...]:
    """As kernels.ops.JoinExperts: one MLP, whose weights have all experts'."""
    given, made = iter(experts), list[TritonWeight]()
    for number in range(count):
        _place(next(given), number, count, made)
    return (MLP((made[0],), made[1]),)


def _place(mlp: MLP, number: int, count: int, made: list[TritonWeight]) -> None:
    """The weights of an expert beside those of the experts before; room for all is made with the first."""
    weights = mlp.weights
    if len(weights) != 2 or not all(isinstance(one, TritonWeight) for one in weights):
        raise TypeError("experts need a joined gate and up, packed for the operators in Triton")
    for i, one in enumerate(weights):
        assert isinstance(one, TritonWeight)
        if one.rounds is not None or one.perm is not None or one.bias is not None or one.words.dtype == torch.float32:
            raise TypeError("experts whose activations are rounded, or in another order, or float32, or that have a bias")
        if number == 0:
            words, params = (None if t is None else t.new_empty((count, *t.shape)) for t in (one.words, one.params))
            assert words is not None
            made.append(replace(one, words=words, params=params))
        if _form(one) != _form(made[i]):
            raise TypeError("experts that are not stored alike")
        for place, source in ((made[i].words, one.words), (made[i].params, one.params)):
            if place is not None and source is not None:
                place[number] = source


def _form(weight: TritonWeight) -> tuple[Any, ...]:
    words = weight.words
    return words.dtype, weight.bits, weight.scale_dtype, weight.slices, weight.gated, weight.outputs, weight.K


def mix(x: Tensor, mixture: Mixture, *, norm: Norm, alone: bool = False, card: Card = UNKNOWN) -> Tensor:
    """As kernels.ops.Mix. Nothing here waits for the device; what is launched depends on shapes alone.

    TypeError for experts that were not joined (``join_experts``).
    """
    if not x.shape[0]:
        return torch.empty_like(x)
    x = x.contiguous()
    asked = None if mixture.norm is None else rms_norm(x, **norm._replace(weight=mixture.norm)._asdict())
    parts, out = mixed_parts(rms_norm(x, **norm._asdict()), mixture, asked, card=card), torch.empty_like(x)
    tokens, hidden = x.shape
    finish[(tokens, triton.cdiv(hidden, FINISH_BLOCK))](
        parts, None, x, out, tokens, hidden, hidden,
        SPLITS=parts.shape[0], BIAS=False, RESIDUAL=not alone, GATED=False, GELU=False, BLOCK=FINISH_BLOCK, num_warps=4,
    )  # fmt: skip
    return out


def mixed_parts(x: Tensor, mixture: Mixture, asked: Tensor | None = None, *, card: Card = UNKNOWN) -> Tensor:
    """float32 [parts, T, hidden]: added in order, what the MLPs make of x [T, hidden], normalized, rows contiguous.

    ``asked``: what the router reads, where that is not x. TypeError as in ``mix``.
    """
    gate_up, down = _joined(mixture)
    tokens, active, shared = x.shape[0], mixture.active, mixture.shared is not None
    if not tokens:
        return torch.empty((active + shared, 0, down.N), dtype=torch.float32, device=x.device)
    launches = [_launch(x, one, mixture, card) for one in (gate_up, down)]
    given = _logits(x if asked is None else asked, mixture.router, card), active, mixture.normalized, launches[0].block_m
    routes = route(*given, mixture.scores, mixture.correction, mixture.gains)
    inner = torch.empty((tokens * active, gate_up.N), dtype=x.dtype, device=x.device)
    _multiply(x, gate_up, routes, inner, launches[0])
    parts = torch.empty((launches[1].split * active + shared, tokens, down.N), dtype=torch.float32, device=x.device)
    _multiply(inner, down, routes, parts, launches[1])
    if mixture.shared is not None:
        _share(x, mixture.shared, mixture.shared_gate, gelu_mul if mixture.gelu else silu_mul, parts[-1], card)
    return parts


def _share(x: Tensor, mlp: MLP, gate: Weight | None, product: GateMul, to: Tensor, card: Card) -> None:
    """What ``mlp`` makes of x into ``to``, float32 [T, hidden]."""
    multiply = partial(matmul, card=card)
    inner = gated(multiply, product, x, mlp.gate_up)
    if gate is not None:
        inner *= multiply(x, gate, out=to.new_empty(len(x), 1)).sigmoid_()
    multiply(inner, mlp.down, out=to)


def _joined(mixture: Mixture) -> tuple[TritonWeight, TritonWeight]:
    weights = mixture.experts[0].weights if len(mixture.experts) == 1 else ()
    if len(weights) == 2:
        gate_up, down = weights
        if isinstance(gate_up, TritonWeight) and isinstance(down, TritonWeight) and len(gate_up.words) == mixture.router.N:
            return gate_up, down
    raise TypeError("a mixture whose experts were not joined for the operators in Triton")


def _launch(x: Tensor, weight: TritonWeight, mixture: Mixture, card: Card) -> Launch:
    return choose_experts(
        rows=x.shape[0],
        experts=mixture.router.N,
        active=mixture.active,
        outputs=weight.outputs,
        inputs=weight.K,
        kind=f"w{weight.bits} {NAMES[x.dtype]}",
        gated=weight.gated,
        multiprocessors=card.multiprocessors,
        capability=card.capability,
    )


def _logits(x: Tensor, router: Weight, card: Card) -> Tensor:
    """float32 [parts, T, experts], to be added up."""
    if isinstance(router, TritonWeight) and router.bits == 16 and router.bias is None:
        return logits(x, router.words)
    out = torch.empty((1, x.shape[0], router.N), dtype=torch.float32, device=x.device)
    matmul(x, router, out=out[0], card=card)
    return out


def _multiply(x: Tensor, weight: TritonWeight, routes: Routes, to: Tensor, launch: Launch) -> None:
    """x [T, K] into ``to`` [T * A, N] where the weight is gated, else x [T * A, K] into [splits * A, T, N]."""
    tokens, active = routes.shares.shape
    words, params = weight.words, weight.params
    if params is None:
        constants: dict[str, Any] = {"BITS": 16, "SLICES": 1, "WHOLE": False, "PARTS": 1, "SCALE": tl.float16}
    else:
        constants = replace(weight, params=params[0]).constants
    few = launch.block_m == FEW and capability(x.device) >= AMPERE
    product[(triton.cdiv(weight.outputs, launch.block_n), routes.blocks.shape[0], launch.split)](
        x,
        words,
        params,
        routes.order,
        routes.blocks,
        None if weight.gated else routes.shares,
        to,
        tokens,
        weight.outputs,
        weight.K,
        0 if params is None else params.shape[3],
        words.shape[2],
        words.stride(0),
        0 if params is None else params.stride(0),
        x.stride(0),
        **constants,
        EVEN=weight.K % TILE == 0,
        ACTIVE=active,
        GATED=weight.gated,
        GELU=weight.gelu,
        BM=launch.block_m,
        BN=launch.block_n,
        BK=INPUTS,
        ASM=x.is_cuda,
        num_warps=launch.warps,
        num_stages=launch.stages,
        maxnreg=REGISTERS if few else None,
    )


@triton.jit(do_not_specialize=["tokens"])  # one compilation for all numbers of them
def product(  # type: ignore[no-untyped-def]
    x, words, scaling, order, blocks, shares, out,
    tokens, N, K, padded, tiles, expert_words, expert_params, x_stride,
    BITS: tl.constexpr, SLICES: tl.constexpr, WHOLE: tl.constexpr, PARTS: tl.constexpr, SCALE: tl.constexpr, EVEN: tl.constexpr,
    ACTIVE: tl.constexpr, GATED: tl.constexpr, GELU: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """Constants as in tiled.product; BITS 16: ``words`` is dense, BK inputs at a time. N: outputs of an expert.

    GATED: out [tokens * ACTIVE, N / 2] of x [tokens, K]. Else float32 [splits * ACTIVE, tokens, N], times shares, of x
    [tokens * ACTIVE, K].
    """
    block = blocks + 3 * tl.program_id(1)
    count = tl.load(block + 2)
    if count == 0:
        return
    expert, first = tl.load(block).to(tl.int64), tl.load(block + 1)
    part, splits = tl.program_id(2), tl.num_programs(2)
    lane, line = tl.arange(0, BM), tl.arange(0, BN)
    inside = lane < count
    pair = tl.load(order + first + lane, mask=inside, other=0)
    if GATED:
        source, width = pair // ACTIVE, N // 2
        half = tl.program_id(0) * (BN // 2) + line // 16 * 8 + line % 8
        column = tl.minimum(half, width - 1) + line % 16 // 8 * width
    else:
        source, width = pair, N
        column = tl.minimum(tl.program_id(0) * BN + line, N - 1)
    rows = x + source.to(tl.int64)[None, :] * x_stride
    words += expert * expert_words
    if BITS == 16:
        acc = _dense_sums(rows, words, inside, column, part, splits, K, BM, BN, BK, ASM)
    else:
        scales = scaling + expert * expert_params
        per = tl.cdiv(tiles, splits)
        begin, end = part * per, tl.minimum(part * per + per, tiles)
        acc = sums(
            rows, words, scales, inside, column, begin, end, K, padded, tiles,
            BITS, SLICES, WHOLE, PARTS, SCALE, EVEN, BM, BN, ASM,
        )  # fmt: skip
    # Once more: to keep it would cost registers that the loop needs.
    pair = tl.load(order + first + lane, mask=inside, other=0, cache_modifier=".ca")
    if GATED:
        gate, up = tl.split(tl.permute(tl.reshape(acc, (BN // 16, 2, 8, BM)), (0, 2, 3, 1)))
        found = tl.reshape(gate_mul(gate, up, GELU), (BN // 2, BM))
        to = tl.program_id(0) * (BN // 2) + tl.arange(0, BN // 2)
        row = pair.to(tl.int64)
    else:
        found = acc * tl.load(shares + pair, mask=inside, other=0.0)[None, :]
        to = tl.program_id(0) * BN + line
        row = (part * ACTIVE + pair % ACTIVE).to(tl.int64) * tokens + pair // ACTIVE
    mask = inside[None, :] & (to < width)[:, None]
    tl.store(out + row[None, :] * width + to[:, None], found.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _dense_sums(  # type: ignore[no-untyped-def]
    rows, words, inside, column, part, splits, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, ASM: tl.constexpr
):  # fmt: skip
    """float32 [BN, BM] of a dense weight [.., K] and rows: pointers [1, BM] to where they begin."""
    per = tl.cdiv(tl.cdiv(K, BK), splits) * BK
    k = tl.arange(0, BK)
    acc = _zeros(BN, BM)
    for start in range(part * per, tl.minimum(part * per + per, K), BK):
        at = start + k
        weights = tl.load(words + column.to(tl.int64)[:, None] * K + at[None, :], mask=(at < K)[None, :], other=0.0)
        given = tl.load(rows + at[:, None], mask=inside[None, :] & (at < K)[:, None], other=0.0)
        acc = _dot(weights, given, acc, ASM)
    return tl.reshape(acc, (BN, BM))
