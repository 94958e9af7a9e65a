"""What a plan has for gate and up on a card: floats of both only where no kernel multiplies them as it sums them up."""

from __future__ import annotations

from pathlib import Path

import pytest

from appliance.memory.demand import activation_bytes
from appliance.memory.modules import Machinery, layer_weights
from models.spec import ModelSpec
from quant.headers import CheckpointIndex
from quant.scheme import read_scheme
from tests.tiny_model import Shape, make_checkpoint


@pytest.mark.parametrize(("group", "in_tiles"), [(32, True), (128, True), (16, False)])
def test_gate_and_up_in_float32(group: int, in_tiles: bool, tmp_path: Path) -> None:
    shape = Shape(hidden=256, mlp=512, head_dim=64, group=group)
    config, scheme = read_scheme(CheckpointIndex.open(make_checkpoint(tmp_path, shape=shape, tokenizer=False)))
    spec = ModelSpec.from_config(config)
    layers = list(layer_weights(spec, scheme))
    card, expanded = (Machinery(ops="triton", dtype=dtype, head_bits=None) for dtype in ("float16", "float32"))
    few, many = activation_bytes(spec, layers, card), 3 * 2 * shape.mlp + 8 * shape.mlp
    assert (few < many) == in_tiles
    assert activation_bytes(spec, layers, expanded) > 3 * 4 * shape.mlp + 8 * shape.mlp
