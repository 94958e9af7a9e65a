"""What `appliance quantize` is asked for, checked before anything is read or written."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from quant.errors import InputError

if TYPE_CHECKING:  # the command line reads this file, and has no use for torch
    import torch

    from quant.algorithms.grid import Grid

METHODS = ("awq", "gptq", "rtn")
ENGINES = ("appliance", "autoawq")


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a model is quantized. The command line is made from this."""

    method: str = "awq"
    """awq, gptq, or rtn (round to nearest: no calibration, and the largest loss)."""
    bits: int = 4
    """4 (awq); 2, 3, 4 or 8 (gptq and compressed-tensors)."""
    group_size: int = 128
    """Inputs that share a scale; -1: a scale for each output."""
    sym: bool | None = None
    """Symmetric around zero, without zero points. Default: in all formats but awq, as vLLM (of gptq) and transformers (of
    compressed-tensors) load nothing else."""
    act_order: bool = False
    """With gptq: the columns that matter most are rounded first. A little better, and as fast to compute with."""
    static_groups: bool = True
    """With act-order: groups are of neighbours all the same (actorder "static"). Without, they are of columns that follow one
    another in that order (desc_act): slower to compute with, and vLLM refuses such checkpoints."""
    lm_head_bits: int = 16
    """Of the output head: 4 (by the method, as the layers), 8 (rounded), or 16: as it is. Not in the format awq."""
    embedding_bits: int = 16
    """Of the embedding: 4 or 8 (rounded), or 16: as it is. In the format compressed-tensors alone. Where head and embedding are
    one table (a tied model) and either is quantized, the checkpoint gets two: other programs read no table of codes as both. Here
    such a table needs none of this: serve --lm-head-dtype keeps one in codes."""
    format: str | None = None
    """awq, gptq, gptq_v2 or compressed-tensors. Default: the method's own, where it can say what is asked for. With gptq and
    --no-sym that is gptq_v2, since GPTQModel refuses zero points in a version 1 that it did not make."""
    calibration_samples: int = 128
    """Pieces of the calibration's text."""
    calibration_length: int = 512
    """Tokens of each."""
    damping: float = 0.01
    """With gptq: what is added to the Hessian's diagonal, as a share of its mean."""
    clip: bool = True
    """With awq: whether extremes are cut off where that is better."""
    kv_scales: bool = False
    """Add scales of keys and values for a KV cache in FP8."""
    seed: int = 0
    """Of the choice of samples."""
    target_bits: float | None = None
    """Mixed precision: more bits where they help most, so many for a weight in the mean over all linears of the decoder layers,
    with scales and zero points (what others call bits per weight). Instead of BITS: 4, 8 and 16 are used, less than 4 only where
    the target is below what 4 bits take, and smaller groups than GROUP_SIZE, down to 32, as a step between two widths."""
    fit: str | None = None
    """Mixed precision: as many bits as fit on this card ("RTX 4090"), in a memory of this size (24GB), or on this machine (cuda,
    cpu), by the planner, with its defaults. 4, 8 and 16 are used."""
    context: str | None = None
    """With fit: beside a KV cache for so many tokens (32k). Default: 8192, or the model's longest if that is less."""
    sequences: int = 1
    """With fit: so many sequences of that length at once."""
    kv_cache_dtype: str = "auto"
    """With fit: what keys and values will be stored as, see serve."""
    engine: str = "appliance"
    """Whose code quantizes: appliance, or autoawq: that package itself (pip install 'appliance[autoawq]'), for awq in 4 bits. It
    holds the whole model in memory, and begins anew where it was interrupted."""

    def checked(self) -> Options:
        """The same with nothing left open. Raises InputError naming the flag."""
        import torch

        from quant.publish import FORMATS

        if self.engine not in ENGINES:
            raise InputError(f"--engine is {self.engine!r}: one of {', '.join(ENGINES)} is needed")
        if self.engine == "autoawq":
            from appliance.quantize.autoawq import check_options

            check_options(self)
        if self.method not in METHODS:
            raise InputError(f"--method is {self.method!r}: one of {', '.join(METHODS)} is needed")
        if self.act_order and self.method != "gptq":
            raise InputError(f"--act-order is GPTQ's: it does nothing with --method {self.method}")
        for flag, value, least in (
            ("--calibration-samples", self.calibration_samples, 1),
            ("--calibration-length", self.calibration_length, 2),
        ):
            if value < least:
                raise InputError(f"{flag} is {value}: at least {least} is needed")
        if not (math.isfinite(self.damping) and 0 < self.damping <= 1):
            raise InputError(
                f"--damping is {self.damping:g}: a share of the Hessian's diagonal, above 0 and at most 1, is needed"
            )
        self._check_mixed()
        form = self.format or self._usual()
        sym = form != "awq" if self.sym is None else self.sym
        if form not in FORMATS:
            raise InputError(f"--format is {form!r}: one of {', '.join(FORMATS)} is needed")
        self._check_order(form)
        self._check_ends(form)
        if form == "awq" and self.method == "gptq":
            raise InputError("--format awq cannot say what GPTQ makes in its order: take gptq or compressed-tensors")
        made = Options(**{**asdict(self), "sym": sym, "format": form})
        made.grid(torch.float16)
        return made

    def _check_mixed(self) -> None:
        if self.target_bits is not None and self.fit is not None:
            raise InputError("--target-bits and --fit both say how many bits there are to spend: leave out one of the two")
        if self.mixed and self.bits != Options.bits:
            raise InputError(f"--bits {self.bits} is one width for all; leave it out where --target-bits or --fit chooses")
        if self.target_bits is not None and not math.isfinite(self.target_bits):
            raise InputError(f"--target-bits is {self.target_bits}: a number of bits, as 4.5, is needed")
        if self.target_bits is not None and not 2 <= self.target_bits < 16:
            raise InputError(f"--target-bits is {self.target_bits:g}: at least 2, with scales, and less than 16 are needed")
        for flag, given in (
            ("--context", self.context is not None),
            ("--sequences", self.sequences != Options.sequences),
            ("--kv-cache-dtype", self.kv_cache_dtype != Options.kv_cache_dtype),
        ):
            if given and self.fit is None:
                raise InputError(f"{flag} says what has to fit beside the weights: it needs --fit CARD")
        if self.fit is not None:
            from appliance.quantize.fit import Place

            Place.read(self.fit, self.context, self.sequences, self.kv_cache_dtype)

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
            own = "gptq_v2" if self.sym is False else "gptq"
            return own if self.embedding_bits == 16 else "compressed-tensors"
        simple = self.bits == 4 and not self.mixed and self.lm_head_bits == self.embedding_bits == 16
        return "awq" if simple else "compressed-tensors"

    def grid(self, scale_dtype: torch.dtype) -> Grid:
        from quant.publish import grid_for

        return grid_for(str(self.format), self.bits, self.group_size, bool(self.sym), scale_dtype)

    @property
    def calibrated(self) -> bool:
        """Whether it takes text."""
        return self.method != "rtn" or self.kv_scales or self.mixed

    def told(self) -> dict[str, Any]:
        """What config.json keeps of how it was made."""
        return {"appliance": {name: value for name, value in asdict(self).items() if name != "format" and value is not None}}
