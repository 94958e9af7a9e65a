"""Models whose layers keep a state of each sequence in place of keys and values: which options they cannot have. No torch.

A state is what all tokens so far have left. It has one size, lies at the sequence's seat, and there is no way back to an earlier
one: so nothing is found of other requests' prefixes, guesses cannot be taken back, and who gives way starts over.
"""

from __future__ import annotations

from dataclasses import replace

from appliance.config import EngineConfig
from appliance.memory.settings import Settings
from models.spec import ModelSpec
from quant.errors import InputError


def with_states(settings: Settings, spec: ModelSpec, config: EngineConfig, ranks: int = 1) -> Settings:
    """The settings as they are for such a model. InputError naming the option that it cannot have."""
    if not any(spec.linear):
        return settings
    kind = f"{spec.architecture}, whose layers keep a state of each sequence"
    if ranks > 1:
        raise InputError(f"{config.model}: {kind}, is not divided among cards: plan it for one")
    if settings.swap_bytes:
        raise InputError(
            f"--swap-space is {config.swap_space}, but nothing of {kind}, is moved to host memory (what gives way is computed "
            "again): leave it out"
        )
    if config.speculative_config is not None:
        raise InputError(f"--speculative-config does not work with {kind}: a wrong guess could not be taken back; leave it out")
    return replace(settings, prefixes=False)
