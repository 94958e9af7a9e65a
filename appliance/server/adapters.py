"""The LoRA adapters of a model: which there are, and that they outlive the engines which have them loaded."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from appliance.adapters import read_names
from appliance.config import EngineConfig
from appliance.core.params import RequestError

if TYPE_CHECKING:
    from appliance.server.state import EngineClient

log = logging.getLogger("appliance.server")


class Adapters:
    """``paths``: name -> directory, of all that requests can ask for. ``taken``: whether its engines take any."""

    def __init__(self, engine: EngineConfig) -> None:
        self.paths = {name: str(path) for name, path in read_names(engine.lora_modules).items()}
        self.taken = engine.enable_lora

    async def bring_back(self, client: EngineClient, loaded: Sequence[str]) -> None:
        """Have all of them in an engine that has started with those ``loaded``. What cannot be had any more is left out.

        Raises EngineDied.
        """
        for name, path in list(self.paths.items()):
            if name not in loaded:
                try:
                    await client.load_adapter(name, path)
                except RequestError as error:
                    log.error("the adapter %s cannot be loaded again, and is left out: %s", name, error)
                    self.paths.pop(name, None)
