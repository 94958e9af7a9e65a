"""Scales of the KV cache in a checkpoint: every name is found, numbers are checked, quantized caches use them, others say so."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from appliance import LLM, SamplingParams
from quant.errors import CheckpointError
from tests.models.test_loader import DENSE, dense_tensors, load, write_dense
from tests.tiny_model import make_checkpoint

NAMES = {
    "self_attn.{}_scale": torch.tensor(0.5),
    "self_attn.attn.{}_scale": torch.tensor([0.5]),
    "self_attn.{0}_proj.{0}_scale": torch.tensor([0.5], dtype=torch.bfloat16),
    "self_attn.qkv_proj.{}_scale": torch.tensor([[0.5]]),
    "self_attn.{}_proj.output_scale": torch.tensor([0.5], dtype=torch.float16),
    "self_attn.kv_scale": torch.tensor([0.5]),
}


def with_scales(folder: Path, name: str, k: torch.Tensor, v: torch.Tensor, **config: object) -> Path:
    """Layer 0 has scales, layer 1 has none."""
    scales = {f"model.layers.0.{name.format(part)}": scale.clone() for part, scale in (("k", k), ("v", v))}
    return write_dense(folder, dense_tensors(DENSE) | scales, **config)


@pytest.mark.parametrize("name", list(NAMES))
def test_every_name(tmp_path: Path, name: str) -> None:
    one = name == "self_attn.kv_scale"
    decoder = load(with_scales(tmp_path, name, NAMES[name], NAMES[name] * (1 if one else 2)))
    assert decoder.kv_largest == ((224.0, 224.0 if one else 448.0), None)
    assert decoder.given_scales("fp8_e4m3") == [(0.5, 0.5 if one else 1.0), None]
    assert decoder.given_scales("int8")[0] == pytest.approx((224 / 127, (224 if one else 448) / 127))
    assert decoder.given_scales("fp8_e5m2")[0] == pytest.approx((224 / 57344, (224 if one else 448) / 57344))


def test_integer_scales(tmp_path: Path) -> None:
    scheme = {"num_bits": 8, "type": "int", "strategy": "tensor", "symmetric": True, "dynamic": False}
    quantization = {"quant_method": "compressed-tensors", "format": "dense", "config_groups": {}, "kv_cache_scheme": scheme}
    folder = with_scales(
        tmp_path, "self_attn.{}_scale", torch.tensor([0.25]), torch.tensor([2.0]), quantization_config=quantization
    )
    decoder = load(folder)
    assert decoder.given_scales("int8") == [(0.25, 2.0), None]
    assert decoder.given_scales("fp8_e4m3")[0] == pytest.approx((0.25 * 127 / 448, 2 * 127 / 448))
    scheme["num_bits"] = 4
    with pytest.raises(CheckpointError, match=r"kv_cache_scheme: found .*'num_bits': 4.*expected 8 bits"):
        load(with_scales(tmp_path, "self_attn.{}_scale", *[torch.tensor([0.25])] * 2, quantization_config=quantization))


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_what_is_no_scale_is_named(tmp_path: Path, bad: float) -> None:
    folder = with_scales(tmp_path, "self_attn.{}_scale", torch.tensor([1.0]), torch.tensor([bad]))
    with pytest.raises(CheckpointError, match=r"layers.0.self_attn.v_scale: found \[.*positive"):
        load(folder)


def test_shapes_and_types_are_checked(tmp_path: Path) -> None:
    one = torch.tensor([1.0])
    with pytest.raises(CheckpointError, match=r"self_attn.k_scale: found \[5\], expected one scale of the KV cache, or 2"):
        load(with_scales(tmp_path, "self_attn.{}_scale", torch.ones(5), one))
    with pytest.raises(CheckpointError, match=r"self_attn.k_scale: found I32\[1\], expected F32/BF16/F16"):
        load(with_scales(tmp_path, "self_attn.{}_scale", one.int(), one))
    with pytest.raises(CheckpointError, match=r"layers.0.self_attn.k_scale: .*none of the values"):
        load(write_dense(tmp_path, dense_tensors(DENSE) | {"model.layers.0.self_attn.k_scale": one}))


def test_scales_that_a_cache_cannot_have(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """One for each head, and zero points: the cache's own scales are finer."""
    decoder = load(with_scales(tmp_path, "self_attn.{}_scale", torch.ones(2, 1, 1), torch.ones(2, 1, 1)))
    assert (
        decoder.kv_largest == (None, None)
        and "layers.0.self_attn.k_scale is not used: it has a scale for each head" in caplog.text
    )
    name = "model.layers.0.self_attn.{}_{}"
    for zero, expected in ((0, (448.0, 448.0)), (3, None)):
        extra = {name.format(p, "scale"): torch.ones(1) for p in "kv"}
        extra |= {name.format(p, "zero_point"): torch.tensor([zero], dtype=torch.int8) for p in "kv"}
        decoder = load(write_dense(tmp_path, dense_tensors(DENSE) | extra))
        assert decoder.kv_largest == (expected, None)
        assert decoder.given_scales("fp8_e4m3") == [expected and (1.0, 1.0), None]
        late = replace(decoder, spec=replace(decoder.spec, late_qk_norm=True))
        assert late.given_scales("fp8_e4m3") == [None, None]
    assert "it comes with a zero point" in caplog.text


@pytest.mark.parametrize("dtype", ["auto", "int4", "fp8", "int8", "fp8_e5m2"])
def test_the_engine_uses_them(tmp_path: Path, dtype: str, caplog: pytest.LogCaptureFixture) -> None:
    """Far too large a scale for the values leaves them few codes: quantized caches change their answers, others do not."""
    caplog.set_level("INFO")
    plain = make_checkpoint(tmp_path / "plain")
    folder = make_checkpoint(tmp_path / "scaled")
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors |= {f"model.layers.{i}.self_attn.{p}_scale": torch.tensor([1e4]) for i in range(2) for p in "kv"}
    save_file(tensors, path)

    def scores(model: Path) -> tuple[list[float], LLM]:
        llm = LLM(model=str(model), threads=1, kv_cache_dtype=dtype, kv_cache_memory_bytes=1 << 20, dtype="float32")
        (output,) = llm.generate(
            [{"prompt_token_ids": list(range(3, 40))}], SamplingParams(max_tokens=1, prompt_logprobs=0), use_tqdm=False
        )
        assert output.prompt_logprobs is not None
        return [next(iter(entry.values())).logprob for entry in output.prompt_logprobs[1:] if entry], llm

    (ours, _), (theirs, _) = scores(folder), scores(plain)
    uses = dtype not in ("auto", "int4")
    assert (ours != theirs) == uses
    assert ("scales of keys and values are not used" in caplog.text) == (not uses)
