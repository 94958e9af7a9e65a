"""Every published layout, written from its definition, comes back exactly: any shape, group, bits, zero points and order."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quant.errors import CheckpointError
from quant.formats import awq
from quant.headers import CheckpointIndex
from quant.rules import WeightScheme
from quant.tensor import QuantTensor
from tests.quant import writers
from tests.quant.writers import MODULE, ct_config, load, make, save, tensors

FEW = settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
SEEDS = st.integers(0, 2**32 - 1)


def same(weight: QuantTensor, written: writers.Weight) -> None:
    weight.check()
    assert torch.equal(weight.dequantize(), written.values)
    assert weight.bits == (4 if written.bits <= 4 else 8)


@FEW
@given(
    SEEDS, st.sampled_from([2, 3, 4, 8]), st.integers(1, 20), st.integers(1, 150), st.sampled_from([-1, 16, 32, 50]),
    st.booleans(), st.sampled_from(["plain", "act", "wild"]), st.sampled_from(["gptq", "gptq_v2", "gptq_p"]),
)  # fmt: skip
def test_gptq(tmp_path: Path, seed: int, bits: int, N: int, K: int, group: int, sym: bool, order: str, version: str) -> None:
    written = make(np.random.default_rng(seed), N, K, group, bits, sym=sym, order=order)
    stored = None if version == "gptq" else written.zeros
    config = {"quant_method": "gptq", "bits": bits, "group_size": group, "sym": sym, "desc_act": order != "plain"}
    save(
        tmp_path, writers.gptq(written, stored_zeros=stored, planar=version == "gptq_p"), {**config, "checkpoint_format": version}
    )
    weight = load(tmp_path, (N, K))
    same(weight, written)
    assert (weight.zeros is None) == sym
    if order == "plain":
        assert weight.perm is None


@pytest.mark.parametrize("bits", [5, 6, 7])
def test_gptq_planar_widths(tmp_path: Path, bits: int) -> None:
    written = make(np.random.default_rng(bits), 33, 70, 32, bits, sym=bits == 6)
    config = {"quant_method": "gptq", "bits": bits, "group_size": 32, "sym": bits == 6, "checkpoint_format": "gptq"}
    save(tmp_path, writers.gptq(written, planar=True), config)
    same(load(tmp_path, (33, 70)), written)


@pytest.mark.parametrize("word", [8, 16, 32, 64])
def test_gptq_words_of_other_sizes(tmp_path: Path, word: int) -> None:
    written = make(np.random.default_rng(word), 16, 64, 32, 4, sym=False)
    config = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False, "pack_dtype": f"int{word}"}
    save(tmp_path, writers.gptq(written, word=word), config)
    same(load(tmp_path, (16, 64)), written)


@pytest.mark.parametrize("stored", [7, 8])
def test_symmetric_gptq_under_the_wrong_version(tmp_path: Path, stored: int) -> None:
    """Published checkpoints exist that say gptq and store version 2 zero points; a symmetric weight tells by itself."""
    written = make(np.random.default_rng(0), 16, 64, 32, 4, sym=True)
    for version in ("gptq", "gptq_v2"):
        config = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "checkpoint_format": version}
        save(tmp_path, writers.gptq(written, stored_zeros=np.full_like(written.zeros, stored)), config)
        weight = load(tmp_path)
        same(weight, written)
        assert weight.zeros is None


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_gptqmodel_zero_of_zero_borrows_from_its_neighbour(tmp_path: Path, bits: int) -> None:
    """GPTQModel subtracts 1 from all fields of a packed word at once; AutoGPTQ wraps each field by itself."""
    rng = np.random.default_rng(bits)
    written = make(rng, 64, 64, 32, bits, sym=False)
    written.zeros[rng.random(written.zeros.shape) < 0.3] = 0
    module = writers.gptq(written, stored_zeros=written.zeros)
    ones = sum(1 << i for i in range(0, 32, bits))
    module["qzeros"] = ((module["qzeros"].long() - ones) % 2**32).to(torch.uint32).view(torch.int32)
    config = {"quant_method": "gptq", "bits": bits, "group_size": 32, "sym": False, "meta": {"quantizer": ["gptqmodel:1.9.0"]}}
    save(tmp_path, module, config)
    same(load(tmp_path), written)
    save(tmp_path, writers.gptq(written), {**config, "meta": {}})
    same(load(tmp_path), written)


def test_gptq_without_the_optional_tensors(tmp_path: Path) -> None:
    written = make(np.random.default_rng(1), 16, 64, -1, 4, sym=True)
    module = writers.gptq(written)
    config = {"quant_method": "gptq", "bits": 4, "group_size": -1, "sym": True}
    for absent in (("g_idx",), ("qzeros",), ("g_idx", "qzeros")):
        save(tmp_path, {k: v for k, v in module.items() if k not in absent}, config)
        same(load(tmp_path), written)
    empty = {**module, "g_idx": torch.empty(0, dtype=torch.int32), "qzeros": torch.empty(0, dtype=torch.int32)}
    save(tmp_path, empty, config)
    same(load(tmp_path), written)
    save(tmp_path, {k: v for k, v in module.items() if k != "qzeros"}, {**config, "sym": False})
    with pytest.raises(CheckpointError, match=r"up_proj.qzeros: the tensor is missing .* expected I32\[1, 2\]"):
        load(tmp_path)


def test_gptq_g_idx_that_was_never_filled_in(tmp_path: Path) -> None:
    written = make(np.random.default_rng(1), 16, 64, 32, 4, sym=True)
    module = writers.gptq(written)
    module["g_idx"].zero_()
    save(tmp_path, module, {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False})
    same(load(tmp_path), written)


def test_act_order_keeps_the_group_size(tmp_path: Path) -> None:
    written = make(np.random.default_rng(2), 8, 100, 32, 4, sym=False, order="act")
    save(tmp_path, writers.gptq(written), {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False, "desc_act": True})
    weight = load(tmp_path, (8, 100))
    assert weight.group_size == 32 and weight.scales.shape == (4, 8)
    order = torch.from_numpy(written.group)[weight.perm]
    assert torch.equal(order, torch.arange(100) // 32)
    plain = weight.without_perm()
    assert plain.perm is None
    assert torch.equal(plain.dequantize(), written.values[:, weight.perm])


@FEW
@given(SEEDS, st.integers(1, 6), st.integers(1, 200), st.sampled_from([-1, 16, 32, 128, 50]), st.booleans(), st.booleans())
def test_awq_gemm(tmp_path: Path, seed: int, eighths: int, K: int, group: int, zero_point: bool, drop: bool) -> None:
    written = make(np.random.default_rng(seed), eighths * 8, K, group, 4, sym=not zero_point)
    module = writers.awq_gemm(written)
    if drop and not zero_point:
        del module["qzeros"]
    config = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": zero_point, "version": "gemm"}
    save(tmp_path, module, config)
    weight = load(tmp_path, (eighths * 8, K))
    same(weight, written)
    assert (weight.zeros is None) == (not zero_point)


def test_awq_gemm_in_several_slabs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More inputs than are turned at a time, a last slab and block that are not full, and memory that held something else."""
    monkeypatch.setattr(awq, "SLAB", 3)
    monkeypatch.setattr(awq, "_transposed", awq._turned)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, **kind: empty(*shape, **kind).fill_(0x55))
    for N, K in ((8, 24), (264, 71), (40, 96), (16, 101)):
        written = make(np.random.default_rng(K), N, K, 32, 4, sym=False)
        save(tmp_path, writers.awq_gemm(written), AWQ)
        weight = load(tmp_path, (N, K))
        same(weight, written)
        assert K % 2 == 0 or not (weight.packed[:, -1] >> 4).any()


