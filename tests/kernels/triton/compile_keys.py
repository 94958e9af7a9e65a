"""Which compilations a card would need: launches in the interpreter, keyed as Triton's own cache keys them.

A kernel is compiled for each combination of its constants, warps and stages, of the types of its arguments, of whether a pointer
or an integer is a multiple of 16, and of whether an integer is 1, unless it says that it does not care.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

Key = tuple[Any, ...]


@contextmanager
def recorded() -> Iterator[set[Key]]:
    """Launches inside the block. Nothing runs: what kernels would have written is not written."""
    keys: set[Key] = set()
    run = InterpretedFunction.run

    def recording(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        keys.add(key(self, args, kwargs))

    InterpretedFunction.run = recording  # type: ignore[method-assign]
    try:
        yield keys
    finally:
        InterpretedFunction.run = run  # type: ignore[method-assign]


@cache
def facts(kernel: Any) -> tuple[inspect.Signature, frozenset[str], frozenset[str]]:
    """(signature, constants, arguments that are not specialized) of a kernel."""
    signature = inspect.signature(kernel.fn)
    constants = (name for name, p in signature.parameters.items() if "constexpr" in str(p.annotation))
    return signature, frozenset(constants), frozenset(kernel.kwargs.get("do_not_specialize") or ())


def key(kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Key:
    signature, constants, careless = facts(kernel)
    given = dict(zip(signature.parameters, args, strict=False)) | kwargs
    parts: list[Any] = [f"{kernel.fn.__module__}:{kernel.fn.__name__}"]
    for name, value in given.items():
        constant = name in constants or name not in signature.parameters
        parts.append((name, str(value) if constant else kind(value, name in careless)))
    return tuple(parts)


def kind(value: Any, careless: bool) -> str:
    if value is None or isinstance(value, bool | float):
        return type(value).__name__
    if isinstance(value, Tensor):
        return f"{value.dtype}{' / 16' if value.data_ptr() % 16 == 0 else ''}"
    wide = "i32" if -(2**31) <= value < 2**31 else "i64"
    if careless:
        return wide
    return "1" if value == 1 else f"{wide}{' / 16' if value % 16 == 0 else ''}"
