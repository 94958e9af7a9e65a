"""Where readers of checkpoints find the native code of the CPU's kernels: these are a layer above, and say so themselves."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

Provider = Callable[[], tuple[ModuleType, str] | None]

_provider: Provider = lambda: None


def provide(provider: Provider) -> None:
    """From now on ``provider`` is asked for the extension and the instruction set to use; None: torch computes all."""
    global _provider
    _provider = provider


def found() -> tuple[ModuleType, str] | None:
    """What the provider has now."""
    return _provider()
