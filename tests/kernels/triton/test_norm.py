"""Norms in Triton against the reference, in the interpreter or on a card; and compiled for every architecture."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kernels import reference
from tests.kernels.triton.aot import OLDER, Compilation, compile_all
from tests.kernels.triton.conftest import DEVICE, INTERPRETED
from tests.kernels.triton.tensors import DTYPES, EXACT, close, draw, poison  # noqa: F401

from kernels.triton import norm  # isort: skip  (after the conftest has chosen the interpreter)

SIZES = (1, 15, 16, 20, 128, 1000, 1024, 1025, 5120)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_rms_norm(size: int, dtype: torch.dtype) -> None:
    for rows in (0, 1, 7):
        x, weight = draw(rows, size, dtype=dtype, scale=7), draw(size, dtype=dtype)
        close(norm.rms_norm(x, weight, eps=1e-5), reference.rms_norm(x, weight, eps=1e-5), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_views_with_strides(dtype: torch.dtype) -> None:
    wide, weight = draw(5, 9 * 24 + 7, dtype=dtype), draw(24, dtype=dtype)
    heads = wide[:, 3 : 3 + 9 * 24].unflatten(1, (9, 24))
    for x in (heads, heads[:, 2:5], heads[1], heads[2, 3], wide[:, 8:32], heads.transpose(0, 1), heads[:, :, ::2], heads[None]):
        part = weight[: x.shape[-1]]
        close(norm.rms_norm(x, part, eps=1e-5), reference.rms_norm(x, part, eps=1e-5), dtype)


def test_squares_that_overflow_float16() -> None:
    x = torch.full((1, 64), 3000.0, dtype=torch.float16, device=DEVICE)
    assert norm.rms_norm(x, torch.ones_like(x[0]), eps=1e-5).tolist() == [[1.0] * 64]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "size"), [(1, 16), (3, 100), (5, 2048), (0, 32)])
def test_add_rms_norm(rows: int, size: int, dtype: torch.dtype) -> None:
    x, residual, weight = (draw(*shape, dtype=dtype) for shape in ((rows, size), (rows, size), (size,)))
    normed, added = norm.add_rms_norm(x, residual, weight, eps=1e-6)
    close(added, x.float() + residual.float(), dtype)
    close(normed, reference.rms_norm(added, weight, eps=1e-6), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("splits", [1, 2, 5, 8])
def test_partial_sums(splits: int, dtype: torch.dtype) -> None:
    for rows, size in ((1, 72), (6, 528), (0, 16)):
        parts, residual = draw(splits, rows, size, dtype=torch.float32), draw(rows, size, dtype=dtype)
        weight, bias = draw(size, dtype=dtype), draw(size, dtype=torch.float32)
        for given in (None, bias):
            normed, added = norm.add_rms_norm(parts, residual, weight, eps=1e-6, bias=given)
            total = torch.zeros(rows, size, device=DEVICE)
            for part in (*parts.unbind(), *([] if given is None else [given]), residual.float()):
                total += part  # in order: the very same float32 sums
            assert dtype not in EXACT or torch.equal(added, total.to(dtype))
            close(added, total.to(dtype), dtype)
            close(normed, reference.rms_norm(added, weight, eps=1e-6), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("add", [False, True])
def test_rounding_to_int8(add: bool, dtype: torch.dtype) -> None:
    for rows, size in ((1, 16), (4, 300), (0, 8)):
        x, residual, weight = (draw(*shape, dtype=dtype) for shape in ((rows, size), (rows, size), (size,)))
        if add:
            codes, scales, added = norm.add_rms_norm_int8(x, residual, weight, eps=1e-6)
            expected, same = norm.add_rms_norm(x, residual, weight, eps=1e-6)
            assert torch.equal(added, same)
        else:
            codes, scales = norm.rms_norm_int8(x, weight, eps=1e-6)
            expected = norm.rms_norm(x, weight, eps=1e-6)
        assert codes.dtype == torch.int8 and codes.shape == (rows, size) and scales.shape == (rows,)
        torch.testing.assert_close(scales, reference.int8_scales(expected.float())[:, 0] if rows else scales)
        steps = expected.float() / scales[:, None]
        assert bool(((codes - steps).abs() <= 0.5001).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_what_is_added_behind(offset: float, dtype: torch.dtype) -> None:
    """An offset makes the weight larger in float32, and leaves one rounding, that of the sum."""
    for shape in ((1, 15), (6, 1000), (2, 3, 80), (0, 16)):
        x, residual, weight = draw(*shape, dtype=dtype, scale=7), draw(*shape, dtype=dtype), draw(shape[-1], dtype=dtype)
        given = {"eps": 1e-5, "offset": offset}
        close(norm.rms_norm(x, weight, **given), reference.rms_norm(x, weight, **given), dtype)
        expected = reference.rms_norm(x, weight, **given, residual=residual)
        close(norm.rms_norm_add(x, residual, weight, **given), expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_a_norm_before_the_sum(offset: float, dtype: torch.dtype) -> None:
    """To the last bit what a rounded product, its norm with the residual and the next norm give one after another."""
    given = {"eps": 1e-6, "offset": offset}
    for splits, rows, size in ((1, 1, 72), (3, 5, 1040), (4, 0, 16)):
        parts, bias = draw(splits, rows, size, dtype=torch.float32), draw(size, dtype=torch.float32)
        residual, post, weight = (draw(*shape, dtype=dtype) for shape in ((rows, size), (size,), (size,)))
        perm, total = torch.randperm(size).to(DEVICE), torch.zeros(rows, size, device=DEVICE)
        for part in (*parts.unbind(), bias):
            total += part
        whole = total.to(dtype)
        added = norm.rms_norm_add(whole, residual, post, **given)
        normed = norm.rms_norm(added, weight, **given)
        for x, more in ((parts, {"bias": bias}), (whole, {})):
            found = norm.add_rms_norm(x, residual, weight, **given, post=post, **more)
            moved = norm.add_rms_norm(x, residual, weight, **given, post=post, perm=perm, **more)
            codes, scales, same = norm.add_rms_norm_int8(x, residual, weight, **given, post=post, **more)
            for ours, theirs in (
                (found[0], normed),
                (found[1], added),
                (moved[0], normed[:, perm]),
                (moved[1], added),
                (same, added),
            ):
                close(ours, theirs, dtype)
                assert not INTERPRETED or dtype not in EXACT or torch.equal(ours, theirs)  # a card adds squares in its own order
            most = 0.5001 if INTERPRETED else 0.5001 + 127 * torch.finfo(dtype).eps
            assert bool(((codes - found[0].float() / scales[:, None]).abs() <= most).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_order_of_the_next_weight(dtype: torch.dtype) -> None:
    """Results are those without a permutation, gathered by it."""
    for rows, size in ((1, 16), (5, 300), (2, 1025), (0, 8)):
        parts, bias = draw(3, rows, size, dtype=torch.float32), draw(size, dtype=torch.float32)
        x, residual, weight = (draw(*shape, dtype=dtype) for shape in ((rows, size + 3), (rows, size), (size,)))
        x, perm = x[:, 2 : size + 2], torch.randperm(size).to(DEVICE)
        assert torch.equal(norm.rms_norm(x, weight, eps=1e-6, perm=perm), norm.rms_norm(x, weight, eps=1e-6)[:, perm])
        codes, scales = norm.rms_norm_int8(x, weight, eps=1e-6, perm=perm)
        plain, expected = norm.rms_norm_int8(x, weight, eps=1e-6)
        assert torch.equal(codes, plain[:, perm]) and torch.equal(scales, expected)
        for function in (norm.add_rms_norm, norm.add_rms_norm_int8):
            normed, *rest = function(parts, residual, weight, eps=1e-6, bias=bias, perm=perm)
            plain, *others = function(parts, residual, weight, eps=1e-6, bias=bias)
            assert torch.equal(normed, plain[:, perm])
            assert all(torch.equal(one, other) for one, other in zip(rest, others, strict=True))


def test_rounding_of_zeros_to_int8() -> None:
    weight = torch.tensor([127.0, 0.4, 1.6, 2.4, -0.4, -2.6, -127.0, 0.0], device=DEVICE)
    codes, scales = norm.rms_norm_int8(torch.stack([torch.ones(8), torch.zeros(8)]).to(DEVICE), weight, eps=1e-30)
    assert codes.tolist() == [[127, 0, 2, 2, 0, -3, -127, 0], [0] * 8]
    torch.testing.assert_close(scales.tolist()[0], 1.0)
    assert scales[1] > 0


def test_what_does_not_fit() -> None:
    x, weight = draw(2, 16, dtype=torch.float16), draw(16, dtype=torch.float16)
    for wrong in (weight[:8], weight.float()):
        with pytest.raises(ValueError, match="a norm of"):
            norm.rms_norm(x, wrong, eps=1e-6)
        with pytest.raises(ValueError, match="a norm of"):
            norm.add_rms_norm(x, x, weight, eps=1e-6, post=wrong)
    with pytest.raises(ValueError, match="a norm of"):
        norm.add_rms_norm(x[:1], x, weight, eps=1e-6)
    with pytest.raises(ValueError, match="cannot be added"):
        norm.add_rms_norm(x.view(1, 2, 16), x, weight, eps=1e-6)
    for bias in (weight.float()[:8], weight):
        with pytest.raises(ValueError, match="a bias"):
            norm.add_rms_norm(x.float()[None], x, weight, eps=1e-6, bias=bias)
    for perm in (torch.arange(8, device=DEVICE), torch.arange(16, device=DEVICE).int()):
        with pytest.raises(ValueError, match="a permutation"):
            norm.rms_norm(x, weight, eps=1e-6, perm=perm)
    with pytest.raises(ValueError, match="16385"):
        norm.rms_norm(draw(1, 16385, dtype=torch.float16), draw(16385, dtype=torch.float16), eps=1e-6)


def compilation(
    size: int,
    dtype: str,
    *,
    add: bool,
    splits: int = 1,
    quantize: bool = False,
    bias: bool = False,
    perm: bool = False,
    post: bool = False,
) -> Compilation:
    rows, block, warps = norm.tile(size)
    types = {"x": "*fp32" if splits > 1 else f"*{dtype}", "residual": f"*{dtype}", "weight": f"*{dtype}", "added": f"*{dtype}"}
    types |= {
        "perm": "*i64",
        "bias": "*fp32",
        "post": f"*{dtype}",
        "out": "*i8" if quantize else f"*{dtype}",
        "scales": "*fp32",
        "rows": "i32",
        "inner": "i32",
        "N": "i32",
    }
    types |= {f"{name}_stride": "i32" for name in ("outer", "inner", "split", "residual")} | {"eps": "fp32"}
    constants = {"SPLITS": splits, "ADD": add, "QUANTIZE": quantize, "OFFSET": float(post), "ROWS": rows, "BLOCK": block}
    absent = {"bias": bias, "perm": perm, "post": post, "residual": add, "added": add, "scales": quantize}
    constants |= {name: None for name, present in absent.items() if not present}
    types = {name: kind for name, kind in types.items() if name not in constants}
    targets = (75, 80, 86, 89, 90, 120) if dtype == "fp16" else (80, 90)
    return Compilation("kernels.triton.norm:_rms_norm", types, constants, num_warps=warps, odd=("rows",), targets=targets)


@pytest.mark.compiles
def test_compilations() -> None:
    wanted = [compilation(size, "fp16", add=False) for size in (128, 4096, 16384)]
    wanted += [compilation(4096, "fp16", add=True, splits=8, bias=True), compilation(4096, "fp32", add=True)]
    wanted += [compilation(5120, "bf16", add=True, splits=4, quantize=True)]
    few = [compilation(size, "fp16", add=True, splits=8) for size in (2048, 8192, 16384)]
    few += [compilation(4096, "fp16", add=add, splits=8 if add else 1, perm=True) for add in (False, True)]
    few += [compilation(8192, "fp16", add=True, quantize=True)]
    few += [compilation(5376, "fp16", add=True, splits=4, post=True)]
    wanted += [replace(one, targets=(75, 89, 90)) for one in few]
    for report in compile_all(wanted, loops=False):
        assert report.fits and report.stack <= (8 if OLDER and report.target == 89 else 0), report
