"""LoRA adapters of an LLM: asked for with a prompt, loaded when they first are, and sent away for others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from appliance.core.params import RequestError
from appliance.runtime.adapters import Adapters
from quant.errors import InputError


@dataclass(frozen=True)
class LoRARequest:
    """An adapter by its name, in a directory as PEFT writes it; shaped as vLLM's, whose ``lora_int_id`` nobody needs here."""

    lora_name: str
    lora_int_id: int = 0
    lora_path: str | Path = ""  # not needed of one that the LLM was made with


def lora_list(given: Any, number: int) -> list[LoRARequest | None]:
    """One for each of ``number`` prompts, or None. Raises RequestError where they are too few, or something else."""
    many = list(given) if isinstance(given, Sequence) else [given] * number
    for one in many:
        if one is not None and not isinstance(one, LoRARequest):
            hint = "give LoRARequest(name, number, directory), or a list of them"
            raise RequestError(f"lora_request cannot be {one!r:.60} ({type(one).__name__}): {hint}", param="lora_request")
    if len(many) != number:
        words = f"{len(many)} lora_requests for {number} prompts: give one for all, or one for each"
        raise RequestError(words, param="lora_request")
    return many


class Loaded:
    """Those that an engine has, the least recently used first."""

    def __init__(self, adapters: Adapters, names: dict[str, Path], most: int) -> None:
        """``names``: those that it began with; ``most``: 0 where it has no memory for any."""
        self._adapters, self._paths, self._most = adapters, dict(names), most

    def bring(self, requests: Sequence[LoRARequest | None]) -> None:
        """Have all of these loaded at once. Raises InputError where that cannot be."""
        wanted: dict[str, Path] = {}
        for one in requests:
            if one is not None:
                path = Path(one.lora_path) if one.lora_path else self._paths.get(one.lora_name)
                if path is None:
                    raise InputError(f"LoRARequest {one.lora_name!r:.200} has no lora_path, and none of that name is loaded")
                if wanted.setdefault(one.lora_name, path) != path:
                    raise InputError(f"two LoRA adapters are called {one.lora_name!r:.200}: {wanted[one.lora_name]} and {path}")
        if wanted and not self._most:
            raise InputError("there is no memory for LoRA adapters: make the LLM with enable_lora=True")
        if len(wanted) > self._most:
            raise InputError(f"{len(wanted)} LoRA adapters are asked for at once, but max_loras is {self._most}")
        for name in [name for name, path in self._paths.items() if wanted.get(name, path) != path]:
            self._send_away(name)  # another one has its name now
        for name, path in wanted.items():
            if name not in self._paths:
                while len(self._paths) >= self._most:
                    self._send_away(next(old for old in self._paths if old not in wanted))
                self._adapters.load(name, path)
            self._paths[name] = self._paths.pop(name, path)

    def _send_away(self, name: str) -> None:
        self._adapters.unload(name)
        del self._paths[name]
