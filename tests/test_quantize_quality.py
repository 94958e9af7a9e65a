"""Each method against rounding to nearest, and against the tools that do this for a living: by perplexity and by divergence."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from appliance.hub import demo_model
from appliance.quantize.calibration import text_ids
from appliance.text.tokenizer import Tokenizer
from tests.quantizing import dense, judged, logits, make, quantized, spoken


class Parts(NamedTuple):
    model: Path
    calibration: Tensor
    text: Tensor  # another one, to judge by
    base: Tensor  # the model's own log-probabilities of that


def parts(model: Path, calibration: Tensor, text: Tensor) -> Parts:
    return Parts(model, calibration, text, logits(model, text))


@pytest.fixture(scope="module")
def outliers(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    """Random weights, some of whose channels are large; its own words."""
    shape = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "head_dim": 32}
    model = make(tmp_path_factory.mktemp("outliers") / "model", **shape)
    return parts(model, spoken(model, 48, 32, seed=1), spoken(model, 32, 32, seed=2))


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    """The demo model's weights as they are read; its own words, since it never learned to predict questions."""
    model = dense(demo_model(), tmp_path_factory.mktemp("demo") / "model")
    return parts(model, spoken(model, 32, 40, seed=1), spoken(model, 32, 40, seed=2))


@pytest.fixture(scope="module")
def stories(shared_data: Path) -> Parts:
    """A real model, and text of which it has been told: the first three quarters, and pieces of the last."""
    model = shared_data / "models/TinyStories-656K"
    ids = text_ids(str(shared_data / "text/tinystories.txt"), Tokenizer.load(model))
    border = len(ids) * 3 // 4
    judge = torch.tensor([[1, *ids[first : first + 255]] for first in range(border, len(ids) - 255, 255)])
    return parts(model, torch.tensor(ids[: 128 * (border // 128)]).view(-1, 128)[::10][:32], judge[::2][:24])


@pytest.mark.parametrize("name", ["outliers", "demo", "stories"])
@pytest.mark.parametrize("bits", [3, 4])
def test_awq_and_gptq_beat_rounding(request: pytest.FixtureRequest, tmp_path: Path, name: str, bits: int) -> None:
    """With 128 inputs to a scale, or 64 where 128 does not divide; the demo model's 4 bits without zero points.

    With them its weights lie on that grid already: rounding loses nothing, and nothing can beat it.
    """
    model, calibration, text, base = request.getfixturevalue(name)
    group, symmetric = (64, bits == 4) if name == "demo" else (128, False)
    grid = {"bits": bits, "group_size": group, "sym": symmetric, "format": "compressed-tensors"}
    (least, _), found = judged(model, text, base), {}
    for method in ("rtn", "awq", "gptq"):
        made = quantized(model, tmp_path / method, None if method == "rtn" else calibration, method=method, **grid)
        found[method] = judged(made, text, base)
    for method in ("awq", "gptq"):
        assert found[method][0] < found["rtn"][0] and found[method][1] < 0.9 * found["rtn"][1], (least, found)
    assert found["rtn"][0] > least, "rounding costs something"


def test_weights_that_are_on_the_grid_stay_there(demo: Parts, tmp_path: Path) -> None:
    """Whatever the method: there is nothing to win."""
    model, calibration, text, base = demo
    for method in ("rtn", "awq", "gptq"):
        made = quantized(
            model, tmp_path / method, None if method == "rtn" else calibration[:8], method=method, group_size=64, sym=False
        )
        assert judged(made, text, base)[1] < 1e-3, method


CHECKPOINTS: dict[str, dict[str, Any]] = {
    "awq-gemm-g32": {"method": "awq", "group_size": 32},
    "awq-gemm-g128": {"method": "awq", "group_size": 128},
    "gptq-4bit-g32-sym": {"method": "gptq", "group_size": 32},
    "gptq-4bit-g32-act-order": {"method": "gptq", "group_size": 32, "act_order": True, "static_groups": False},
    "gptq-4bit-g64-asym": {"method": "gptq", "group_size": 64, "sym": False},
    "gptq-8bit-channel": {"method": "gptq", "group_size": -1, "bits": 8},
    "ct-w4a16-g128": {"method": "gptq", "group_size": 128, "format": "compressed-tensors"},
}


@pytest.mark.realdata
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_no_worse_than_those_who_do_this_for_a_living(stories: Parts, shared_data: Path, tmp_path: Path, name: str) -> None:
    """AutoAWQ's, GPTQModel's and llm-compressor's checkpoints of the same model: perplexity within 1 %, divergence as well."""
    model, calibration, text, base = stories
    ours = judged(quantized(model, tmp_path / name, calibration, **CHECKPOINTS[name]), text, base)
    theirs = judged(shared_data / "quantized" / name, text, base)
    assert ours[0] <= 1.01 * theirs[0] and ours[1] <= 1.01 * theirs[1], (ours, theirs)
