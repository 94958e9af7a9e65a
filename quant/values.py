"""Values of quantization settings (no torch). CheckpointError names the place, the key, what was found and what would work."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from quant.errors import CheckpointError


def choice(source: str, key: str, value: Any, known: Mapping[str, Any] | tuple[Any, ...]) -> Any:
    """A value that is known."""
    if value not in known:
        raise CheckpointError(f"{source}: {key} {value!r} is not supported; one of {', '.join(map(str, known))} is")
    return value


def integer(source: str, config: Mapping[str, Any], keys: tuple[str, ...], default: int | None) -> int:
    """The whole number under the first of ``keys`` that is there; without any ``default``, and None makes that an error."""
    for key in keys:
        if config.get(key) is not None:
            value = config[key]
            if isinstance(value, bool) or not re.fullmatch(r"-?\d+", str(value)):
                raise CheckpointError(f"{source}: {key} is {value!r}, expected a whole number")
            return int(value)
    if default is None:
        raise CheckpointError(f"{source}: {keys[0]} is missing")
    return default


def group_size(source: str, config: Mapping[str, Any], keys: tuple[str, ...], default: int) -> int:
    """A positive number, or -1: one group per output."""
    size = integer(source, config, keys, default)
    if size == 0 or size < -1:
        raise CheckpointError(
            f"{source}: {keys[0]} {size} is not a group size; a positive number is, or -1 for one group per output"
        )
    return size


def names(source: str, config: Mapping[str, Any], key: str) -> list[str]:
    """A list of module names; empty where the key is missing or None."""
    names = config.get(key) or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"{source}: {key} is {names!r}, expected a list of module names")
    return names


def regex(source: str, key: str, pattern: str) -> str:
    """A pattern that compiles."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise CheckpointError(f"{source}: {key} has {pattern!r}, which is not a regular expression ({error})") from None
    return pattern


def block(source: str, key: str, value: Any) -> tuple[int, int]:
    """Two positive numbers, written [128, 128] or "128x128"; as (outputs, inputs)."""
    if isinstance(value, str):
        value = value.split("x")
    if not isinstance(value, list) or len(value) != 2 or not all(str(n).isdigit() and int(n) > 0 for n in value):
        raise CheckpointError(f"{source}: {key} is {value!r}, expected two positive numbers such as [128, 128]")
    return int(value[0]), int(value[1])
