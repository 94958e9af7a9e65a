"""Kernels run on the card where there is one, and in Triton's interpreter, on CPU tensors, where there is none.

APPLIANCE_EMULATE=80 in the environment: they are compiled for that architecture instead, and tests/emulator runs their PTX.
"""

from __future__ import annotations

import os

import torch

torch.testing._comparison._HAS_DTENSOR = False  # type: ignore[attr-defined]  # a second, to import what no tensor here is
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EMULATED = int(os.environ.get("APPLIANCE_EMULATE", "0"))
if EMULATED:
    from tests.emulator import driver

    driver.install(EMULATED)
elif DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined: before kernels.triton is imported
INTERPRETED = DEVICE == "cpu" and not EMULATED
if INTERPRETED:
    from tests.kernels.triton import interpreter

    interpreter.hasten()