@pytest.mark.parametrize("version", ["gemm", "GEMV"])
@pytest.mark.parametrize(("K", "group"), [(256, 128), (256, 64), (320, 32), (192, -1), (1152, 128)])
def test_awq_gemv(tmp_path: Path, K: int, group: int, version: str) -> None:
    """The shapes tell the packing, whatever version the config names."""
    written = make(np.random.default_rng(K), 40, K, group, 4, sym=False)
    save(
        tmp_path, writers.awq_gemv(written, group), {"quant_method": "awq", "w_bit": 4, "q_group_size": group, "version": version}
    )
    same(load(tmp_path, (40, K)), written)


@pytest.mark.parametrize(("K", "group", "name"), [(256, 128, "qzeros"), (128, 32, "scaled_zeros"), (192, -1, "qzeros")])
def test_awq_gemv_fast(tmp_path: Path, K: int, group: int, name: str) -> None:
    written = make(np.random.default_rng(K), 24, K, group, 4, sym=False)
    module = writers.awq_gemv_fast(written, group)
    module[name] = module.pop("qzeros")
    save(tmp_path, module, {"quant_method": "awq", "bits": 4, "group_size": group, "version": "gemv_fast"})
    same(load(tmp_path, (24, K)), written)
    module[name] += 0.4 * module["scales"]
    save(tmp_path, module, {"quant_method": "awq", "bits": 4, "group_size": group, "version": "gemv_fast"})
    with pytest.raises(CheckpointError, match=r"-qzeros / scales should be whole numbers from 0 to 15, found -?[0-9.]+ to"):
        load(tmp_path)


