"""Models whose layers keep a state of each sequence in place of keys and values: which options they cannot have. No torch.

A state is what all tokens so far have left. It has one size, lies at the sequence's seat, and there is no way back to an earlier
one: so nothing is found of other requests' prefixes, guesses cannot be taken back, and who gives way starts over.
"""

from __future__ import annotations

from dataclasses import replace

from appliance.config import EngineConfig
from appliance.memory.modules import Machinery
from appliance.memory.settings import Settings
from kernels.layout import DELTA_OPS
from models.spec import ModelSpec
from quant.errors import InputError


def with_states(settings: Settings, spec: ModelSpec, config: EngineConfig, machinery: Machinery) -> Settings:
    """The settings as they are for such a model. InputError naming the option, or the device, that it cannot have."""
    if not any(spec.linear):
        return settings
    kind = f"{spec.architecture}, whose layers keep a state of each sequence"
    if machinery.ops not in DELTA_OPS:
        raise InputError(f"{config.model}: cards have no kernel for {kind} (the gated delta rule): --device cpu serves it")
    if settings.swap_bytes:
        raise InputError(
            f"--swap-space is {config.swap_space}, but nothing of {kind}, is moved to host memory (what gives way is computed "
            "again): leave it out"
        )
    if config.speculative_config is not None:
        raise InputError(f"--speculative-config does not work with {kind}: a wrong guess could not be taken back; leave it out")
    return replace(settings, prefixes=False)
