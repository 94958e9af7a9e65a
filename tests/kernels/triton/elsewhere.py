"""For pytest (``python -O -m pytest -p tests.kernels.triton.elsewhere``): tests of this folder on a card that is not there.

Tensors on it are those of tests/fake_card.py, and what would fail on a card because its operands lie in different places fails
here: operations of torch, and kernels that are given the host's memory. Kernels write nothing, and nobody looks at results.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"  # before any kernel is imported

import threading
from typing import Any

import torch
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

from tests import fake_card
from tests.fake_card import CARD, Card, OnCard
from tests.kernels.triton import conftest

INDEXED = (torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_, torch.ops.aten._index_put_impl_)
carry_out, make, set_threads = fake_card.carried_out, torch.tensor, torch.set_num_threads


def carried_out(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Indices on the host are sent to the card by torch itself."""
    if func.overloadpacket in INDEXED and isinstance(args[0], OnCard):
        places = [OnCard(at) if isinstance(at, Tensor) and not isinstance(at, OnCard) else at for at in args[1]]
        args = (args[0], places, *args[2:])
    return carry_out(func, args, kwargs)


def launch(kernel: Any, *args: Any, grid: Any, warmup: bool, **named: Any) -> None:
    for value in (*args, *named.values()):
        if isinstance(value, Tensor) and not isinstance(value, OnCard):
            raise RuntimeError(f"{kernel.fn.__name__} is given the host's memory: {value.dtype} {list(value.shape)}")


def tensor(data: Any, *, device: Any = None, **options: Any) -> Tensor:
    """torch.tensor makes tensors on "meta" by itself."""
    found = make(data, **options)
    return found if device is None else found.to(device)


def set_num_threads(count: int) -> None:
    """What the loader's threads begin with: a dispatch mode is a thread's own."""
    set_threads(count)
    if threading.current_thread() is not threading.main_thread():
        Card().__enter__()


conftest.DEVICE, conftest.INTERPRETED = CARD.type, False
fake_card.carried_out = carried_out
InterpretedFunction.run = launch  # type: ignore[method-assign]
OnCard.data_ptr = lambda self: self.held.data_ptr()  # type: ignore[method-assign]
OnCard.tolist = lambda self: self.held.tolist()  # type: ignore[method-assign]
torch.tensor, torch.set_num_threads, torch.inference_mode = tensor, set_num_threads, torch.no_grad  # type: ignore[assignment, misc]
torch.testing.assert_close = lambda found, expected, **limits: found + expected  # type: ignore[assignment]
Card().__enter__()