@FEW
@given(
    SEEDS, st.sampled_from([2, 3, 4, 5, 6, 8]), st.integers(1, 20), st.integers(1, 150), st.sampled_from([-1, 16, 50]),
    st.booleans(), st.sampled_from(["plain", "act"]),
)  # fmt: skip
def test_pack_quantized(tmp_path: Path, seed: int, bits: int, N: int, K: int, group: int, sym: bool, order: str) -> None:
    written = make(np.random.default_rng(seed), N, K, group, bits, sym=sym, order=order)
    args = {"num_bits": bits, "type": "int", "symmetric": sym, "strategy": "channel" if group == -1 else "group"}
    args |= {"group_size": None if group == -1 else group, "actorder": "group" if order == "act" else None}
    save(tmp_path, writers.packed(written, sym=sym), ct_config(args))
    same(load(tmp_path, (N, K)), written)


def test_pack_quantized_as_early_versions_wrote_it(tmp_path: Path) -> None:
    """Ten 3-bit fields to a word, two bits unused; zero points unpacked in the scale's dtype; g_idx of -1."""
    written = make(np.random.default_rng(3), 12, 96, 32, 3, sym=False)
    module = writers.packed(written, sym=False)
    padded = np.pad(written.q, ((0, 0), (0, 4))).reshape(12, 10, 10)
    module["weight_packed"] = torch.from_numpy((padded << (3 * np.arange(10))).sum(-1).astype(np.int32))
    module["weight_zero_point"] = torch.from_numpy((written.zeros.T - 4).astype(np.float16).copy())
    module["weight_g_idx"] = torch.full((96,), -1, dtype=torch.int32)
    save(tmp_path, module, ct_config({"num_bits": 3, "symmetric": False, "strategy": "group", "group_size": 32}))
    same(load(tmp_path), written)


