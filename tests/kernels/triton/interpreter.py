"""Triton's interpreter without what it does again and again: a third of the time of these tests."""

from __future__ import annotations

from typing import Any

import triton.language as tl
from triton.runtime import interpreter


def hasten() -> None:
    """A kernel that is launched finds Triton's functions replaced by the interpreter's: those that it calls need not replace them
    once more. And which type of numpy's stands for one is known after the first time."""
    prepare, numpy_type = interpreter._patch_lang, interpreter._get_np_dtype
    prepared: set[int] = set()
    types: dict[str, Any] = {}

    def prepare_once(function: Any) -> Any:
        modules = {id(value) for value in function.__globals__.values() if value is tl or value is tl.core}
        if modules and modules <= prepared:
            return None  # within a launch: nobody restores what is replaced here
        scope = prepare(function)
        if not hasattr(scope, "restore"):
            return scope  # of a function that is called, or of a version of Triton that restores in another way
        restore = scope.restore

        def restore_all() -> None:
            prepared.clear()
            restore()

        scope.restore = restore_all
        prepared.update(modules)
        return scope

    def numpy_type_of(kind: Any) -> Any:
        scalar = kind.scalar
        if scalar.is_ptr():
            return numpy_type(scalar)
        if scalar.name not in types:
            types[scalar.name] = numpy_type(scalar)
        return types[scalar.name]

    interpreter._patch_lang, interpreter._get_np_dtype = prepare_once, numpy_type_of
