"""Which CPU kernels run: the native extension for the best instruction set of this processor, or torch's own. No torch here.

Environment: APPLIANCE_CPU_ISA forces an instruction set (or "torch"); APPLIANCE_NATIVE names an extension file to use instead of
the installed one (for sanitizer builds).
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from functools import cache
from types import ModuleType

from quant import extension
from quant.errors import InputError

TORCH = "torch"


@cache
def native() -> ModuleType | None:
    """The extension, or None where it was not built."""
    path = os.environ.get("APPLIANCE_NATIVE")
    if path is None:
        try:
            return importlib.import_module("kernels.cpu._native")
        except ModuleNotFoundError:
            return None
    spec = importlib.util.spec_from_file_location("_native", path)
    if spec is None or spec.loader is None or not os.path.exists(path):
        raise InputError(f"APPLIANCE_NATIVE names {path}, which is not an extension file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def available() -> tuple[str, ...]:
    """What can run here, best first; "torch" always can."""
    module = native()
    return (*(module.available() if module is not None else ()), TORCH)


def name() -> str:
    """What runs: "torch", or an instruction set. InputError where APPLIANCE_CPU_ISA asks for what cannot run."""
    wanted, found = os.environ.get("APPLIANCE_CPU_ISA", "auto").lower(), available()
    if wanted in ("", "auto"):
        return found[0]
    if wanted not in found:
        missing = "" if native() is not None else " (the native extension is not built: install a C++ compiler and reinstall)"
        raise InputError(f"APPLIANCE_CPU_ISA is {wanted!r}, but this processor runs {', '.join(found)}{missing}")
    return wanted


def _extension() -> tuple[ModuleType, str] | None:
    module, chosen = native(), name()
    return None if module is None or chosen == TORCH else (module, chosen)


extension.provide(_extension)
