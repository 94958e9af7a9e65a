"""``--models FILE``: several models of one server, a TOML table each. Its name is the name under which the model answers."""

from __future__ import annotations

import math
import os
import tomllib
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from appliance.adapters import NAME, read_names
from appliance.config import EngineConfig, ServerConfig
from quant.errors import InputError

OF_SERVER = (
    "chat_template",
    "default_chat_template_kwargs",
    "tool_call_parser",
    "reasoning_parser",
    "generation_config",
    "idle_unload",
)
"""Options of the server that each model may have for itself."""
OF_ENGINE = tuple(f.name for f in fields(EngineConfig) if f.name not in ("device", "threads", "seed"))
LOADS = ("start", "demand")


@dataclass(frozen=True)
class Entry:
    """One model: the server's options hold its names."""

    name: str
    engine: EngineConfig
    server: ServerConfig
    load: str = "start"  # or "demand": not before a request asks for it


def read_models(file: str, engine: EngineConfig, server: ServerConfig) -> list[Entry]:
    """The models of a file, in its order; what a table does not say comes from ``engine`` and ``server``.

    ``aliases`` are further names. A relative directory counts from the file's own, where there is one. Raises InputError.
    """
    path = Path(file)
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"--models {file}: {error.strerror}") from None
    except ValueError as error:
        raise InputError(f"--models {file} is not valid TOML: {error}") from None
    if not tables:
        raise InputError(f'--models {file} names no model: a table each is needed, as in [llama] with model = "DIRECTORY"')
    entries = [_entry(f"--models {file}: [{name}]", name, table, path.parent, engine, server) for name, table in tables.items()]
    seen: set[str] = set()
    for entry in entries:
        for name in (*entry.server.served_model_name, *read_names(entry.engine.lora_modules)):
            if not name.strip():
                raise InputError(f"--models {file}: a name is empty: clients need one to ask for")
            if name in seen:
                raise InputError(f"--models {file}: two models answer to the name {name!r}")
            seen.add(name)
    return entries


def _entry(where: str, name: str, table: Any, parent: Path, engine: EngineConfig, server: ServerConfig) -> Entry:
    if not isinstance(table, dict):
        raise InputError(f"{where} is no table: options of a model belong under [NAME]")
    table = {key.replace("-", "_"): value for key, value in table.items()}
    names, load = [name, *_names(where, table.pop("aliases", []))], table.pop("load", "start")
    for one in names:
        if not NAME.fullmatch(one):
            raise InputError(f"{where}: {one!r} cannot be a model's name: printable ASCII without spaces is")
    if load not in LOADS:
        raise InputError(f'{where}: load is {load!r}: "start" or "demand" is needed')
    known = {*OF_ENGINE, *OF_SERVER}
    strange = sorted(table.keys() - known)
    if strange:
        raise InputError(f"{where}: there is no option {strange[0]!r} for a model; there are {', '.join(sorted(known))}")
    if not isinstance(table.get("model"), str):
        raise InputError(f"{where}: model is missing: the directory of a checkpoint, or a name on the hub")
    table |= {key: _located(table[key], parent) for key in ("model", "tokenizer") if isinstance(table.get(key), str)}
    theirs = {key: table.pop(key) for key in OF_SERVER if key in table}
    made = replace(server, **_checked(where, ServerConfig, theirs), served_model_name=tuple(names))
    if not 0 <= made.idle_unload < math.inf:
        raise InputError(f"{where}: idle_unload is {made.idle_unload:g}: seconds, 0 or more, are needed")
    own = _checked(where, EngineConfig, table)
    if "lora_modules" in own:
        own["lora_modules"] = _located_adapters(where, own["lora_modules"], parent)
    return Entry(name, replace(engine, **own), made, load)


def _names(where: str, value: Any) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        raise InputError(f"{where}: aliases is {value!r}: a list of names is needed")
    return value


def _located(model: str, parent: Path) -> str:
    beside = parent / model
    return str(beside) if os.path.isdir(beside) else model


def _located_adapters(where: str, modules: tuple[str, ...], parent: Path) -> tuple[str, ...]:
    try:
        return tuple(f"{name}={_located(str(path), parent)}" for name, path in read_names(modules).items())
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


def _checked(where: str, kind: type, given: dict[str, Any]) -> dict[str, Any]:
    """The options with the types that they are declared with."""
    try:
        made: Any = TypeAdapter(kind).validate_python(given)
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(f"{where}: {first['loc'][0]} is {first['input']!r}: {first['msg'].lower()}") from None
    return {key: getattr(made, key) for key in given}
