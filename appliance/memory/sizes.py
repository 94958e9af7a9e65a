"""Sizes and lengths as people write them: a number, and what it counts. No torch."""

from __future__ import annotations

import math
import re

from quant.errors import InputError

_BINARY = {letter: 1 << 10 * power for power, letter in enumerate("KMGT", 1)}
_DECIMAL = {letter: 1000**power for power, letter in enumerate("kmgt", 1)}
LENGTHS: dict[str, int] = {"": 1, **_BINARY, **_DECIMAL}
"""vLLM's: 32k is 32,000, 32K is 32,768."""
SIZES = {**LENGTHS, **{f"{letter.lower()}ib": unit for letter, unit in _BINARY.items()}}
SIZES |= {f"{letter}b": unit for letter, unit in _DECIMAL.items()}
"""Of bytes the same, and KiB, MiB, GiB, TiB beside KB, MB, GB, TB, however they are written."""
_MEMORY = {**SIZES, **{letter.lower(): unit for letter, unit in _BINARY.items()}}  # 24g of memory has always been 24 GiB
del _MEMORY[""]
EXAMPLES = "(4GiB or 4G; 512MiB or 512M; 2g or 2GB = 2,000,000,000)"


def number(value: object, units: dict[str, int]) -> float:
    """4096, "1.5G" or "64 MiB" in what the units count; NaN for what is none of these."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)", str(value).strip())
    if match is None or isinstance(value, bool):
        return math.nan
    unit = match[2] if len(match[2]) == 1 else match[2].lower()
    return float(match[1]) * units.get(unit, math.nan)


def parse_bytes(flag: str, value: int | str, *, least: int = 0) -> int:
    """A number of bytes, with a unit if you like. InputError for what is none."""
    size = number(value, SIZES) if isinstance(value, (int, str)) else math.nan
    if not size >= least or size != int(size):
        raise InputError(
            f"{flag} is {value!r}: a whole number of at least {least} bytes, with a unit if you like {EXAMPLES}, is needed"
        )
    return int(size)


def parse_gib(flag: str, value: float | str) -> int:
    """Bytes of a number of GiB, or of a size with a unit. InputError for what is none."""
    size = math.nan
    if isinstance(value, str):
        size = number(value, {**SIZES, "": _BINARY["G"]})
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        size = value * _BINARY["G"]
    if not 0 <= size < math.inf:
        raise InputError(f"{flag} is {value!r}: a number of GiB, 0 or more, or as 512MiB, is needed")
    return int(size)


def parse_size(flag: str, text: str) -> int:
    """24GiB, 24G, 24g and 24576MiB are 24 * 2^30 bytes; 24GB is 24 * 10^9. InputError for what is none, or has no unit."""
    size = number(text, _MEMORY)
    if not size > 0:
        raise InputError(f"{flag} is {text!r}: a size is needed, as in 24GiB, 512MiB or 24GB")
    return int(size)
