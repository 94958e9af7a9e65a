"""A whole job on a card that is none: nothing lies in two places, and what is written is what the CPU makes, byte by byte."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from appliance.quantize.job import Job
from appliance.quantize.options import Options
from tests.fake_card import CARD, Card
from tests.quantizing import ids, make


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("dense") / "model", num_hidden_layers=2)


@pytest.mark.parametrize(
    "options",
    [
        {"method": "gptq", "act_order": True, "static_groups": False},
        {"method": "awq", "kv_scales": True},
        {"method": "gptq", "lm_head_bits": 8, "format": "compressed-tensors"},
        {"method": "rtn"},
    ],
    ids=["gptq", "awq", "head", "rtn"],
)
def test_a_job_stays_on_the_card(model: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    checked, tokens = Options(group_size=32, calibration_samples=4, calibration_length=32, **options).checked(), ids()[:4]
    made = []
    for name, device in (("host", "cpu"), ("card", CARD)):
        with Card(), torch.inference_mode():
            Job(model, tmp_path / name, checked, tokens if checked.calibrated else None, device).run()
        made.append([path.read_bytes() for path in sorted((tmp_path / name).glob("*.safetensors"))])
    assert made[0] == made[1]
