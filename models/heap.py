"""What glibc does with memory that is freed while a model is loaded."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from kernels.layout import KEPT_BYTES

M_MMAP_THRESHOLD = -3  # glibc's malloc.h


@contextmanager
def prompt_release() -> Iterator[None]:
    """While this is entered, glibc gives large blocks back to the system as soon as they are freed.

    Otherwise it learns, from the first that is freed, to keep blocks of up to 32 MiB, in a heap for each thread: a model of 1 GiB
    was loaded with a peak of 1.8 GiB by four workers, and with 1.35 GiB and no slower like this.
    """
    choose = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if choose is None:
        yield
        return
    choose(M_MMAP_THRESHOLD, 128 << 10)  # experts are small, and there are thousands: holes between them would stay
    try:
        yield
    finally:
        choose(M_MMAP_THRESHOLD, KEPT_BYTES)


def release_memory() -> None:
    """Give freed memory back to the system: glibc keeps hundreds of MB of what loading used for a moment."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other C libraries have none and need none
        if trim is not None:
            trim(0)
