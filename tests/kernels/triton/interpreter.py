"""Triton's interpreter without what it does again and again, a third of the time of these tests; and 3.6's with a new numpy."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import triton.language as tl
from triton.runtime import interpreter


def hasten() -> None:
    """A kernel that is launched finds Triton's functions replaced by the interpreter's: those that it calls need not replace them
    once more. And which type of numpy's stands for one is known after the first time."""
    prepare, numpy_type = interpreter._patch_lang, interpreter._get_np_dtype
    prepare_tensors = interpreter._patch_lang_tensor
    prepared: set[int] = set()
    types: dict[str, Any] = {}
    used: dict[Any, set[int]] = {}

    def prepare_once(function: Any) -> Any:
        if (modules := used.get(function)) is None:
            modules = {id(value) for value in function.__globals__.values() if value is tl or value is tl.core}
            used[function] = modules
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

    def prepare_tensor(tensor: Any, scope: Any) -> None:
        prepare_tensors(tensor, scope)
        # Triton 3.6 makes an int of an array of one number, which numpy 2.4 no longer does.
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang, interpreter._get_np_dtype = prepare_once, numpy_type_of
    interpreter._patch_lang_tensor = prepare_tensor
    builder = interpreter.interpreter_builder
    # Whether integers overflow is computed for every sum and product, and looked at in debugging alone.
    builder.options = replace(builder.options, sanitize_overflow=builder.options.debug)
    _remember_shapes()


def _remember_shapes() -> None:
    """Every result is a new tensor of a new type: what both say of a shape is made once for each shape."""
    make_block, block, tensor = tl.core.block_type.__init__, tl.core.block_type, tl.core.tensor
    shapes: dict[tuple[int, ...], tuple[Any, int, str]] = {}
    of_tensors: dict[int, tuple[Any, Any]] = {}  # by the identity of what stands in ``shapes``
    scalar = tl.core.tuple([]), tl.constexpr(1)

    def init_block(self: Any, element_ty: Any, shape: Any) -> None:
        key = tuple([size.value if isinstance(size, tl.constexpr) else size for size in shape])
        if key in shapes:
            self.element_ty, (self.shape, self.numel, text) = element_ty, shapes[key]
            self.name = f"<{text}, {element_ty}>"
            return
        make_block(self, element_ty, shape)
        shapes[key] = self.shape, self.numel, str(self.shape)
        of_tensors[id(self.shape)] = tl.core.tuple([tl.constexpr(size) for size in key]), tl.constexpr(self.numel)

    def init_tensor(self: Any, handle: Any, type: Any) -> None:
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = of_tensors[id(type.shape)] if type.is_block() else scalar

    block.__init__, tensor.__init__ = init_block, init_tensor  # type: ignore[method-assign]
