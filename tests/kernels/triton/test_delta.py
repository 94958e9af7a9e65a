"""The gated delta rule in Triton against the reference, and compiled for every architecture."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import delta as plain
from kernels.states import StateCache
from tests.kernels.states import SHAPES, copied, make
from tests.kernels.triton.aot import OLDEST, TARGETS, Compilation, compile_all
from tests.kernels.triton.conftest import DEVICE

from kernels.triton import delta  # isort: skip  (after the conftest has chosen the interpreter)

EPS = {torch.float32: 2e-5, torch.bfloat16: 2**-7, torch.float16: 2**-9}
STEPS = [  # (tokens before, tokens of this step) of each sequence
    [(0, 1)], [(7, 1)], [(0, 3), (2, 1), (0, 1)], [(9, 1), (1, 1), (4, 2), (0, 20)], [(3, 0), (5, 2)],
]  # fmt: skip


def on_device(value: Any) -> Any:
    """Tensors within a record, on the card where there is one."""
    if isinstance(value, Tensor):
        return value.to(DEVICE)
    if isinstance(value, StateCache):
        return StateCache(*map(on_device, value))
    return replace(value, **{name: on_device(one) for name, one in vars(value).items() if isinstance(one, Tensor)})


def check(shape: tuple[int, ...], sequences: list[tuple[int, int]], dtype: torch.dtype) -> None:
    x, gates, rule, cache, batch = make(shape, sequences, dtype)
    expected, found = copied(cache), on_device(copied(cache))
    wanted = plain.delta(x, gates, rule, expected, batch)
    rule = on_device(rule)
    told = delta.delta(on_device(x), on_device(gates), rule, found, on_device(batch)).cpu()
    assert told.dtype == dtype
    loose = 2 * EPS[dtype] if dtype == torch.float32 else 10 * EPS[dtype]  # q, k and v are rounded behind the convolution
    torch.testing.assert_close(told.float(), wanted.float(), rtol=loose, atol=loose)
    off = (told.double() - wanted.double()).square().mean().sqrt() / wanted.double().square().mean().sqrt()
    assert not wanted.numel() or off < 2 * EPS[dtype]  # as transformers in these types
    torch.testing.assert_close(found.conv.cpu(), expected.conv, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(found.state.cpu(), expected.state, rtol=loose, atol=loose, equal_nan=True)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_the_reference(shape: tuple[int, ...]) -> None:
    """Tokens and chunks, of one tile of the convolution and of several, that go on and begin; and none."""
    check(shape, [(9, 1), (0, 1), (4, 2), (0, 2), (3, 0), (2, delta.BLOCK_T + 1)], torch.float32)


@pytest.mark.parametrize("sequences", STEPS, ids=str)
def test_steps(sequences: list[tuple[int, int]]) -> None:
    check(SHAPES[0], sequences, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(dtype: torch.dtype) -> None:
    check(SHAPES[1], STEPS[2], dtype)
    check(SHAPES[4], STEPS[1], dtype)


def test_no_rows() -> None:
    x, gates, rule, cache, batch = make(SHAPES[0], [(3, 0)], torch.float32)
    before = copied(cache)
    assert delta.delta(on_device(x), on_device(gates), on_device(rule), on_device(cache), on_device(batch)).shape == (0, 16)
    torch.testing.assert_close(cache.state, before.state, equal_nan=True)
    with pytest.raises(ValueError, match="where the states"):
        delta.delta(x, gates, rule, cache, replace(batch, states=None))


@pytest.mark.compiles
def test_compilations() -> None:
    """As of Qwen3.5-27B: 16 key heads, 48 value heads of 128."""
    wanted = []
    for dtype, targets in (("fp16", TARGETS), ("bf16", TARGETS[1:])):
        numbers = {"x_stride": "i32", "channels": "i32", "place_stride": "i32", "heads": "i32"}
        places = {"places": "*i32", "starts": "*i32", "lengths": "*i32"}
        half, full = f"*{dtype}", "*fp32"
        conv = {"x": half, "taps": full, "past": full, "out": half, **places, **numbers}
        del conv["heads"]
        own = {"TAPS": 4, "PAST": 4, "BLOCK_T": delta.BLOCK_T, "BLOCK_C": delta.BLOCK_C}
        wanted.append(Compilation("kernels.triton.delta:_convolve", conv, own, 4, targets=targets))
        rule = {"mixed": half, "gates": half, "rate": full, "dt_bias": full, "state": full, "out": half, **places, **numbers}
        rule["gate_stride"] = rule.pop("x_stride")
        own = {"EPS": 1e-6, "GROUP": 3, "DK": 128, "KEY": 128, "DV": 128, "BLOCK_V": delta.BLOCK_V}  # type: ignore[dict-item]
        wanted.append(Compilation("kernels.triton.delta:_recur", rule, own, 1, targets=targets))
        last = {"out": half, "x": half, "weight": full, "x_stride": "i32", "channels": "i32", "heads": "i32", "eps": "fp32"}
        own = {"HEADS": delta.HEADS, "DV": 128, "VALUE": 128}
        wanted.append(Compilation("kernels.triton.delta:_finish", last, own, 4, targets=targets))
    for report in compile_all(wanted, loops=False):
        assert report.fits and report.stack <= (8 if OLDEST and report.target == 120 else 0), report
