"""Checked access to the keys of a JSON object: every complaint names the key, what was found and what was expected."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from models.family import Architecture
from quant.errors import InputError

_MISSING = object()
DTYPES = ("float16", "bfloat16", "float32")
COUNTED = 2**16
MOST = 2**48  # larger numbers are nobody's: no size of a model comes near, and no share is less than one of so many


class Fields:
    """A JSON object with a name for messages. A key whose value is null counts as absent."""

    def __init__(self, values: Mapping[str, Any], name: str = "config.json") -> None:
        self.values, self.name = values, name

    def get(self, key: str) -> Any:
        return self.values.get(key)

    def integer(self, key: str, *, default: Any = _MISSING, minimum: int = 1) -> int:
        return self._checked(key, default, lambda v: type(v) is int and minimum <= v <= MOST, f"an integer of at least {minimum}")

    def count(self, key: str, *, default: Any = _MISSING, minimum: int = 1) -> int:
        """Of what is gone through one by one: more than COUNTED would only take memory until there is none."""
        found = self.integer(key, default=default, minimum=minimum)
        if found > COUNTED:
            raise InputError(f"{self.name}: {key} is {found}, expected at most {COUNTED}")
        return found

    def number(self, key: str, *, default: Any = _MISSING, above: float = 0.0) -> float:
        what = f"a number above {above:g}" if above else "a positive number"
        return float(self._checked(key, default, lambda v: type(v) in (int, float) and above + 1 / MOST <= v <= MOST, what))

    def flag(self, key: str, *, default: bool) -> bool:
        return self._checked(key, default, lambda v: type(v) is bool, "true or false")

    def token_ids(self, key: str) -> tuple[int, ...]:
        """One, a list of them, or none."""
        value = self.values.get(key)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(i) is int and i >= 0 for i in ids):
            raise InputError(f"{self.name}: {key} is {value!r:.60}, expected a token id or a list of them")
        return tuple(ids)

    def _checked(self, key: str, default: Any, good: Any, what: str) -> Any:
        value = self.values.get(key)
        if value is None:
            if default is _MISSING:
                raise InputError(f"{self.name}: {key} is missing, expected {what}")
            return default
        if not good(value):
            raise InputError(f"{self.name}: {key} is {value!r:.60}, expected {what}")
        return value


def stated(source: bool | str, fields: Fields) -> bool:
    return source if isinstance(source, bool) else fields.flag(source, default=False)


def tensors_ahead(kind: Architecture, fields: Fields, layers: int) -> tuple[str, ...]:
    """Of some families such layers follow the others, of some they have names of their own."""
    more = fields.count(kind.ahead_count, default=1, minimum=0) if kind.ahead_count else 0
    return (*kind.ahead, *(f"model.layers.{layers + number}." for number in range(more)))


def cap(key: str, fields: Fields) -> float | None:
    return None if fields.get(key) is None else fields.number(key)


def published_dtype(config: Mapping[str, Any]) -> str:
    dtype = config.get("dtype") or config.get("torch_dtype") or "float32"  # transformers' default
    if dtype not in DTYPES:
        raise InputError(f"config.json: torch_dtype {dtype!r} is not supported; supported are {', '.join(DTYPES)}")
    return dtype
