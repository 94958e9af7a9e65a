"""A device that this machine need not have: tensors on it are kept in the processor's memory, but say that they are elsewhere.

Whatever would fail on a card because its operands lie in different places fails here, too. Values are real.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

CARD = torch.device("meta")  # a type that asks no library whether it is there


class OnCard(Tensor):
    """A tensor that says that it is on the card; ``held`` has its values."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> OnCard:
        made = Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype, device=CARD
        )
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return carried_out(func, args, kwargs or {})


class Card(TorchDispatchMode):
    """Within it, tensors can be made and moved to CARD."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and to hear so would load the compiler

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return carried_out(func, args, kwargs or {})


def carried_out(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """One operation. Raises RuntimeError where its tensors lie in different places; numbers may lie anywhere."""
    tensors: list[Tensor] = []

    def held(value: Any) -> Any:
        if isinstance(value, Tensor):
            tensors.append(value)
        return value.held if isinstance(value, OnCard) else value

    given, named = mapped(held, args), mapped(held, kwargs)
    there = [isinstance(tensor, OnCard) for tensor in tensors]
    asked = kwargs.get("device")
    moving = func.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.copy_)
    if any(there) and not moving and any(not on and tensor.dim() for on, tensor in zip(there, tensors, strict=True)):
        raise RuntimeError(f"{func}: some of its tensors are on the card, and some are not")
    if asked is not None:
        named["device"] = torch.device("cpu")
    known = {id(tensor.held): tensor for tensor in tensors if isinstance(tensor, OnCard)}
    found = func(*given, **named)
    if func.overloadpacket is torch.ops.aten.copy_:
        return tensors[0]
    place = any(there) if asked is None else torch.device(asked).type == CARD.type

    def placed(value: Any) -> Any:
        if not isinstance(value, Tensor) or not place:
            return value
        return known[id(value)] if id(value) in known else OnCard(value)

    return mapped(placed, found)


def mapped(change: Callable[[Any], Any], value: Any) -> Any:
    """As tree_map, which takes as long as most of the operations that are carried out here."""
    kind = type(value)
    if kind is tuple:
        return tuple([mapped(change, one) for one in value])
    if kind is list:
        return [mapped(change, one) for one in value]
    if kind is dict:
        return {name: mapped(change, one) for name, one in value.items()}
    return change(value)
