"""Triton's interpreter without what it does again and again, half of the time of these tests; and 3.6's with a new numpy."""

from __future__ import annotations

import inspect
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
    _remember_builtins()
    _same_types_stay(interpreter.interpreter_semantic)


def _remember_builtins() -> None:
    """Each launch looks for the functions that it replaces, and puts two calls around each: it looks once, and one is enough."""
    found: dict[int, list[tuple[str, Any, Any]]] = {}
    semantic, around = interpreter.interpreter_semantic, tl.core.add.__code__

    def interpreted(member: Any) -> Any:
        inner = member.__wrapped__ if getattr(member, "__code__", None) is around else member

        def call(*args: Any, **named: Any) -> Any:
            named["_semantic"] = semantic
            return inner(*args, **named)

        return call

    def replace_builtins(package: Any, builder: Any, scope: Any) -> None:
        if id(package) not in found:
            members = inspect.getmembers(package, tl.core.is_builtin)
            found[id(package)] = [(name, member, interpreted(member)) for name, member in members]
        for name, member, ours in found[id(package)]:
            if getattr(package, name) is member:  # and not one that was replaced under another module's name
                scope.set_attr(package, name, ours)

    interpreter._patch_builtin = replace_builtins


def _same_types_stay(semantic: Any) -> None:
    """Operands of one type need no rules of promotion, those of one shape no broadcast, and how two shapes meet is known after
    the first time."""
    convert, broadcast, cast = semantic.binary_op_type_checking_impl, semantic.broadcast_impl_value, semantic.cast
    promote, promoted = semantic.computation_type_impl, dict[tuple[Any, ...], Any]()
    block, tensor = tl.core.block_type, tl.core.tensor
    integers = {*tl.dtype.SINT_TYPES, *tl.dtype.UINT_TYPES}
    numbers: dict[tuple[Any, ...], tuple[Any, Any]] = {}  # beside a tensor: the type of both, and itself in that
    met: dict[tuple[int, int], tuple[Any, ...]] = {}  # by the identities of shapes (_remember_shapes): what each becomes

    def widened(value: Any, shape: Any) -> Any:
        if shape is None:
            return value
        return tensor(semantic.builder.create_broadcast(value.handle, shape), block(value.dtype, shape))

    def same_shape(lhs: Any, rhs: Any) -> tuple[Any, Any]:
        a, b = lhs.type, rhs.type
        if type(a) is not block or type(b) is not block:
            return (lhs, rhs) if type(a) is not block and type(b) is not block else broadcast(lhs, rhs)
        if a.shape is b.shape:
            return lhs, rhs
        if len(a.shape) != len(b.shape):
            return broadcast(lhs, rhs)
        key = id(a.shape), id(b.shape)
        if key not in met:
            both = broadcast(lhs, rhs)
            met[key] = tuple(None if new is old else new.type.shape for new, old in zip(both, (lhs, rhs), strict=True))
            return both
        return widened(lhs, met[key][0]), widened(rhs, met[key][1])

    def same_type(
        lhs: Any, rhs: Any, allow_lhs_ptr: bool = False, allow_rhs_ptr: bool = False, arithmetic_check: bool = True,
        div_or_mod: bool = False,
    ) -> tuple[Any, Any]:  # fmt: skip
        if not div_or_mod and type(lhs) is tensor and type(rhs) is tensor:
            kind = lhs.dtype
            if kind.name == rhs.dtype.name if type(kind) is tl.dtype else allow_lhs_ptr and rhs.dtype.name in integers:
                return same_shape(lhs, rhs)  # of one type, or a pointer and how far it moves
        if arithmetic_check and hasattr(semantic, "_cast_to_computation_type"):  # of Triton 3.9
            if type(lhs) is tensor and type(rhs) in (int, float) and type(lhs.dtype) is tl.dtype:
                kind, number = beside(lhs.dtype, rhs, True, div_or_mod)
                return same_shape(cast_unless_same(lhs, kind), number)
            if type(rhs) is tensor and type(lhs) in (int, float) and type(rhs.dtype) is tl.dtype:
                kind, number = beside(rhs.dtype, lhs, False, div_or_mod)
                return same_shape(number, cast_unless_same(rhs, kind))
        return convert(lhs, rhs, allow_lhs_ptr, allow_rhs_ptr, arithmetic_check, div_or_mod)

    def cast_unless_same(value: Any, kind: Any, *rounding: Any, **named: Any) -> Any:
        own, other = value.dtype, kind.scalar
        if own is other or (type(own) is type(other) is tl.dtype and own.name == other.name):
            return value
        return cast(value, kind, *rounding, **named)

    def beside(kind: Any, value: float, behind: bool, div_or_mod: bool) -> tuple[Any, Any]:
        key = kind.name, behind, div_or_mod, repr(value)
        if key not in numbers:
            own = semantic.to_tensor_type(value)
            both = (kind, False, own, True) if behind else (own, True, kind, False)
            common = promote(*both, div_or_mod)
            numbers[key] = common, semantic._cast_to_computation_type(value, common)
        return numbers[key]

    def promote_once(a: Any, a_is_scalar: bool, b: Any, b_is_scalar: bool, div_or_mod: bool) -> Any:
        key = a.name, a_is_scalar, b.name, b_is_scalar, div_or_mod
        if key not in promoted:
            promoted[key] = promote(a, a_is_scalar, b, b_is_scalar, div_or_mod)
        return promoted[key]

    semantic.binary_op_type_checking_impl, semantic.broadcast_impl_value = same_type, same_shape
    semantic.cast, semantic.computation_type_impl = cast_unless_same, promote_once


