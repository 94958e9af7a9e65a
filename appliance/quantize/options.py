"""What `appliance quantize` is asked for, checked before anything is read or written."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch

from quant.algorithms.grid import Grid
from quant.errors import InputError
from quant.publish import FORMATS, grid_for

METHODS = ("awq", "gptq", "rtn")


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a model is quantized. ``symmetric`` None: as is usual for the method (GPTQ yes, AWQ and rtn no)."""

    method: str = "awq"
    bits: int = 4
    group_size: int = 128
    symmetric: bool | None = None
    act_order: bool = False
    format: str | None = None  # None: awq for AWQ and rtn in 4 bits, gptq for GPTQ, else compressed-tensors
    samples: int = 128
    length: int = 512  # tokens of each
    damping: float = 0.01
    clip: bool = True
    kv_scales: bool = False
    seed: int = 0

    def checked(self) -> Options:
        """The same with nothing left open. Raises InputError naming the flag."""
        if self.method not in METHODS:
            raise InputError(f"--method is {self.method!r}: one of {', '.join(METHODS)} is needed")
        if self.act_order and self.method != "gptq":
            raise InputError(f"--act-order is GPTQ's: it does nothing with --method {self.method}")
        for flag, value, least in (("--calibration-samples", self.samples, 1), ("--calibration-length", self.length, 2)):
            if value < least:
                raise InputError(f"{flag} is {value}: at least {least} is needed")
        if not (math.isfinite(self.damping) and 0 < self.damping <= 1):
            raise InputError(
                f"--damping is {self.damping:g}: a share of the Hessian's diagonal, above 0 and at most 1, is needed"
            )
        symmetric = self.method == "gptq" if self.symmetric is None else self.symmetric
        form = self.format or self._usual()
        if form not in FORMATS:
            raise InputError(f"--format is {form!r}: one of {', '.join(FORMATS)} is needed")
        if self.act_order and form == "compressed-tensors":
            raise InputError("--act-order: compressed-tensors has given up groups in order of activation; take --format gptq")
        if form == "awq" and self.method == "gptq":
            raise InputError("--format awq cannot say what GPTQ makes in its order: take gptq or compressed-tensors")
        made = Options(**{**asdict(self), "symmetric": symmetric, "format": form})
        made.grid(torch.float16)
        return made

    def _usual(self) -> str:
        if self.method == "gptq":
            return "gptq"
        return "awq" if self.bits == 4 else "compressed-tensors"

    def grid(self, scale_dtype: torch.dtype) -> Grid:
        return grid_for(str(self.format), self.bits, self.group_size, bool(self.symmetric), scale_dtype)

    @property
    def calibrated(self) -> bool:
        """Whether it takes text."""
        return self.method != "rtn" or self.kv_scales

    def told(self) -> dict[str, Any]:
        """What config.json keeps of how it was made."""
        return {"appliance": {name: value for name, value in asdict(self).items() if name != "format"}}
