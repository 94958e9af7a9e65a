"""What is wrong with a request, and the checks that its parts share."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from quant.errors import InputError


class RequestError(InputError):
    """A request that cannot be served as asked. ``param`` names the field, ``code`` is OpenAI's slug, ``status`` is HTTP's."""

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.param, self.code, self.status = param, code, status


def check_logprobs(name: str, value: int | None, limit: int, option: str = "the server's --max-logprobs") -> None:
    """Raises RequestError for more than ``limit``, which ``option`` says; -1, all of them, needs -1, no limit."""
    if value is not None and limit != -1 and (value == -1 or value > limit):
        raise RequestError(f"{name} is {value}, but at most {limit} are allowed here ({option})", param=name)


def check_flags(**flags: Any) -> None:
    """Raises RequestError naming the one that is neither True nor False: "no" would count as true."""
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise RequestError(f"{name} must be True or False, got {value!r:.80}", param=name)


def entries(name: str, values: Any, what: str) -> tuple[Any, ...]:
    """Those of a list, whatever kind of list it is; none of None. The letters of a text are not what it lists."""
    if values is None:
        return ()
    with suppress(TypeError):
        if not isinstance(values, str | bytes | bytearray | Mapping):
            return tuple(values)
    raise RequestError(f"{name} must be a list of {what}, got {values!r:.80}", param=name)


def check_number(
    name: str, value: Any, low: float, high: float, *, integer: bool = False, open_low: bool = False, hint: str = ""
) -> None:
    kinds = int if integer else (int, float)
    good = isinstance(value, kinds) and not isinstance(value, bool) and abs(value) <= sys.float_info.max  # neither inf nor nan
    if good and (low < value if open_low else low <= value) and value <= high:
        return
    what = "an integer" if integer else "a number"
    below = f"above {low}" if open_low else f"at least {low}"
    above = "" if high == math.inf else f" and at most {high}"
    raise RequestError(f"{name} must be {what} {below}{above}{f' ({hint})' if hint else ''}, got {value!r:.80}", param=name)
