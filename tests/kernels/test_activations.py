"""Activations of MLPs without a gate against transformers' own, and how much they take."""

from __future__ import annotations

import pytest
import torch

from kernels import layout
from kernels.activations import XIELU, relu2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 7])
def test_xielu_is_transformers(dtype: torch.dtype, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.activations import XIELUActivation

    monkeypatch.setattr("kernels.activations.ACTIVATED_AT_ONCE", 3 * 33 + 1)  # three rows at a time, and one is left
    theirs = XIELUActivation(alpha_p_init=1.3, alpha_n_init=0.9, beta=0.4, eps=-1e-6, dtype=torch.float32)
    ours = XIELU.of(theirs.alpha_p, theirs.alpha_n, theirs.beta.item(), theirs.eps.item())
    x = (3 * torch.randn(rows, 33)).to(dtype)
    x[0, 0] = 0
    expected = theirs(x.float())
    found = ours(x)
    assert found.data_ptr() == x.data_ptr()
    assert torch.allclose(found.float(), expected, rtol=torch.finfo(dtype).eps * 2, atol=1e-6)


def test_a_row_larger_than_what_goes_at_once() -> None:
    x = torch.randn(2, layout.ACTIVATED_AT_ONCE + 1)
    expected = XIELU(0.7, 0.6, 0.5, -1e-6)(x[:, :5].clone())
    assert torch.allclose(XIELU(0.7, 0.6, 0.5, -1e-6)(x)[:, :5], expected)


def test_relu_squared() -> None:
    x = torch.tensor([[-2.0, 0.0, 3.0]])
    assert torch.equal(relu2(x), torch.tensor([[0.0, 0.0, 9.0]]))
