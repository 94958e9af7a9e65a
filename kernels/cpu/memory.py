"""Large tensors of the CPU."""

from __future__ import annotations

import mmap
from contextlib import suppress

import torch
from torch import Tensor

from kernels.layout import HUGE_PAGE


def in_huge_pages(nbytes: int) -> Tensor:
    """uint8 [nbytes], zeros, in pages of 2 MiB where the system gives them when asked.

    Addresses are looked up less often. It is not resident before it is written.
    """
    if nbytes < HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(nbytes, dtype=torch.uint8)
    memory = mmap.mmap(-1, nbytes)
    with suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)