def _remember_shapes() -> None:
    """Every result is a new tensor of a new type: what both say of a shape is made once for each shape."""
    make_block, block, tensor = tl.core.block_type.__init__, tl.core.block_type, tl.core.tensor
    translate, equal, unwrap = block.to_ir, tl.dtype.__eq__, tl.core._unwrap_if_constexpr
    plain = {bool, int, float, str, type(None), tl.dtype, block, tensor}
    shapes: dict[tuple[int, ...], tuple[Any, int, str]] = {}
    same: dict[int, tuple[Any, int, str]] = {}  # by the identity of a shape that stands there
    of_tensors: dict[int, tuple[Any, Any]] = {}  # by the identity of what stands in ``shapes``
    scalar = tl.core.tuple([]), tl.constexpr(1)

    def init_block(self: Any, element_ty: Any, shape: Any) -> None:
        if (known := same.get(id(shape))) is None:
            key = tuple([size.value if isinstance(size, tl.constexpr) else size for size in shape])
            known = shapes.get(key)
        if known is not None:
            self.element_ty, (self.shape, self.numel, text) = element_ty, known
            self.name = f"<{text}, {element_ty.name}>"
            return
        make_block(self, element_ty, shape)
        shapes[key] = same[id(self.shape)] = self.shape, self.numel, str(self.shape)
        of_tensors[id(self.shape)] = tl.core.tuple([tl.constexpr(size) for size in key]), tl.constexpr(self.numel)

    def init_tensor(self: Any, handle: Any, type: Any) -> None:
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = of_tensors[id(type.shape)] if type.is_block() else scalar

    def to_ir(self: Any, builder: Any) -> Any:
        if builder is interpreter.interpreter_builder and type(self.element_ty) is tl.dtype:
            return self  # what the interpreter calls so is the type itself
        return translate(self, builder)

    def unwrapped(value: Any) -> Any:
        kind = type(value)
        return value if kind in plain else value.value if kind is tl.constexpr else unwrap(value)

    def same_name(self: Any, other: Any) -> Any:
        return self.name == other.name if type(other) is tl.dtype else equal(self, other)

    block.__init__, tensor.__init__ = init_block, init_tensor
    block.to_ir, tl.dtype.__eq__, tl.core._unwrap_if_constexpr = to_ir, same_name, unwrapped
