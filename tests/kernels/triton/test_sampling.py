"""Sampling in Triton, row by row against the sampler of the runtime; compiled for every architecture."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from appliance.runtime import sampler
from tests.kernels.triton.aot import compile_all
from tests.kernels.triton.conftest import DEVICE
from tests.kernels.triton.tensors import poison  # noqa: F401
from tests.kernels.triton.test_select import INF, compilation, device

from kernels.triton import sampling, select  # isort: skip  (after the conftest has chosen the interpreter)


def expected_tokens(logits: Tensor, rows: list[dict[str, float]], monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What the runtime's sampler draws, a row at a time, on the CPU."""
    found = []
    for row, given in zip(logits.cpu().clone(), rows, strict=True):
        monkeypatch.setattr(sampler, "uniform", lambda *_, u=given["uniform"]: u)
        request: Any = SimpleNamespace(params=SimpleNamespace(**given), seed=0, tokens=[])
        if given["temperature"] == 0:
            found.append(int(row.argmax()))
        else:
            found.append(sampler._draw(row, row.amax().item(), request, sampler.reference.kth_largest))
    return found


def check(logits: Tensor, rows: list[dict[str, float]], monkeypatch: pytest.MonkeyPatch) -> Tensor:
    logits = logits.to(DEVICE)
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    cuts = {name: device(columns[name], torch.float64) for name in ("top_p", "min_p")}
    found = sampling.sample(
        logits,
        device(columns["temperature"], torch.float32),
        device(columns["top_k"], torch.int64),
        cuts["top_p"],
        cuts["min_p"],
        device(columns["uniform"], torch.float64),
    )
    assert found.dtype == torch.int64
    assert found.tolist() == expected_tokens(logits, rows, monkeypatch)
    return found


def settings(**given: float) -> dict[str, float]:
    return {
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "min_p": 0.0,
        "uniform": torch.rand((), dtype=torch.float64).item(),
    } | given


CUTS = (
    {},
    {"temperature": 0.0},
    {"temperature": 0.3},
    {"top_k": 5},
    {"top_k": 1},
    {"top_k": 10**6},
    {"top_p": 0.9},
    {"top_p": 1e-9},
    {"top_p": 0.999999},
    {"min_p": 0.1},
    {"min_p": 1.0},
    {"top_k": 40, "top_p": 0.8, "min_p": 0.05, "temperature": 0.7},
    {"top_k": 300, "top_p": 0.5, "temperature": 4.0},
)


@pytest.mark.parametrize("columns", [1, 129, 2048, 4097])
def test_draws_of_the_runtime(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(len(CUTS), columns) * torch.linspace(0.5, 6, len(CUTS))[:, None]
    check(logits, [settings(**cut) for cut in CUTS], monkeypatch)


def test_a_larger_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [settings(top_k=50, top_p=0.9), settings(top_p=0.95), settings(temperature=1.5)]
    check(torch.randn(3, 10001) * 2, rows, monkeypatch)


def test_ties(monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal logits stay in at top_k's edge, and enter by id at top_p's, also across chunks."""
    logits = torch.randint(0, 3, (12, 4500)).float()
    logits[:4] = 1.0
    logits[4:6] = -INF
    logits[4, [3, 2500, 4499]] = 2.0
    logits[5, 4499] = -7.0
    cuts = ({"top_p": 0.5}, {"top_p": 0.9}, {"top_k": 10}, {"top_p": 0.7, "uniform": 0.999999999})
    cuts += ({"top_p": 0.5}, {"top_p": 0.5, "top_k": 3}, {"top_k": 100, "top_p": 0.3}, {"top_p": 0.3, "min_p": 0.3})
    cuts += ({"top_p": 0.8, "uniform": 0.0}, {"top_p": 0.8, "uniform": 1 - 2**-53}, {"min_p": 0.5}, {"temperature": 1e-6})
    check(logits, [settings(**cut) for cut in cuts], monkeypatch)


def test_every_part_of_the_distribution(monkeypatch: pytest.MonkeyPatch) -> None:
    u = [0.0, 1e-12, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 1 - 2**-53]
    row = torch.randn(1, 2600) * 2
    check(row.expand(len(u), -1).contiguous(), [settings(uniform=x, top_p=0.97) for x in u], monkeypatch)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_rows_without_a_finite_largest_logit() -> None:
    logits = torch.zeros(8, 50)
    logits[0], logits[1], logits[2, 3], logits[3, 4] = -INF, -INF, INF, torch.nan
    logits[4, 3], logits[5, 3], logits[6, :49] = INF, torch.nan, -INF
    temperature = device([1, 0, 1, 1, 0, 0, 1, 0], torch.float32)
    others = device([0.5] * 8, torch.float64)
    found = sampling.sample(logits.to(DEVICE), temperature, device([3] * 8, torch.int64), others, others * 0, others)
    assert found.tolist() == [-1] * 6 + [49, 0]


def test_cuts_that_nobody_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = (torch.randn(4, 2100) * 3).to(DEVICE)
    rows = [settings(temperature=t) for t in (0.0, 0.5, 1.0, 2.0)]
    temperature, uniform = (device([row[name] for row in rows], torch.float64) for name in ("temperature", "uniform"))
    expected = expected_tokens(logits, rows, monkeypatch)
    assert sampling.sample(logits, temperature, None, None, None, uniform).tolist() == expected
    assert sampling.sample(logits[:0], temperature[:0], None, None, None, uniform[:0]).shape == (0,)
    with pytest.raises(ValueError, match="at most"):
        sampling.sample(torch.zeros(1, select.MAX_COLUMNS + 1, device=DEVICE), temperature, None, None, None, uniform)


@pytest.mark.compiles
def test_compilations() -> None:
    names = "logits best temperature kth min_p thresholds masses ties columns row_stride chunks"
    wanted = [compilation("sampling:_chunk_masses", names, {"CHUNK": select.CHUNK}, warps=select.WARPS)]
    names = "logits best greedy temperature kth min_p thresholds taken uniform masses ties out columns row_stride chunks"
    constants = {"CHUNK": select.CHUNK, "CHUNK_BLOCK": 128}
    wanted.append(compilation("sampling:_pick", names, constants, warps=select.WARPS))
    absent = {"kth": None, "min_p": None, "thresholds": None, "taken": None}
    wanted.append(compilation("sampling:_pick", names, constants | absent, warps=select.WARPS))
    for report in compile_all(wanted, loops=False):
        assert report.fits and report.stack == 0, report