@pytest.mark.parametrize("strategy", ["tensor", "channel", "group"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("sym", [True, False])
def test_int_quantized(tmp_path: Path, strategy: str, bits: int, sym: bool) -> None:
    rng = np.random.default_rng(bits)
    N, K, middle = 9, 64, 2 ** (bits - 1)
    written = make(rng, N, K, 32 if strategy == "group" else -1, bits, sym=sym)
    if strategy == "tensor":
        written.scales[:], written.zeros[:] = written.scales[0, 0], written.zeros[0, 0]
    module = tensors(
        weight=(written.q - middle).astype(np.int8),
        weight_scale=written.scales.T,
        weight_zero_point=(written.zeros.T - middle).astype(np.int8),
    )
    if strategy == "tensor":
        module |= {name: module[name][:1, 0].clone() for name in ("weight_scale", "weight_zero_point")}
    module |= {"input_scale": torch.ones(1), "input_zero_point": torch.zeros(1, dtype=torch.int8)}
    args = {"num_bits": bits, "symmetric": sym, "strategy": strategy, "group_size": 32 if strategy == "group" else None}
    inputs = {"num_bits": 8, "type": "int", "strategy": "tensor", "dynamic": False, "symmetric": False}
    save(tmp_path, module, ct_config(args, "int-quantized" if bits == 8 else "naive-quantized", input_activations=inputs))
    weight = load(tmp_path, (N, K))
    same(weight, written)
    assert weight.activation == "int8-tensor"


@pytest.mark.parametrize("shape", [(), (1,), (10, 1), (10,), (10, 3), "block"])
def test_fp8(tmp_path: Path, shape: tuple[int, ...] | str) -> None:
    torch.manual_seed(0)
    weight = torch.randn(10, 70).to(torch.float8_e4m3fn)
    block = shape == "block"
    scale = torch.rand((3, 3) if isinstance(shape, str) else shape) + 0.5
    args = {"num_bits": 8, "type": "float", "strategy": "block" if block else "channel"}
    grouped = shape == (10, 3)
    if grouped:
        args |= {"strategy": "group", "group_size": 32}
    if block:
        args["block_structure"] = [4, 32]
    inputs = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}
    save(tmp_path, {"weight": weight, "weight_scale": scale}, ct_config(args, "float-quantized", input_activations=inputs))
    loaded = load(tmp_path, (10, 70))
    rows = torch.arange(10) // 4 if block else torch.arange(10)
    columns = torch.arange(70) // 32 if block or grouped else torch.zeros(70, dtype=torch.int64)
    full = scale[rows][:, columns] if block or scale.dim() == 2 else scale.reshape(-1, 1).expand(10, 70)
    assert loaded.kind == "fp8" and loaded.activation == (None if block else "fp8-token")
    assert torch.equal(loaded.dequantize(), weight.float() * full)


def test_fp8_method(tmp_path: Path) -> None:
    """quant_method fp8: block scales as Qwen and DeepSeek publish them, and one scale with a static input scale."""
    torch.manual_seed(0)
    weight, scale = torch.randn(300, 140).to(torch.float8_e4m3fn), torch.rand(3, 2)
    config = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    save(tmp_path, {"weight": weight, "weight_scale_inv": scale}, config)
    full = scale.repeat_interleave(128, 0)[:300].repeat_interleave(128, 1)[:, :140]
    loaded = load(tmp_path, (300, 140))
    assert loaded.group_size == 128
    assert torch.equal(loaded.dequantize(), weight.float() * full)
    (tmp_path / "config.json").write_text("{}")  # the tensors tell by themselves
    assert torch.equal(load(tmp_path).dequantize(), weight.float() * full)
    save(tmp_path, {"weight": weight, "weight_scale_inv": scale[:2]}, config)
    with pytest.raises(CheckpointError, match=r"weight_scale_inv: found \[2, 2\], expected \[3, 2\] for blocks of 128 x 128"):
        load(tmp_path)
    static = {"quant_method": "fp8", "activation_scheme": "static"}
    save(tmp_path, {"weight": weight, "weight_scale": torch.tensor(0.5), "input_scale": torch.tensor(2.0)}, static)
    loaded = load(tmp_path)
    assert loaded.activation == "fp8-tensor"
    assert torch.equal(loaded.dequantize(), weight.float() * 0.5)
    given = {"weight": weight, "weight_scale_inv": torch.tensor(0.5), "activation_scale": torch.tensor(2.0)}
    save(tmp_path, given, static | {"weight_block_size": None})  # as Ministral 3 was published
    assert torch.equal(load(tmp_path).dequantize(), weight.float() * 0.5)


def test_scale_dtypes(tmp_path: Path) -> None:
    written = make(np.random.default_rng(0), 16, 64, 32, 4, sym=True)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        module = writers.gptq(written)
        module["scales"] = module["scales"].to(dtype)
        save(tmp_path, module, {"quant_method": "gptq", "bits": 4, "group_size": 32})
        assert load(tmp_path).scales.dtype == dtype
    config = {"torch_dtype": "bfloat16", "quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 32}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert torch.equal(load(tmp_path).scales, torch.from_numpy(written.scales).bfloat16())  # as the GPTQ tools compute


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32}


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        (
            {**GPTQ, "group_size": 48},
            {"g_idx": None},
            r"64 inputs in groups of 48 make 2 groups, but the scales have 4.*group_size",
        ),
        ({**GPTQ, "bits": 8}, {}, r"qweight: found 8 rows, expected 16 for 64 inputs of 8 bits in words of 32"),
        (GPTQ, {"scales": torch.ones(4, 15)}, r"scales: found F32\[4, 15\], expected F16/BF16/F32\[\*, 16\]"),
        (GPTQ, {"scales": torch.ones(4, 16, dtype=torch.int32)}, r"scales: found I32\[4, 16\], expected F16/BF16/F32"),
        (GPTQ, {"qzeros": torch.zeros(4, 3, dtype=torch.int32)}, r"qzeros: found I32\[4, 3\], expected I32\[4, 2\]"),
        (GPTQ, {"g_idx": torch.full((64,), 4, dtype=torch.int32)}, r"g_idx: found groups from 4 to 4, expected 0 to 3"),
        (GPTQ, {"g_idx": torch.zeros(63, dtype=torch.int32)}, r"qweight: found 8 rows|g_idx: found"),
        (GPTQ, {"qweight": torch.zeros(8, 16)}, r"qweight: found F32\[8, 16\], expected I32/I8/I16/I64\[\*, \*\]"),
    ],
)
def test_gptq_errors(tmp_path: Path, config: dict, change: dict, message: str) -> None:
    written = make(np.random.default_rng(0), 16, 64, 16, 4, sym=False)
    module = {k: v for k, v in {**writers.gptq(written), **change}.items() if v is not None}
    save(tmp_path, module, {**config, "desc_act": True})
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path, (16, 64) if "bits" in message or "g_idx" in message else None)


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        ({**AWQ, "group_size": 128}, {}, "64 inputs in groups of 128 make 1 groups, but the scales have 2"),
        (AWQ, {"qzeros": None}, r"qzeros: the tensor is missing .* expected I32\[2, 2\]"),
        (AWQ, {"scales": torch.ones(3, 3)}, "fit no packing of AWQ"),
        (AWQ, {"scales": None}, "fit no packing of AWQ"),
    ],
)
def test_awq_errors(tmp_path: Path, config: dict, change: dict, message: str) -> None:
    written = make(np.random.default_rng(0), 16, 64, 32, 4, sym=False)
    module = {k: v for k, v in {**writers.awq_gemm(written), **change}.items() if v is not None}
    save(tmp_path, module, config)
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path)


