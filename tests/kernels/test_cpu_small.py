"""The CPU's element-wise operators against the reference."""

from __future__ import annotations

import pytest
import torch

from kernels import reference
from kernels.cpu import torch_ops
from kernels.ops import get_ops
from tests.kernels.paged import make_step

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}


@pytest.fixture(params=list(TOLERANCE), ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    limit = TOLERANCE[expected.dtype]
    return found.dtype == expected.dtype and torch.allclose(found.float(), expected.float(), atol=limit, rtol=limit)


@pytest.mark.parametrize("shape", [(0, 64), (1, 64), (5, 33), (3, 4, 16)])
def test_norms(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, residual, weight = torch.randn(*shape).to(dtype), torch.randn(*shape).to(dtype), torch.randn(shape[-1]).to(dtype)
    assert close(torch_ops.rms_norm(x, weight, eps=1e-5), reference.rms_norm(x, weight, eps=1e-5))
    for found, expected in zip(
        torch_ops.add_rms_norm(x, residual, weight, eps=1e-5), reference.add_rms_norm(x, residual, weight, eps=1e-5), strict=True
    ):
        assert close(found, expected)


def test_norm_of_values_whose_squares_overflow_float16() -> None:
    x = torch.full((1, 64), 3000.0, dtype=torch.float16)
    assert torch_ops.rms_norm(x, torch.ones(64, dtype=torch.float16), eps=1e-5).tolist() == [[1.0] * 64]


@pytest.mark.parametrize("rotary", [16, 12, 2])
def test_rope(rotary: int, dtype: torch.dtype) -> None:
    """On views of one fused projection, as the decoder calls it."""
    fused = torch.randn(7, 6 * 16).to(dtype)
    q, k = fused[:, :64].unflatten(1, (4, 16)), fused[:, 64:].unflatten(1, (2, 16))
    table, positions = torch.randn(30, rotary), torch.randint(0, 30, (7,))
    for found, expected in zip(torch_ops.rope(q, k, positions, table), reference.rope(q, k, positions, table), strict=True):
        assert close(found, expected)


def test_silu_mul(dtype: torch.dtype) -> None:
    x = torch.randn(5, 66).to(dtype)
    kept = x.clone()
    assert close(torch_ops.silu_mul(x), reference.silu_mul(x))
    assert torch.equal(x, kept)


def test_embedding(dtype: torch.dtype) -> None:
    table, ids = torch.randn(9, 4).to(dtype), torch.tensor([8, 0, 8])
    assert torch.equal(torch_ops.embedding(ids, table), reference.embedding(ids, table))


def test_store_kv(dtype: torch.dtype) -> None:
    batch, first = make_step([(5, 4), (0, 2), (16, 1)], dtype=dtype)
    _, second = make_step([(5, 4), (0, 2), (16, 1)], dtype=dtype)
    kv = torch.randn(7, 2, 2, 16).to(dtype)
    torch_ops.store_kv(kv[:, 0], kv[:, 1], first, batch.slots)
    reference.store_kv(kv[:, 0], kv[:, 1], second, batch.slots)
    for found, expected in ((first.k, second.k), (first.v, second.v)):
        assert torch.equal(found.nan_to_num(), expected.nan_to_num()) and torch.equal(found.isnan(), expected.isnan())


def test_get_ops() -> None:
    assert get_ops("cpu").name == "cpu"
    assert get_ops("cpu", reference=True).name == "reference"
