"""``MODEL@option=value,option=value``: a model with load-time options of its own, beside others or beside itself."""

from __future__ import annotations

import os
import types
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from appliance.config import EngineConfig
from appliance.hub import resolve
from quant.errors import InputError

OURS = ("model", "max_model_len", "max_num_seqs", "enable_prefix_caching", "skip_tokenizer_init")
"""Options that follow from what is measured."""
OPTIONS = tuple(f.name for f in fields(EngineConfig) if f.name not in OURS)


@dataclass(frozen=True)
class Variant:
    """What is measured: a row of the table."""

    text: str  # as it was given
    name: str  # the model without its options
    options: dict[str, Any]
    config: EngineConfig  # once located, with its directory as the model, and where its tokenizer is

    @property
    def label(self) -> str:
        """The last part of the model's name, and the options."""
        tail = self.text.removeprefix(self.name)
        return (Path(self.name).name or self.name) + tail

    def located(self) -> Variant:
        """The same where its files are: those of a model on the hub are fetched. Raises InputError."""
        directory = str(resolve(self.name, self.config.revision))
        return replace(self, config=replace(self.config, model=directory, tokenizer=self.config.tokenizer or directory))


def read_variant(text: str, config: EngineConfig) -> Variant:
    """``config`` holds what is the same for all. Raises InputError for an option or a value that there is not."""
    name, options = _split(text)
    return Variant(text, name, options, replace(config, **options))


def labels(variants: Sequence[Variant]) -> list[str]:
    """Short, and each only once: those that would be the same are as they were given."""
    short = [one.label for one in variants]
    return [one.text if short.count(label) > 1 else label for one, label in zip(variants, short, strict=True)]


def _split(text: str) -> tuple[str, dict[str, Any]]:
    """An @ that no option follows belongs to the name, as one in the name of a directory does."""
    name, at, tail = text.rpartition("@")
    if not at or "=" not in tail or os.path.isdir(text):
        return text, {}
    options = {}
    for part in tail.split(","):
        key, equals, value = part.partition("=")
        option = key.strip().lstrip("-").replace("-", "_")
        if not equals or option not in OPTIONS:
            raise InputError(
                f"{text}: {key.strip()!r} is no option that a model can have for itself, as in {name}@lm_head_dtype=int4; "
                f"there are {', '.join(OPTIONS)}"
            )
        if option in options:
            raise InputError(f"{text}: {option} stands there twice")
        options[option] = _value(text, option, value.strip())
    return name, options


def _value(text: str, option: str, value: str) -> Any:
    """As the option's type says."""
    hint = get_type_hints(EngineConfig)[option]
    kinds = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    if bool in kinds and value.lower() in ("true", "false"):
        return value.lower() == "true"
    for kind in (int, float):
        if kind in kinds:
            try:
                return kind(value)
            except ValueError:
                pass
    if str in kinds:
        return value
    wanted = "true or false" if bool in kinds else "a number"
    raise InputError(f"{text}: {option} is {value!r}: {wanted} is needed")