def test_awq_gemv_group_that_does_not_fit(tmp_path: Path) -> None:
    written = make(np.random.default_rng(0), 16, 256, 128, 4, sym=False)
    save(tmp_path, writers.awq_gemv(written, 128), {**AWQ, "group_size": 16})
    with pytest.raises(CheckpointError, match=r"scales: found F16\[16, 8\], expected at least \[16, 16\]; the group_size"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight_shape": torch.tensor([16, 72])}, "weight_packed: found 8 words for 72 codes of 4 bits, not 9"),
        ({"weight_shape": torch.tensor([17, 64])}, "weight_packed: found 16 rows, but weight_shape says 17"),
        ({"weight_scale": torch.ones(16, 4)}, "64 inputs in groups of 32 make 2 groups, but the scales have 4"),
        ({"weight_scale": torch.ones(15, 2)}, r"weight_scale: found \[15, 2\], expected one number, \[16, 1\] or \[16, groups\]"),
        ({"weight_zero_point": torch.ones(2, 3, dtype=torch.int32)}, r"weight_zero_point: found \[2, 3\], expected \[2, 2\]"),
        (
            {"weight_zero_point": torch.full((16, 2), 0.5)},
            "weight_zero_point: found values from 0.5 to 0.5, expected whole 4-bit",
        ),
        ({"weight_g_idx": torch.arange(64, dtype=torch.int32)}, "weight_g_idx: found group 63 of 2"),
    ],
)
def test_pack_quantized_errors(tmp_path: Path, change: dict, message: str) -> None:
    written = make(np.random.default_rng(0), 16, 64, 32, 4, sym=False)
    args = {"num_bits": 4, "symmetric": False, "strategy": "group", "group_size": 32}
    save(tmp_path, {**writers.packed(written, sym=False), **change}, ct_config(args))
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path)


SLICES = {
    "awq_llama_3_2_1b": WeightScheme("awq-gemm", 4, 128, symmetric=False),
    "gptq_llama_3_2_1b_int4": WeightScheme("gptq", 4, 128, symmetric=False, zero_offset=1),
    "gptq_llama_3_2_1b_gptqmodel_int8": WeightScheme("gptq", 8, 128, symmetric=False, zero_offset=1),
}


@pytest.mark.realdata
@pytest.mark.parametrize("name", list(SLICES))
def test_slices_of_real_checkpoints(tmp_path: Path, shared_data: Path, name: str) -> None:
    """256 x 256 pieces of Llama-3.2-1B: equal to the reference library's result once rounded to bfloat16."""
    from safetensors.torch import load_file

    pieces = load_file(shared_data / "slices" / f"{name}.safetensors")
    expected = pieces.pop("expected")
    method = "awq" if name.startswith("awq") else "gptq"
    for sym in (False, True):
        config = {"quant_method": method, "bits": SLICES[name].bits, "group_size": 128, "sym": sym, "zero_point": not sym}
        save(tmp_path, pieces, config)
        assert torch.equal(load(tmp_path, (256, 256)).dequantize(torch.bfloat16), expected.t())
    if method == "gptq":  # without any config the tensors tell the same
        (tmp_path / "config.json").write_text("{}")
        assert torch.equal(load(tmp_path).dequantize(torch.bfloat16), expected.t())


def test_group_sizes_of_uneven_orders() -> None:
    from quant.formats.common import regroup

    perm, size, rows = regroup(torch.tensor([0, 0, 0, 0, 1, 1, 2, 2, 2, 2]), 4)
    assert perm is None and size == math.gcd(4, 6) and rows is not None and rows.tolist() == [0, 0, 1, 2, 2]


def test_index_is_what_it_says(tmp_path: Path) -> None:
    written = make(np.random.default_rng(0), 16, 64, 32, 4, sym=False)
    save(tmp_path, writers.awq_gemm(written), AWQ)
    index = CheckpointIndex.open(tmp_path)
    info = index.tensors[f"{MODULE}.qweight"]
    assert (info.dtype, info.shape, info.numel, info.nbytes) == ("I32", (64, 2), 128, 512)
    assert index.total_bytes == 512 + 2 * 2 * 4 + 2 * 16 * 2
