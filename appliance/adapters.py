"""What the options say of LoRA adapters. No torch."""

from __future__ import annotations

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


def spec_of(published: Mapping[str, Any], config: EngineConfig) -> ModelSpec:
    """What config.json says, with the adapters that the options say. Raises InputError for either."""
    spec, limits = ModelSpec.from_config(published), adapter_limits(config)
    if limits is not None:
        check_adaptable(spec)
    return replace(spec, adapters=limits)


def adapter_limits(config: EngineConfig) -> AdapterLimits | None:
    """None where there are to be none. Raises InputError, naming the option, or what is wrong with an adapter."""
    given = {"--max-loras": config.max_loras, "--max-lora-rank": config.max_lora_rank}
    for flag, value in given.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise InputError(f"{flag} is {value!r:.60}: a whole number of at least 1 is needed")
    named = read_names(config.lora_modules)
    if not (config.enable_lora or named or any(given.values())):
        return None
    ranks = {path: AdapterConfig.read(path).largest for path in named.values()}
    rank = config.max_lora_rank or max([LEAST_RANK, *ranks.values()])
    for path, found in ranks.items():
        if found > rank:
            raise InputError(f"{path} has rank {found}, but --max-lora-rank is {rank}: give at least {found}, or leave it out")
    count = config.max_loras or max(1, len(named))
    if count < len(named):
        raise InputError(f"--lora-modules names {len(named)} adapters, but --max-loras is {count}: give at least {len(named)}")
    return AdapterLimits(count, rank)


def read_names(modules: Sequence[str]) -> dict[str, Path]:
    """--lora-modules: names and directories."""
    found: dict[str, Path] = {}
    for one in modules:
        name, equals, path = str(one).partition("=")
        if not (name and equals and path):
            raise InputError(f"--lora-modules has {one!r:.200}: NAME=DIRECTORY is needed")
        if name in found:
            raise InputError(f"--lora-modules names {name!r:.200} twice")
        found[name] = Path(path)
    return found
