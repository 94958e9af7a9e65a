"""The LoRA adapters of an engine: loaded under names, kept until the last request that has one has ended."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

from appliance.core.params import RequestError
from appliance.core.request import Adapter, Request
from appliance.runtime.runner import Runner
from models.adapters import load_adapter
from quant.errors import InputError

log = logging.getLogger("appliance.engine")


class Adapters:
    """No more than there is memory for, which was set aside."""

    def __init__(self, runner: Runner, requests: Callable[[], Iterable[Request]]) -> None:
        """``requests``: all that may have some."""
        self._runner, self._requests = runner, requests
        self._named: dict[str, Adapter] = {}
        self._loaded = 0  # since the beginning

    def __bool__(self) -> bool:
        """Whether requests may have some."""
        return bool(self._loaded)

    def find(self, name: str) -> Adapter | None:
        """That of a request. Raises RequestError where there is none of that name."""
        if not name:
            return None
        if name not in self._named:
            raise RequestError(f"there is no LoRA adapter {name!r:.200}", param="model", code="model_not_found", status=404)
        return self._named[name]

    def load(self, name: str, path: str | Path, *, replace: bool = False) -> None:
        """From a directory, for requests that name it. Raises InputError, naming what is wrong.

        ``replace``: in the place of the one that has that name, which stays if this one is refused, and to the end of requests.
        """
        decoder = self._runner.decoder
        limits = decoder.spec.adapters
        if limits is None:
            raise InputError("there is no memory for LoRA adapters: start with --enable-lora")
        before = self._named.get(name)
        if not name or (before is not None and not replace):
            raise InputError(f"a LoRA adapter needs a name that no other has: {name!r:.200} is {'taken' if name else 'none'}")
        self._sweep()
        held = self._runner.adapters
        if len(held) - (before is not None and before not in self._used()) >= limits.count:
            leaving = len(held) - len(self._named)
            still = f", {leaving} of them unloaded, but still in use" if leaving else ""
            still += f", {name} is in use" if before is not None else ""
            raise InputError(f"{len(held)} LoRA adapters are loaded{still}, and --max-loras is {limits.count}")
        weights = load_adapter(
            Path(path),
            decoder.spec,
            decoder.ops,
            dtype=decoder.dtype,
            max_rank=limits.rank,
            begin=(lambda: None) if before is None else partial(self.unload, name),
        )
        self._loaded += 1
        self._named[name] = adapter = Adapter(name, self._loaded)
        held[adapter] = weights
        log.info("loaded LoRA adapter %s from %s", name, path)

    def unload(self, name: str) -> None:
        """No more requests can have it; those that do go on to their end. Raises InputError where there is none."""
        if name not in self._named:
            raise InputError(f"there is no LoRA adapter {name!r:.200}")
        del self._named[name]
        self._sweep()
        log.info("unloaded LoRA adapter %s", name)

    def _used(self) -> set[Adapter | None]:
        return {request.adapter for request in self._requests()}

    def _sweep(self) -> None:
        kept = {*self._named.values(), *self._used()}
        for adapter in [one for one in self._runner.adapters if one not in kept]:
            del self._runner.adapters[adapter]


def names_of(requests: Iterable[Request]) -> tuple[str, ...]:
    """Of the adapters that they have."""
    return tuple(sorted({request.adapter.name for request in requests if request.adapter is not None}))
