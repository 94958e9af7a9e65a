"""Where options come from beside the command line: the environment, and the file of --config."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from cyclopts import App, ArgumentCollection
from cyclopts.config import Dict, Env

from appliance.config import EngineConfig, ServerConfig
from quant.errors import InputError


class Variables(Env):
    """APPLIANCE_*, but for options of clients that mean another thing there: variables of these names say what servers serve, and
    whom they let in."""

    def __call__(self, app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
        ours = ArgumentCollection(one for one in arguments if one.parameter.show_env_var is not False)
        if os.environ.get("APPLIANCE_PORT", "").startswith("tcp://"):  # Kubernetes', for a service that is called appliance
            ours = ArgumentCollection(one for one in ours if one.name != "--port")
        super().__call__(app, commands, ours)


def take_config(argv: Sequence[str]) -> tuple[list[str], str | None]:
    """Take --config FILE out of the arguments."""
    rest, file, given = [], os.environ.get("APPLIANCE_CONFIG"), iter(argv)
    for token in given:
        if token == "--config":
            file = next(given, None)
            if file is None:
                raise InputError("--config needs the name of a TOML file")
        elif token.startswith("--config="):
            file = token.removeprefix("--config=")
        else:
            rest.append(token)
    return rest, file


def foreign_key(command: str) -> list[Dict]:
    """The key that a server of vLLM would ask for: whoever has it in the environment does not expect to let everybody in."""
    key = os.environ.get("VLLM_API_KEY", "")
    return [Dict({"api_key": [key]}, use_commands_as_keys=False, source="VLLM_API_KEY")] if command == "serve" and key else []


def file_options(file: str | None, command: str) -> list[Dict]:
    if not file:
        return []
    try:
        found = tomllib.loads(Path(file).read_text())
    except OSError as error:
        raise InputError(f"--config {file}: {error.strerror}") from None
    except ValueError as error:
        yaml = " (YAML, as vLLM has it, is not read here: TOML says key = value)" if file.endswith((".yaml", ".yml")) else ""
        raise InputError(f"--config {file} is not valid TOML: {error}{yaml}") from None
    flat: dict[str, Any] = {}
    for key, value in found.items():
        flat.update(value if key in ("engine", "server") and isinstance(value, dict) else {key: value})
    flat = {key.replace("-", "_"): value for key, value in flat.items()}
    engine, server = ({f.name for f in fields(kind)} for kind in (EngineConfig, ServerConfig))
    strange = sorted(flat.keys() - engine - server)
    if strange:
        raise InputError(f"--config {file}: there is no option {strange[0]!r}; options are those of `appliance serve --help`")
    known = {"serve": engine | server, "plan": engine}.get(command, set())
    return [Dict({k: v for k, v in flat.items() if k in known}, use_commands_as_keys=False, source=file)]
