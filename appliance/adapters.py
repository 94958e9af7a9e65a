"""What the options say of LoRA adapters. No torch."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from appliance.config import EngineConfig
from models.adaptable import check_adaptable
from models.adapter_config import AdapterConfig, AdapterLimits
from models.spec import ModelSpec
from quant.errors import InputError

LEAST_RANK = 16
NAME = re.compile(r"[!-~]{1,200}")
"""Of a model or an adapter: what clients can ask for, and logs and metrics can show."""


def spec_of(published: Mapping[str, Any], config: EngineConfig) -> ModelSpec:
    """What config.json says, with the adapters that the options say. Raises InputError for either."""
    spec, limits = ModelSpec.from_config(published), adapter_limits(config)
    if limits is not None:
        check_adaptable(spec)
    return replace(spec, adapters=limits)


def adapter_limits(config: EngineConfig) -> AdapterLimits | None:
    """None where there are to be none. Raises InputError, naming the option, or what is wrong with an adapter."""
    named = check_adapters(config)
    if not (config.enable_lora or named or config.max_loras or config.max_lora_rank):
        return None
    ranks = {path: AdapterConfig.read(path).largest for path in named.values()}
    rank = config.max_lora_rank or max([LEAST_RANK, *ranks.values()])
    for path, found in ranks.items():
        if found > rank:
            raise InputError(f"{path} has rank {found}, but --max-lora-rank is {rank}: give at least {found}, or leave it out")
    return AdapterLimits(config.max_loras or max(1, len(named)), rank)


def check_adapters(config: EngineConfig) -> dict[str, Path]:
    """What can be said before a directory is looked at. Raises InputError naming the option."""
    for flag, value in (("--max-loras", config.max_loras), ("--max-lora-rank", config.max_lora_rank)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise InputError(f"{flag} is {value!r:.60}: a whole number of at least 1 is needed")
    named = read_names(config.lora_modules)
    if config.max_loras is not None and config.max_loras < len(named):
        words = f"--lora-modules names {len(named)} adapters, but --max-loras is {config.max_loras}"
        raise InputError(f"{words}: give at least {len(named)}, or leave it out")
    return named


def read_names(modules: Sequence[str]) -> dict[str, Path]:
    """--lora-modules: names and directories, of NAME=DIRECTORY or vLLM's {"name": NAME, "path": DIRECTORY}. Raises InputError."""
    found: dict[str, Path] = {}
    for one in map(str, modules):
        name, path = _of_json(one) if one.lstrip().startswith("{") else one.partition("=")[::2]
        if not (name and path):
            raise InputError(f"--lora-modules has {one!r:.200}: NAME=DIRECTORY is needed")
        if not NAME.fullmatch(name):
            raise InputError(f"--lora-modules: {name!r:.80} cannot be an adapter's name: printable ASCII without spaces is")
        if name in found:
            raise InputError(f"--lora-modules names {name!r} twice")
        found[name] = Path(path)
    return found


def _of_json(text: str) -> tuple[str, str]:
    """vLLM's ``base_model_name`` is what clients shall take for the parent: here that is the model."""
    try:
        found: Any = json.loads(text)
    except ValueError as error:
        raise InputError(f"--lora-modules has {text!r:.200}, which is no JSON ({error}): NAME=DIRECTORY is needed") from None
    if strange := sorted(found.keys() - {"name", "path", "base_model_name"}):
        raise InputError(f"--lora-modules: there is no field {strange[0]!r:.80}: they are name and path")
    name, path = found.get("name"), found.get("path")
    if not isinstance(name, str) or not isinstance(path, str):
        raise InputError(f"--lora-modules has {text!r:.200}: name and path are needed, as texts")
    return name, path
