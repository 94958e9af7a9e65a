"""What people paste from command lines of vLLM, llama.cpp, SGLang and Ollama.

Flags are renamed, accepted where they change nothing here, or refused with what to do instead (``cli_foreign.py`` has the
tables); so are commands.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import fields

from appliance.cli_foreign import (
    BENCH_INSTEAD,
    BENCH_NOTHING,
    BENCH_RENAMED,
    INSTEAD,
    LISTS,
    LORA,
    QUANTIZATION,
    RENAMED,
    SIZES,
    SPECULATION,
    SWITCHES,
    VALUED,
)
from appliance.config import EngineConfig, ServerConfig
from quant.errors import InputError

NAMES = [field.name.replace("_", "-") for kind in (EngineConfig, ServerConfig) for field in fields(kind)]
OWN = {f"--{no}{name}" for name in NAMES for no in ("", "no-")}


def translate(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Arguments with foreign flags taken out or renamed, and notes about those. Raises InputError for one that cannot be."""
    out: list[str] = []
    notes: list[str] = []
    rest = list(argv)
    while rest:
        token = rest.pop(0)
        if not token.startswith("-") or token == "--":
            out.append(token)
            continue
        name, equals, value = token.partition("=")
        name = name.replace("_", "-") if name.startswith("--") else name
        if joined := re.fullmatch(r"-O(\d)", token):
            name, equals, value = "-O", "=", joined[1]
        name = _whole(RENAMED.get(name, name))
        if _switch(name):
            notes.append(f"{_set(name, value, rest)} changes nothing here")
        elif name in VALUED:
            value = value if equals else _next(name, rest)
            while name in SIZES and rest and rest[0].isdecimal():
                rest.pop(0)
            if (allowed := VALUED[name]) is not None and value.replace(" ", "") not in allowed:
                raise InputError(f"{name} {value}: {INSTEAD.get(name, f'only {allowed[0]} is supported')}")
            notes.append(f"{name} changes nothing here")
        elif why := _instead(name):
            raise InputError(f"{name}: {why}")
        else:
            out += _own(name, equals, value, rest)
    return out, notes


def translate_bench(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The same for ``bench serve``: flags of vLLM's, and names that the other clients here have."""
    out: list[str] = []
    notes: list[str] = []
    rest = list(argv)
    while rest:
        token = rest.pop(0)
        name, equals, value = token.partition("=")
        name = name.replace("_", "-") if name.startswith("--") else name
        if name in BENCH_NOTHING:
            if BENCH_NOTHING[name] and not equals:
                _next(name, rest)
            notes.append(f"{name} changes nothing here")
        elif name in BENCH_INSTEAD:
            raise InputError(f"{name}: {BENCH_INSTEAD[name]}")
        else:
            out.append(f"{BENCH_RENAMED[name]}{equals}{value}" if name in BENCH_RENAMED else token)
    return out, notes


def _whole(name: str) -> str:
    """The flag of which a part is set, as in vLLM's --compilation-config.mode, where the part itself is not known."""
    first, dot, _ = name.partition(".")
    first = RENAMED.get(first, first)
    return first if dot and name not in VALUED and (first in VALUED or first in INSTEAD) else name


def _switch(name: str) -> bool:
    return name in SWITCHES or (name.startswith("--no-") and f"--{name[5:]}" in SWITCHES and name not in INSTEAD)


def _set(name: str, value: str, rest: list[str]) -> str:
    """A switch with what it is set to, which older forms of vLLM let follow. Raises InputError where it may not be turned off."""
    if not value and rest and rest[0].lower() in ("true", "false"):
        value = rest.pop(0)
    off = f"--no-{name[2:]}"
    if value.lower() == "false" and off in INSTEAD:
        raise InputError(f"{name} {value}: {INSTEAD[off]}")
    return name


def _instead(name: str) -> str | None:
    """What to do instead of a flag that would change something; None for a flag that may be ours."""
    if name in INSTEAD or ("lora" in name and name not in OWN):
        return INSTEAD.get(name, LORA)
    return SPECULATION if name.startswith("--speculative-") and name != "--speculative-config" else None


def _own(name: str, equals: str, value: str, rest: list[str]) -> list[str]:
    """A flag of ours, in the form that the parser reads."""
    if name == "--quantization":
        value = value if equals else _next(name, rest)
        return [name, QUANTIZATION.get(value, value)]
    if name == "--model":  # becomes the positional one: two models are an error, and both win over environment and file
        return [value if equals else _next(name, rest)]
    if name in LISTS and not equals:  # several values may follow, and the model behind them
        values = [_next(name, rest)]
        while rest and not rest[0].startswith("-") and not _is_model(name, rest[0]):
            values.append(rest.pop(0))
        return [part for one in values for part in (name, one)]
    if name == "--allowed-origins":  # vLLM's is a list in JSON
        value = value if equals else _next(name, rest)
        return [f"{name}={one}" for one in _strings(name, value)]
    return [f"{name}={value}" if equals else name]


def _is_model(name: str, value: str) -> bool:
    """Whether it can be no value of that list."""
    if name == "--lora-modules":
        return "=" not in value and not value.startswith("{")
    return os.path.isfile(os.path.join(value, "config.json"))


def _strings(name: str, value: str) -> list[str]:
    if not value.startswith("["):
        return [value]
    try:
        found = json.loads(value)
    except ValueError:
        found = None
    if not isinstance(found, list) or not all(isinstance(one, str) for one in found):
        raise InputError(f"{name} is an origin, as https://chat.example, or a list of them in JSON, got {value}")
    return found


def _next(name: str, rest: list[str]) -> str:
    if not rest:
        raise InputError(f"{name} needs a value")
    return rest.pop(0)
