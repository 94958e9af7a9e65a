"""Triton's interpreter as tests use it (interpreter.py) against Triton's own rules: types, shapes, numbers, what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import numpy as np
import pytest

from tests.kernels.triton.conftest import INTERPRETED

if not INTERPRETED:
    pytest.skip("kernels are compiled", allow_module_level=True)
import triton.language as tl  # isort: skip  (after the conftest has chosen the interpreter)
from triton.language.semantic import TritonSemantic  # isort: skip
from triton.runtime import interpreter  # isort: skip

KINDS = (tl.int1, tl.int8, tl.int32, tl.uint32, tl.float8e5, tl.float16, tl.bfloat16, tl.float32)
KINDS += (tl.pointer_type(tl.int8), tl.pointer_type(tl.float32))
SHAPES = ((), (4,), (8,), (1,), (4, 8), (4, 1))


@pytest.fixture(scope="module", autouse=True)
def launched() -> Iterator[None]:
    scope = interpreter._LangPatchScope()
    interpreter._patch_lang_core(tl, scope)
    yield
    scope.restore()


def tensor(kind: Any, shape: tuple[int, ...]) -> Any:
    numpy_type = interpreter._get_np_dtype(kind)
    numbers = np.arange(1, 1 + int(np.prod(shape))).reshape(shape or (1,)).astype(numpy_type)
    return tl.tensor(interpreter.TensorHandle(numbers, kind), tl.block_type(kind, list(shape)) if shape else kind)


def told(function: Any, *given: Any) -> Any:
    """Types, shapes and numbers of what comes back, or what is refused."""
    try:
        found = function(*given)
    except Exception as error:
        return type(error)
    return [
        (str(one.type), [int(size) for size in one.shape], str(one.handle.dtype), one.handle.data.dtype, one.handle.data.tolist())
        for one in (found if isinstance(found, tuple) else (found,))
    ]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy's casts
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_operands_meet_as_triton_says(kind: Any) -> None:
    ours, theirs = interpreter.interpreter_semantic, TritonSemantic(interpreter.interpreter_builder)
    others = [tensor(other, shape) for other in KINDS for shape in SHAPES] + [0, 3, -1, 2**40, 0.5, -0.0, 0.0, 300, True]
    refused = 0
    for shape, other, turned in product(SHAPES, others, (False, True)):
        pair = [other, tensor(kind, shape)] if turned else [tensor(kind, shape), other]
        for rules in ((), (True, True), (True, False, False), (False, False, True, True)):
            expected = told(theirs.binary_op_type_checking_impl, *pair, *rules)
            refused += isinstance(expected, type)
            assert told(ours.binary_op_type_checking_impl, *pair, *rules) == expected, (pair, rules)
    assert refused > 100
    for other in KINDS:
        for shape in SHAPES:
            assert told(ours.cast, tensor(kind, shape), other) == told(theirs.cast, tensor(kind, shape), other)
            assert (tl.block_type(kind, [4, 8]) == tl.block_type(other, [4, 8])) == (str(kind) == str(other))
