"""Where the memory of a checkpoint will go, before anything is loaded."""

from __future__ import annotations

from pathlib import Path

from appliance.config import EngineConfig
from appliance.memory.advice import advise
from appliance.memory.demand import LOGIT_ROWS, Demand
from appliance.memory.devices import DeviceInfo, this_device
from appliance.memory.plan import KVSpec, MemoryPlan, PlanError, fit
from appliance.memory.settings import Settings

__all__ = ["LOGIT_ROWS", "DeviceInfo", "KVSpec", "MemoryPlan", "PlanError", "make_plan", "this_device"]


def make_plan(directory: Path, config: EngineConfig, device: DeviceInfo | None = None) -> MemoryPlan:
    """Plan the memory of a checkpoint on a device (default: this machine's; "auto" is the CPU, which this version runs on).

    Reads config.json, quantize_config.json and the safetensors headers. Raises InputError for bad input, and PlanError, with
    flags that would fit, where the model or its context does not.
    """
    if device is None:
        device = this_device("cpu" if config.device == "auto" else config.device)
    settings = Settings.from_config(config, device)
    demand = Demand.read(Path(directory), config, device)
    try:
        return fit(demand, settings, device)
    except PlanError as error:
        raise advise(error, demand, settings, device) from None
