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
ENGINES = ("appliance", "autoawq")


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a model is quantized. ``symmetric`` None: as is usual for the method (GPTQ yes, AWQ and rtn no)."""

    method: str = "awq"
    bits: int = 4
    group_size: int = 128
    symmetric: bool | None = None
    act_order: bool = False
    static_groups: bool = True  # of ``act_order``
    lm_head_bits: int = 16  # 4, 8, or as it is
    embedding_bits: int = 16
    format: str | None = None  # None: awq for AWQ and rtn in 4 bits, gptq for GPTQ, else (and for embeddings) compressed-tensors
    samples: int = 128
    length: int = 512  # tokens of each
    damping: float = 0.01
    clip: bool = True
    kv_scales: bool = False
    seed: int = 0
    target_bits: float | None = None  # mean of all linears' weights, scales included; instead of ``bits``
    fit: str | None = None  # or as many as this card has room for: a name, a size, cpu or cuda for this machine's
    context: str | None = None  # beside so many tokens, None: 8192 or the model's longest
    sequences: int = 1  # of each of so many sequences
    kv_cache_dtype: str = "auto"
    engine: str = "appliance"  # whose code quantizes

    def checked(self) -> Options:
        """The same with nothing left open. Raises InputError naming the flag."""
        if self.engine not in ENGINES:
            raise InputError(f"--engine is {self.engine!r}: one of {', '.join(ENGINES)} is needed")
        if self.engine == "autoawq":
            from appliance.quantize.autoawq import check_options

            check_options(self)
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
        self._check_mixed()
        symmetric = self.method == "gptq" if self.symmetric is None else self.symmetric
        form = self.format or self._usual()
        if form not in FORMATS:
            raise InputError(f"--format is {form!r}: one of {', '.join(FORMATS)} is needed")
        self._check_order(form)
        self._check_ends(form)
        if form == "awq" and self.method == "gptq":
            raise InputError("--format awq cannot say what GPTQ makes in its order: take gptq or compressed-tensors")
        made = Options(**{**asdict(self), "symmetric": symmetric, "format": form})
        made.grid(torch.float16)
        return made

    def _check_mixed(self) -> None:
        if self.target_bits is not None and self.fit is not None:
            raise InputError("--target-bits and --fit both say how many bits there are to spend: leave out one of the two")
        if self.mixed and self.bits != Options.bits:
            raise InputError(f"--bits {self.bits} is one width for all; leave it out where --target-bits or --fit chooses")
        if self.target_bits is not None and not math.isfinite(self.target_bits):
            raise InputError(f"--target-bits is {self.target_bits}: a number of bits, as 4.5, is needed")
        for flag, given in (
            ("--context", self.context is not None),
            ("--sequences", self.sequences != Options.sequences),
            ("--kv-cache-dtype", self.kv_cache_dtype != Options.kv_cache_dtype),
        ):
            if given and self.fit is None:
                raise InputError(f"{flag} says what has to fit beside the weights: it needs --fit CARD")

    def _check_order(self, form: str) -> None:
        if self.static_groups:
            return
        if not self.act_order:
            raise InputError("--no-static-groups says how groups are made with --act-order: it needs that")
        if form == "compressed-tensors":
            raise InputError(
                "--no-static-groups: compressed-tensors has given up groups in order of activation; take --format gptq"
            )

    def _check_ends(self, form: str) -> None:
        for flag, bits in (("--lm-head-bits", self.lm_head_bits), ("--embedding-bits", self.embedding_bits)):
            if bits not in (4, 8, 16):
                raise InputError(f"{flag} is {bits}: 4, 8, or 16 (which is as it was) is needed")
        if form == "awq" and self.lm_head_bits != 16:
            raise InputError("--lm-head-bits: AutoAWQ reads no quantized head; take --format compressed-tensors, or gptq")
        if form != "compressed-tensors" and self.embedding_bits != 16:
            raise InputError(
                f"--embedding-bits: who reads the format {form} knows no quantized embedding; take --format compressed-tensors"
            )

    @property
    def static(self) -> bool:
        """Whether columns are taken in order of activation, and their groups are of neighbours all the same."""
        return self.act_order and self.static_groups

    @property
    def mixed(self) -> bool:
        """Whether bits are chosen by what they are worth."""
        return self.target_bits is not None or self.fit is not None

    def _usual(self) -> str:
        if self.method == "gptq":
            return "gptq" if self.embedding_bits == 16 else "compressed-tensors"
        simple = self.bits == 4 and not self.mixed and self.lm_head_bits == self.embedding_bits == 16
        return "awq" if simple else "compressed-tensors"

    def grid(self, scale_dtype: torch.dtype) -> Grid:
        return grid_for(str(self.format), self.bits, self.group_size, bool(self.symmetric), scale_dtype)

    @property
    def calibrated(self) -> bool:
        """Whether it takes text."""
        return self.method != "rtn" or self.kv_scales or self.mixed

    def told(self) -> dict[str, Any]:
        """What config.json keeps of how it was made."""
        return {"appliance": {name: value for name, value in asdict(self).items() if name != "format" and value is not None}}
