"""What would hold up the event loop, or fill the memory: work goes beside the loop or in slices, large bodies share a budget."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

from appliance.core.params import RequestError
from appliance.server.errors import unavailable

P = ParamSpec("P")
T = TypeVar("T")

SMALL_BODY = 256 * 1024  # bodies up to this size are not counted, and are parsed on the event loop
BUDGET = 512 * 1024**2  # bytes that all larger bodies and what was made of them may take together
MAX_VALUES = 2**20  # of a body: so many are made in less than 50 ms, in which nothing else runs
LIST, OBJECT = 4, 16  # values as which these count
ROUGH = 2**16  # up to so many, texts count as well
PART = 64 * 1024  # bytes of a body that are looked through at once
VALUE_BYTES = 40  # an integer takes 40, from as little as 2 bytes of JSON; a list in a list 96, from 3

SLICE_S = 0.002  # of work on the event loop, until others have their turn

_BEGIN = rb"(?:\s|\\[nrt]|\\u00(?:20|0[9aAdD]))*+(?:[{\[]|\\u00[57][bB])"  # of a list or an object, as a text has it
_TEXT = rb'[^"\\]*+(?:\\.[^"\\]*+)*+'
_JSON, _IN_TEXT = re.compile(_BEGIN), re.compile(_TEXT, re.DOTALL)
_STRUCTURE = re.compile(rb'(?:[^"]++|"%b")*+' % _TEXT, re.DOTALL)  # ends before a text that ends later
_WHOLE_TEXT = re.compile(rb'"(?:(%b%b)|%b)"' % (_BEGIN, _TEXT, _TEXT), re.DOTALL)
_JSON_TEXT = re.compile(b'"' + _BEGIN)

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


def keep_what_is_there() -> None:
    """Have the garbage collector leave alone what a server that is ready consists of.

    Else it goes through all of that, too, where an answer is made of very many values: a tenth of a second in which nothing runs.
    """
    gc.collect()
    gc.freeze()


async def one_at_a_time(function: Callable[P, T], *args: P.args, **more: P.kwargs) -> T:
    """In the one thread for what takes much memory while it runs."""

    def work() -> T:
        try:
            return function(*args, **more)
        finally:
            with contextlib.suppress(OSError, AttributeError):
                ctypes.CDLL(None).malloc_trim(0)  # many small pieces stay in the heap otherwise

    return await asyncio.get_running_loop().run_in_executor(_one, work)


class Pace:
    """Lets others run now and then in the midst of long work on the event loop: ``await pace()`` after each small part of it.

    No thread: one that computes makes the event loop wait for the interpreter's lock after every single send.
    """

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """Others have just run."""
        self._begun = time.perf_counter()

    async def __call__(self) -> None:
        if time.perf_counter() - self._begun > SLICE_S:
            await asyncio.sleep(0)
            self.begin()


def check_values(raw: bytes | bytearray) -> int:
    """The number of values in a JSON text, or somewhat more where they are few. Raises RequestError (413): too many."""
    values = _values(raw)
    if values > ROUGH:  # perhaps they are a text's commas and braces
        values = _values_outside_texts(raw)
    if values > MAX_VALUES:
        message = f"the body holds more than {MAX_VALUES} values: send less, or several requests"
        raise RequestError(message, code="body_too_large", status=413)
    return values


def _values(raw: bytes | bytearray) -> int:
    """As if all were structure, but for braces that are followed by a quote or a line break in a text (an escape)."""
    objects = raw.count(b"{") - raw.count(b"{\\")
    return raw.count(b",") + LIST * raw.count(b"[") + OBJECT * objects


def _values_outside_texts(raw: bytes | bytearray) -> int:
    """As a JSON parser sees it up to its first error, or up to MAX_VALUES; and in texts that begin as JSON does (a call's
    arguments are parsed, too) as ``_values`` has it. In short parts, between which others run."""
    values = at = 0
    within = json = False  # a text, which may be JSON
    while at < len(raw) and values <= MAX_VALUES:
        found = (_IN_TEXT if within else _STRUCTURE).match(raw, at, at + PART)
        assert found is not None  # both match nothing, too
        if not within:
            values += _values(_WHOLE_TEXT.sub(b"", found[0]))
            if _JSON_TEXT.search(found[0]):
                values += _values(b'"'.join(_WHOLE_TEXT.findall(found[0])))
        elif json:
            values += _values(found[0])
        at = found.end()
        if raw[at : at + 1] == b'"':
            within, at = not within, at + 1
            json = within and _JSON.match(raw, at) is not None
        elif found.end() == found.start():
            break  # a backslash where nothing follows
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
