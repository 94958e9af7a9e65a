"""Models whose layers keep a state of each sequence in place of keys and values: which options they cannot have. No torch.

A state is what all tokens so far have left. It has one size, lies at the sequence's seat, and there is no way back to an earlier
one: so guesses cannot be taken back, who gives way starts over, and of other requests' prefixes only that is of use whose states
were kept (appliance.core.kept).
"""

from __future__ import annotations

from appliance.config import EngineConfig
from appliance.memory.settings import Settings
from models.spec import ModelSpec
from quant.errors import InputError


def check_states(spec: ModelSpec, config: EngineConfig, settings: Settings, ranks: int = 1) -> None:
    """InputError naming the option that such a model cannot have."""
    if not any(spec.linear):
        return
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
