"""Options that can be refused before a model is there: nobody shall wait for a download to hear of a typing error. No torch."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import fields

from appliance.adapters import check_adapters
from appliance.config import EngineConfig
from appliance.core.drafts import Drafts
from appliance.memory.devices import DeviceInfo, this_device
from appliance.memory.giving_way import MODES
from appliance.memory.modules import Machinery
from appliance.memory.proofs import device_kind
from appliance.memory.settings import Settings
from appliance.memory.sizes import parse_gib
from quant.errors import InputError
from quant.scheme import ALIASES, QuantScheme

POLICIES = ("fcfs", "priority")
RUNNERS = ("auto", "generate", "pooling")

# What a field of EngineConfig holds, by its annotation. Numbers with a range, and sizes, are told where the range is.
KINDS: dict[str, tuple[tuple[type, ...], str]] = {
    "bool": ((bool,), "True or False"),
    "int": ((int,), "a whole number"),
    "int | None": ((int, type(None)), "a whole number, or None,"),
    "str": ((Hashable,), "text"),  # a name from a list: what is not on it is told with the list, but looked for by its hash
    "str | None": ((str, type(None)), "text, or None,"),
    "tuple[str, ...]": ((tuple, list), "a list of texts"),
}


def check_options(config: EngineConfig, device: DeviceInfo | None = None) -> None:
    """Raises InputError for an option that would do for no model on this device (default: this machine's, as --device says)."""
    check_kinds(config)
    if device is None:
        device = this_device(device_kind(config.device))
    Settings.from_config(config, device)
    Machinery.choose(config, "bfloat16", device)
    if config.quantization is not None:  # held against a checkpoint that is what was stated
        QuantScheme(ALIASES.get(config.quantization.lower(), "none")).as_stated(config.quantization)
    check_order(config)
    if config.runner not in RUNNERS:
        raise InputError(f"--runner is {config.runner!r}: one of {', '.join(RUNNERS)} is needed")
    check_adapters(config)
    Drafts.of(config.speculative_config, device.kind)


def check_kinds(config: EngineConfig) -> None:
    """Raises InputError for a value of another kind, which nothing but Python lets through: "no" would count as true."""
    for field in fields(config):
        kinds, needed = KINDS.get(str(field.type), ((object,), ""))
        value = getattr(config, field.name)
        if not isinstance(value, kinds) or (isinstance(value, bool) and int in kinds):
            raise InputError(f"--{field.name.replace('_', '-')} is {value!r:.80}: {needed} is needed")


def check_order(config: EngineConfig) -> None:
    """Raises InputError for a scheduling policy or a preemption mode that does not exist, or has nowhere to swap to."""
    if config.scheduling_policy not in POLICIES:
        raise InputError(f"--scheduling-policy is {config.scheduling_policy!r}: {' or '.join(POLICIES)} is needed")
    if config.preemption_mode not in MODES:
        raise InputError(f"--preemption-mode is {config.preemption_mode!r}: one of {', '.join(MODES)} is needed")
    if config.preemption_mode == "swap" and not parse_gib("--swap-space", config.swap_space):
        raise InputError(
            "--preemption-mode is swap, but --swap-space is 0: give that some GiB, as in --swap-space 4, or leave the mode out"
        )
