"""What would hold up the event loop, or fill the memory: work goes beside the loop, and large bodies share a budget."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

from appliance.core.params import RequestError
from appliance.server.errors import unavailable

P = ParamSpec("P")
T = TypeVar("T")

SMALL_BODY = 256 * 1024  # bodies up to this size are not counted, and are parsed on the event loop
BUDGET = 512 * 1024**2  # bytes that all larger bodies and what was made of them may take together
MAX_VALUES = 2**20  # of a body: so many are made in less than a tenth of a second, in which nothing else runs
NESTED = 4  # values as which a list or an object counts
VALUE_BYTES = 40  # an integer takes 40, from as little as 2 bytes of JSON; a list in a list 96, from 3

_one = ThreadPoolExecutor(1, thread_name_prefix="large")


def give_memory_back() -> None:
    """Have what was freed returned to the system, as far as the C library can be told.

    Left to itself, glibc takes the size of the largest block that was ever freed (a body, say) for small from then on, and keeps
    memory of that size in the heap of each thread.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        for parameter, value in ((-3, 2**20), (-1, 2**20), (-8, 2)):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, M_ARENA_MAX
            mallopt(parameter, value)


async def one_at_a_time(function: Callable[P, T], *args: P.args, **more: P.kwargs) -> T:
    """In the one thread for what takes much memory while it runs."""

    def work() -> T:
        try:
            return function(*args, **more)
        finally:
            with contextlib.suppress(OSError, AttributeError):
                ctypes.CDLL(None).malloc_trim(0)  # many small pieces stay in the heap otherwise

    return await asyncio.get_running_loop().run_in_executor(_one, work)


def check_values(raw: bytes | bytearray) -> int:
    """The number of values in a JSON text, or somewhat more. Raises RequestError (413) where they are too many.

    Commas and brackets in texts count as well: a text with a million of them is longer than contexts are.
    """
    values = raw.count(b",") + NESTED * (raw.count(b"[") + raw.count(b"{"))
    if values > MAX_VALUES:
        message = f"the body holds more than {MAX_VALUES} values: send less, or several requests"
        raise RequestError(message, code="body_too_large", status=413)
    return values


def weight(raw: bytes | bytearray) -> int:
    """Bytes that a JSON text and what is made of it may take. Raises RequestError (413).

    One character beyond Latin-1, perhaps an escape, lets all others of its text take four bytes.
    """
    plain = raw.isascii() and b"\\u" not in raw
    return (2 if plain else 5) * len(raw) + VALUE_BYTES * check_values(raw)


class Share:
    """What one request holds of the budget."""

    held = 0  # by all of them

    def __init__(self) -> None:
        self.size = 0

    def grow(self, size: int) -> None:
        """Raises RequestError (503)."""
        if Share.held - self.size + size > BUDGET:
            raise unavailable("the large requests at work take all the memory that there is for them", "server_overloaded")
        Share.held += size - self.size
        self.size = size

    def close(self) -> None:
        Share.held -= self.size
        self.size = 0
