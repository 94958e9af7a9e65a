"""The reference's draw against the runtime's sampler, which works row by row on the host."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from appliance.runtime import sampler
from kernels import reference

CUTS: tuple[dict[str, float], ...] = (
    {},
    {"temperature": 0.0},
    {"top_k": 5},
    {"top_k": 10**6},
    {"top_p": 0.9},
    {"top_p": 1e-9},
    {"min_p": 0.1},
    {"top_k": 40, "top_p": 0.8, "min_p": 0.05, "temperature": 0.7},
)


@pytest.mark.parametrize("columns", [1, 50, 3000])
def test_draws_of_the_runtime(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    uniform = torch.rand(len(CUTS), dtype=torch.float64)
    logits = torch.randn(len(CUTS), columns) * torch.linspace(0.5, 6, len(CUTS))[:, None]
    logits[:, ::7] = logits[:, :1].clone()  # ties
    settings = [{"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | cut for cut in CUTS]
    wanted = []
    for row, given, u in zip(logits.clone(), settings, uniform.tolist(), strict=True):
        monkeypatch.setattr(sampler, "uniform", lambda *_, u=u: u)
        request: Any = SimpleNamespace(params=SimpleNamespace(**given), seed=0, tokens=[])
        greedy = given["temperature"] == 0
        wanted.append(int(row.argmax()) if greedy else sampler._draw(row, row.amax().item(), request, reference.kth_largest))
    columns_of = {name: torch.tensor([one[name] for one in settings], dtype=torch.float64) for name in settings[0]}
    found = reference.sample(
        logits, columns_of["temperature"], columns_of["top_k"].long(), columns_of["top_p"], columns_of["min_p"], uniform
    )
    assert found.tolist() == wanted


def test_rows_without_a_finite_largest_logit() -> None:
    logits = torch.zeros(4, 5)
    logits[0], logits[1, 2], logits[2, 3] = -torch.inf, torch.inf, torch.nan
    half = torch.full((4,), 0.5, dtype=torch.float64)
    assert reference.sample(logits, half, None, None, None, half).tolist() == [-1, -1, -1, 2]
    assert reference.sample(logits, half * 0, None, half, half, half).tolist() == [-1, -1, -1, 0]
