"""The planner's arithmetic against what the packers really make."""

from __future__ import annotations

import random

import pytest
import torch

from kernels import layout, reference
from kernels.cpu import backend, weights
from kernels.cpu.native_ops import NativeOps
from kernels.layout import bias_nbytes, head_bits, native_workspace_bytes, ops_name, shares_table, slab_rows, weight_nbytes
from quant.errors import InputError
from tests.kernels.native import instruction_sets, native_ops
from tests.kernels.paged import make_step
from tests.kernels.weights import random_fp4, random_nvfp4, random_weight

PACKERS = {"cpu": weights, "reference": reference}
if backend.native() is not None:
    PACKERS["cpu-native"] = native_ops(instruction_sets()[0])
DTYPES = ("float32", "bfloat16", "float16")


@pytest.mark.parametrize("case", range(80))
def test_nbytes(case: int) -> None:
    rng = random.Random(case)
    N, K = rng.choice([1, 63, 64, 65, 128, 200]), rng.choice([32, 64, 65, 96, 256, 300, 512])
    group = rng.choice([None, 16, 32, 64, 100, 128, 256])
    group = K if group is None else min(group, K)
    bits, dtype = rng.choice([0, 4, 8]), rng.choice(DTYPES)
    asymmetric, act_order = bits > 0 and rng.random() < 0.5, rng.random() < 0.5
    activation = rng.choice([None, "int8-token", "fp8-token"])
    scale_dtype, gated = rng.choice([torch.float16, torch.bfloat16, torch.float32]), N % 2 == 0 and rng.random() < 0.5
    weight = random_weight(
        N,
        K,
        bits=bits,
        group_size=group,
        asymmetric=asymmetric,
        act_order=act_order,
        activation=activation,
        scale_dtype=scale_dtype,
        seed=case,
    )
    for ops, module in PACKERS.items():
        predicted = weight_nbytes(
            ops=ops,
            dtype=dtype,
            kind=weight.kind,
            bits=weight.bits,
            N=N,
            K=K,
            group_size=group,
            asymmetric=asymmetric,
            act_order=act_order,
            activation=activation,
            scale_bytes=scale_dtype.itemsize,
            gated=gated,
        )
        assert module.pack(weight, dtype=getattr(torch, dtype), gated=gated).nbytes == predicted, ops


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ops", PACKERS)
def test_4_bit_floats(ops: str, dtype: str) -> None:
    """Half a byte an input, and a byte for 32; whole panels of outputs, of each half, where kernels are native."""
    for N, K, gated in ((70, 96, False), (130, 64, True), (128, 2880, True)):
        packed = PACKERS[ops].pack(random_fp4(N, K), dtype=getattr(torch, dtype), gated=gated)
        common = {"dtype": dtype, "kind": "fp4", "bits": 4, "group_size": 32, "asymmetric": False, "act_order": False}
        assert packed.nbytes == weight_nbytes(ops=ops, N=N, K=K, gated=gated, scale_bytes=1, **common)
        outputs = {70: 128, 130: 256, 128: 128}[N] if ops == "cpu-native" else N
        assert packed.nbytes == outputs * K * 17 // 32
        packed = PACKERS[ops].pack(random_nvfp4(N, K), dtype=getattr(torch, dtype), gated=gated)
        common |= {"group_size": 16, "factors": True}
        assert packed.nbytes == weight_nbytes(ops=ops, N=N, K=K, gated=gated, scale_bytes=1, **common)
        assert packed.nbytes == outputs * (K * 9 // 16 + 4), "a byte for 16, and a factor an output"


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ops", PACKERS)
def test_dense_and_bias(ops: str, dtype: str, gated: bool) -> None:
    kind, packer = getattr(torch, dtype), PACKERS[ops]
    for N, K in ((6, 7), (130, 64)):
        predicted = weight_nbytes(
            ops=ops,
            dtype=dtype,
            kind="dense",
            bits=16,
            N=N,
            K=K,
            group_size=K,
            asymmetric=False,
            act_order=False,
            gated=gated,
        )
        assert packer.pack(torch.randn(N, K), dtype=kind, gated=gated).nbytes == predicted
        bias = bias_nbytes(ops=ops, dtype=dtype, N=N, gated=gated)
        assert packer.pack(torch.randn(N, K), dtype=kind, bias=torch.randn(N, dtype=kind), gated=gated).nbytes == predicted + bias


def test_native_sizes_worked_out_by_hand() -> None:
    """70 outputs are two panels; 300 inputs in groups of 100 are padded to 104 each, of 200 cut into 128, 128 and 100."""
    common = {"ops": "cpu-native", "dtype": "bfloat16", "kind": "int", "N": 70, "K": 300, "asymmetric": True, "act_order": True}
    assert weight_nbytes(**common, bits=4, group_size=100) == 128 * (3 * 104 // 2 + 3 * (2 + 1)) + 4 * 300
    assert weight_nbytes(**common, bits=8, group_size=200, scale_bytes=4) == 128 * (3 * 128 + 2 * (4 + 1)) + 4 * 300
    assert weight_nbytes(**common, bits=4, group_size=100, gated=True) == weight_nbytes(**common, bits=4, group_size=100)
    wide = {**common, "N": 160}  # 160 are three panels, two halves of 80 are four
    assert weight_nbytes(**wide, bits=4, group_size=100) == 192 * (3 * 104 // 2 + 9) + 1200
    assert weight_nbytes(**wide, bits=4, group_size=100, gated=True) == 256 * (3 * 104 // 2 + 9) + 1200


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", instruction_sets())
def test_native_products_stay_within_the_planned_workspace(isa: str, dtype: str) -> None:
    """The scratch memory of the kernels only grows: it is the most that any product took."""
    native = NativeOps(isa, 1)
    kind, planned = getattr(torch, dtype), [0, 0]
    for K, group, bits, gated in ((4100, 4100, 8, False), (3000, 40, 4, True), (2048, 128, 4, False), (70, 70, 8, True)):
        weight = random_weight(2, K, bits=bits, group_size=group, asymmetric=True)
        for activation in ("int8", "bf16"):
            packed = native.pack(weight, dtype=kind, gated=gated, activation=activation)
            for rows in (1, 17, 520):
                native.matmul(torch.randn(rows, K).to(kind), packed)
                parts = native_workspace_bytes(rows, K, group, rounded=activation == "int8")
                planned = [max(pair) for pair in zip(planned, parts, strict=True)]
    assert 0 < native.machine.scratch_bytes <= sum(planned)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(16, 2, 512), (6, 6, 20), (71, 1, 64), (128, 1, 576)])
def test_native_attention_stays_within_the_planned_workspace(threads: int, heads: int, kv_heads: int, size: int) -> None:
    """In prefill and in decode, where long sequences are cut; what a thread needs is planned to the byte."""
    native = NativeOps(instruction_sets()[0], threads)
    shared, each = layout.native_attention_bytes(threads, heads=heads, kv_heads=kv_heads, head_dim=size)
    for sequences in ([(3000, 1)], [(2000, 1)] * 3, [(700, 60), (0, 5)]):
        batch, cache = make_step(sequences, kv_heads=kv_heads, head_dim=size)
        native.attention(torch.randn(batch.positions.numel(), heads, size), cache, batch, scale=1.0)
    assert threads * each < native.machine.scratch_bytes <= shared + threads * each


def test_slabs() -> None:
    assert slab_rows(2048, 2) == 1024 and slab_rows(100_000, 4) == 64


def test_head_bits() -> None:
    choices = [(c, o, d) for c in ("auto", "model") for o in ("cpu", "cpu-native", "reference") for d in ("bfloat16", "float32")]
    found = {one: head_bits(one[0], ops=one[1], dtype=one[2]) for one in choices}
    assert [one for one, bits in found.items() if bits is not None] == [("auto", "cpu-native", "bfloat16")]
    assert found["auto", "cpu-native", "bfloat16"] == 8
    assert head_bits("int4", ops="cpu", dtype="float32") == 4 and head_bits("int8", ops="reference", dtype="float16") == 8
    with pytest.raises(InputError, match="--lm-head-dtype is 'int2': one of auto, int8, int4, model is needed"):
        head_bits("int2", ops="cpu", dtype="bfloat16")


def test_shares_table() -> None:
    names = ("cpu", "cpu-native", "triton", "reference")
    assert [ops for ops in names if shares_table(ops, 8)] == ["cpu-native", "triton"] == [o for o in names if shares_table(o, 4)]
    assert [ops for ops in names if shares_table(ops, None)] == ["cpu", "triton", "reference"]


def test_ops_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("APPLIANCE_CPU_ISA", "torch")
    assert (ops_name("cpu"), ops_name("cpu", reference=True), ops_name("cuda")) == ("cpu", "reference", "triton")
    monkeypatch.delenv("APPLIANCE_CPU_ISA")
    assert ops_name("cpu") == ("cpu" if backend.native() is None else "cpu-native")


def test_pinned_memory_is_asked_for_in_requests_of_which_little_is_rounded_up() -> None:
    assert [layout.pinned(n) for n in (0, 1, 5, 8, 9)] == [0, 1, 8, 8, 16]
    assert layout.pinned_slots(5 << 7, 8 << 20) == [512, 128] and layout.pinned_slots(0, 5) == []
    for slots, size in ((1, 1), (1, 5), (7, 3), (640, (8 << 20) + 4096), (2500, 66 << 10), (3, 1 << 30), (1000, 34 << 14)):
        pieces = layout.pinned_slots(slots, size)
        asked = sum(layout.pinned(count * size) for count in pieces)
        assert sum(pieces) == slots and asked >= slots * size and len(pieces) < 24
        assert asked <= slots * size * 1.04 + 2 * size, (slots, size, asked / slots / size)
