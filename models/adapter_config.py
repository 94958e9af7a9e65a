"""adapter_config.json of a LoRA adapter as PEFT writes it, refused by name where it asks for something else. No torch."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quant.errors import InputError
from quant.headers import read_json

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
CHANGES_BASE = ("pissa", "olora", "corda", "loftq")
"""Ways to begin that take something away from the model's own weights: such an adapter is right on those weights alone."""
REFUSED = {  # what is something else where it is set, in words
    "use_dora": "DoRA, which scales the model's own weights",
    "use_qalora": "QA-LoRA",
    "lora_bias": "biases of its own",
    "fan_in_fan_out": "weights that lie the other way round",
    "modules_to_save": "whole modules of its own",
    "trainable_token_indices": "embeddings of its own",
    "target_parameters": "parameters that are no linear modules",
    "alora_invocation_tokens": "activated LoRA, which begins in the middle of a prompt",
    "arrow_config": "Arrow, which mixes adapters",
    "use_bdlora": "block-diagonal LoRA",
}


@dataclass(frozen=True)
class AdapterLimits:
    """What memory is set aside for."""

    count: int  # adapters that are loaded at a time
    rank: int  # of each, at most


@dataclass(frozen=True)
class AdapterConfig:
    """How an adapter's matrices are to be used."""

    rank: int
    alpha: float
    by_root: bool  # rank-stabilized: alpha is divided by the root of the rank
    ranks: Mapping[str, int]  # of modules whose names end so, as regular expressions
    alphas: Mapping[str, float]
    base: str  # the name of the model that it was made for

    @classmethod
    def read(cls, directory: Path) -> AdapterConfig:
        """Raises InputError, naming the file and what is wrong."""
        path = directory / CONFIG
        if not path.is_file():
            raise InputError(f"{directory} has no {CONFIG}: a directory with a LoRA adapter, as PEFT writes it, is needed")
        found = read_json(path)
        if (kind := found.get("peft_type")) != "LORA":
            raise InputError(f"{path}: peft_type is {kind!r:.60}, but LORA alone is supported")
        for name, words in REFUSED.items():
            if found.get(name):
                raise InputError(f"{path}: {name} is set ({words}), which is not supported: merge the adapter into the model")
        if (bias := found.get("bias", "none")) != "none":
            raise InputError(f"{path}: bias is {bias!r:.60}, but adapters without biases alone are supported")
        begun = found.get("init_lora_weights")
        if isinstance(begun, str) and begun.lower().startswith(CHANGES_BASE):
            raise InputError(
                f"{path}: init_lora_weights is {begun!r:.60}, which changes the model's own weights: "
                "convert the adapter to plain LoRA (PEFT's path_initial_model_for_weight_conversion)"
            )
        return cls(
            rank=_rank(path, "r", found.get("r")),
            alpha=_number(path, "lora_alpha", found.get("lora_alpha")),
            by_root=bool(found.get("use_rslora")),
            ranks={key: _rank(path, f"rank_pattern[{key!r}]", value) for key, value in _table(path, found, "rank_pattern")},
            alphas={key: _number(path, f"alpha_pattern[{key!r}]", value) for key, value in _table(path, found, "alpha_pattern")},
            base=str(found.get("base_model_name_or_path") or ""),
        )

    @property
    def largest(self) -> int:
        """Rank."""
        return max(self.rank, *self.ranks.values()) if self.ranks else self.rank

    def scale(self, module: str, rank: int) -> float:
        """What the product of both matrices of a module is multiplied by, where these have so large a rank.

        PEFT divides alpha by the rank that the configuration says, or by its root (Kalajdzievski 2023).
        """
        stated = _of(self.ranks, module, self.rank)
        if stated != rank:
            raise InputError(f"{module}: the adapter's matrices have rank {rank}, but {CONFIG} says {stated}")
        alpha = _of(self.alphas, module, self.alpha)
        return alpha / (math.sqrt(rank) if self.by_root else rank)


def _of(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """Of the first key that the module's name is, or ends with behind a point, as PEFT looks it up."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), default)


def _table(path: Path, found: Mapping[str, Any], name: str) -> list[tuple[str, Any]]:
    table = found.get(name) or {}
    if not isinstance(table, dict):
        raise InputError(f"{path}: {name} is {table!r:.60}: an object is needed")
    for key in table:
        try:
            re.compile(key)
        except re.error as error:
            raise InputError(f"{path}: {name} has {key!r:.60}, which is no regular expression: {error}") from None
    return list(table.items())


def _rank(path: Path, name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError(f"{path}: {name} is {value!r:.60}: a whole number of at least 1 is needed")
    return value


def _number(path: Path, name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise InputError(f"{path}: {name} is {value!r:.60}: a number is needed")
    return float(value)
