"""Where the memory of a checkpoint will go, before anything is loaded."""

from __future__ import annotations

from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from shlex import quote

from appliance.adapters import spec_of
from appliance.config import EngineConfig
from appliance.memory.advice import advise
from appliance.memory.agreement import check_headers
from appliance.memory.demand import LOGIT_ROWS, Demand
from appliance.memory.devices import DeviceInfo, this_device
from appliance.memory.fit import fit
from appliance.memory.learned import code_words, model_words, recall, recall_layer
from appliance.memory.modules import Machinery
from appliance.memory.options import Variants
from appliance.memory.plan import KVSpec, MemoryPlan, PlanError, Remedy, flag_text
from appliance.memory.proofs import device_kind
from appliance.memory.settings import Settings
from appliance.memory.states import check_states
from kernels import layout
from models.spec import ModelSpec
from quant.headers import CheckpointIndex
from quant.rules import WeightScheme
from quant.scheme import QuantScheme, read_scheme

__all__ = ["LOGIT_ROWS", "DeviceInfo", "KVSpec", "MemoryPlan", "PlanError", "Remedy", "command_line", "make_plan", "this_device"]

AWQ = QuantScheme("awq", default=WeightScheme("awq-gemm", bits=4, group_size=128, symmetric=False))
"""What most smaller versions of a model on the hub are."""


def make_plan(directory: Path, config: EngineConfig, device: DeviceInfo | None = None) -> MemoryPlan:
    """Plan the memory of a checkpoint on a device (default: this machine's, as --device says).

    The memory beside a card's is looked at where the card is this machine's, which is so where none was given.

    Reads config.json, quantize_config.json and the safetensors headers. Raises InputError for bad input, and PlanError, with
    remedies that would fit, where the model or its context does not.
    """
    host = None
    if device is None:
        device = this_device(device_kind(config.device))
        host = None if device.kind == "cpu" else this_device("cpu")
    settings = read_settings(config, device)
    index = CheckpointIndex.open(Path(directory))
    published, scheme = read_scheme(index, config.quantization)
    spec = spec_of(published, config)
    check_headers(index, spec, scheme)
    machinery = Machinery.choose(config, spec.dtype, device, float16=spec.float16)
    check_states(spec, config, settings)
    demand = Demand.of(spec, scheme, machinery, model=str(directory))
    settings = taught(settings, demand, device, machinery.ops)
    try:
        return fit(demand, settings, device, host)
    except PlanError as error:
        told = advise(error, demand, settings, device, variants(demand, spec, scheme, machinery), host)
        if device.kind == "cuda" and config.device == "auto":
            told = PlanError(f"{told}. --device cpu leaves the card alone", told.remedies)
        raise told from None


def read_settings(config: EngineConfig, device: DeviceInfo) -> Settings:
    """The options in plain numbers, with what earlier starts of any model on this device have taught."""
    ops = layout.ops_name(device.kind, reference=config.reference_ops)
    return replace(Settings.from_config(config, device), runtime=recall(device, ops))


def taught(settings: Settings, demand: Demand, device: DeviceInfo, ops: str) -> Settings:
    """With what such a model's code, and its recorded steps, have taken of this device."""
    settings = replace(settings, runtime=recall(device, ops, code_words(demand.quantization, demand.dtype)))
    if not settings.graphs:
        return settings
    words = model_words(demand.architecture, demand.quantization, demand.dtype, demand.layers)
    return replace(settings, layer_bytes=recall_layer(device, layout.ops_name(device.kind, reference=False), words))


def variants(demand: Demand, spec: ModelSpec, scheme: QuantScheme, machinery: Machinery) -> Variants:
    """What else it could be: head and embedding in int8, fewer threads, and weights in 4 bits, where that is smaller."""
    small = Demand.of(spec, AWQ, machinery, model=demand.model)
    weights, less = (sum(one.weights.values()) for one in (demand, small))
    words, quantized = "another checkpoint: this model in 4 bits (AWQ, groups of 128)", less < 0.9 * weights

    @cache
    def made(quantization: str | None = None, **other: int) -> Demand:
        changed = replace(machinery, **other)  # type: ignore[arg-type]
        return Demand.of(spec, scheme.as_stated(quantization), changed, model=demand.model)

    tables: list[tuple[dict[str, int], dict[str, str]]] = []
    for field, option in (("head_bits", "lm_head_dtype"), ("embedding_bits", "embedding_dtype")):
        bits, options = tables[-1] if tables else ({}, {})
        if (size := sum(made(**bits, **{field: 8}).weights.values())) < weights:
            weights = size
            tables.append(({**bits, field: 8}, {**options, option: "int8"}))
    threads = range(machinery.threads - 1, 0, -1) if made(threads=1).slab < demand.slab else range(0)
    online = [name for name in ("int8", "int4") if scheme.method == "none" and sum(made(name).weights.values()) < 0.9 * weights]
    return Variants(tables=tables, online=online, threads=threads, made=made, quantized={words: small} if quantized else {})


def command_line(config: EngineConfig, remedy: Remedy | None = None, command: str = "serve") -> str:
    """The whole command that has the options of ``config``, and those of a remedy in place of its own."""
    options = {f.name: getattr(config, f.name) for f in fields(config) if getattr(config, f.name) != f.default}
    model = options.pop("model", None)
    options |= remedy.options if remedy is not None else {}
    words = ["appliance", command, *([quote(str(model))] if model else [])]
    return " ".join([*words, *(flag_text(*option) for option in options.items())])
