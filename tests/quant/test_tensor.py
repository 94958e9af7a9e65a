"""The canonical form: packing, joining, splitting, permuting."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quant.tensor import QuantTensor


def random(seed: int, N: int, K: int, bits: int, size: int, zeros: bool, perm: bool) -> QuantTensor:
    g = torch.Generator().manual_seed(seed)
    groups = -(-K // size)
    return QuantTensor.from_values(
        torch.randint(0, 2**bits, (N, K), generator=g, dtype=torch.uint8),
        scales=torch.rand(groups, N, generator=g).half() + 0.01,
        zeros=torch.randint(0, 2**bits, (groups, N), generator=g, dtype=torch.uint8) if zeros else None,
        perm=torch.randperm(K, generator=g) if perm else None,
        bits=bits,
        group_size=size,
    )


SHAPES = st.tuples(
    st.integers(0, 2**31),
    st.integers(1, 20),
    st.integers(1, 70),
    st.sampled_from([4, 8]),
    st.integers(1, 70),
    st.booleans(),
    st.booleans(),
)


@given(SHAPES)
def test_dequantize_is_the_formula(shape: tuple[int, int, int, int, int, bool, bool]) -> None:
    seed, N, K, bits, size, zeros, perm = shape
    weight = random(seed, N, K, bits, min(size, K), zeros, perm)
    q, full = weight.unpack(), weight.dequantize()
    for n in range(0, N, 3):
        for j in range(0, K, 5):
            zero = 2 ** (bits - 1) if weight.zeros is None else int(weight.zeros[j // weight.group_size, n])
            scale = float(weight.scales[j // weight.group_size, n])
            column = j if weight.perm is None else int(weight.perm[j])
            assert float(full[n, column]) == pytest.approx((int(q[n, j]) - zero) * scale, rel=1e-6)
    assert torch.equal(weight.dequantize(torch.bfloat16), full.bfloat16())


@given(SHAPES, st.data())
def test_split_joins_again(shape: tuple[int, int, int, int, int, bool, bool], data: st.DataObject) -> None:
    seed, N, K, bits, size, zeros, perm = shape
    weight = random(seed, N, K, bits, min(size, K), zeros, perm)
    cut = data.draw(st.integers(0, N))
    parts = weight.split([cut, N - cut])
    for part in parts:
        part.check()
    again = QuantTensor.cat(parts)
    again.check()
    assert torch.equal(again.packed, weight.packed) and torch.equal(again.dequantize(), weight.dequantize())
    order = torch.randperm(N)
    assert torch.equal(weight.select_rows(order).dequantize(), weight.dequantize()[order])
    assert weight.nbytes == sum(t.nbytes for t in (weight.packed, weight.scales, weight.zeros, weight.perm) if t is not None)


def test_cat_of_symmetric_and_asymmetric() -> None:
    a, b = random(0, 4, 32, 4, 16, False, False), random(1, 6, 32, 4, 16, True, False)
    joined = QuantTensor.cat([a, b])
    joined.check()
    assert torch.equal(joined.dequantize(), torch.cat([a.dequantize(), b.dequantize()]))


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        (random(1, 4, 32, 8, 16, False, False), "bits"),
        (random(1, 4, 32, 4, 8, False, False), "group_size"),
        (random(1, 4, 64, 4, 16, False, False), "K"),
        (random(1, 4, 32, 4, 16, False, True), "perm"),
        (replace(random(1, 4, 32, 4, 16, False, False), activation="int8-token"), "activation"),
        (replace(random(1, 4, 32, 4, 16, False, False), scales=torch.ones(2, 4)), "scale dtype"),
    ],
)
def test_cat_refuses(other: QuantTensor, difference: str) -> None:
    weight = random(0, 4, 32, 4, 16, False, False)
    assert QuantTensor.can_cat([weight, weight]) and not QuantTensor.can_cat([weight, other])
    with pytest.raises(ValueError, match=f"different {difference} cannot be joined"):
        QuantTensor.cat([weight, other])


def test_cat_refuses_different_orders() -> None:
    first, second = random(0, 4, 32, 4, 16, False, True), random(1, 4, 32, 4, 16, False, True)
    assert QuantTensor.can_cat([first, first]) and not QuantTensor.can_cat([first, second])


def test_fp8() -> None:
    packed = torch.randn(4, 10).to(torch.float8_e4m3fn)
    weight = QuantTensor(packed, torch.rand(2, 4), None, None, 8, 6, 10, 4)
    weight.check()
    joined = QuantTensor.cat([weight, weight.select_rows(torch.tensor([3, 0]))])
    assert joined.kind == "fp8" and torch.equal(joined.split([4, 2])[0].dequantize(), weight.dequantize())
    assert torch.equal(weight.dequantize(), packed.float() * weight.scales.t()[:, torch.arange(10) // 6])
    with pytest.raises(ValueError, match="no integer codes"):
        weight.unpack()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 3}, "bits 3"),
        ({"group_size": 0}, "group size 0"),
        ({"group_size": 33}, "group size 33"),
        ({"packed": torch.zeros(4, 17, dtype=torch.uint8)}, "packed is"),
        ({"scales": torch.ones(3, 4)}, "scales are"),
        ({"scales": torch.ones(2, 4, dtype=torch.int32)}, "scales are"),
        ({"zeros": torch.zeros(2, 5, dtype=torch.uint8)}, "zeros of a int weight are"),
        ({"perm": torch.zeros(32, dtype=torch.int64)}, "not a permutation of 32"),
    ],
)
def test_check(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(random(0, 4, 32, 4, 16, False, False), **change).check()


def test_split_refuses_sizes_that_do_not_add_up() -> None:
    with pytest.raises(ValueError, match=r"cannot split 4 outputs into \[1, 2\]"):
        random(0, 4, 32, 4, 16, False, False).split([1, 2])
