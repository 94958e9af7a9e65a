"""The memory that loading takes, as a process sees it that does nothing else."""

from __future__ import annotations

import gc
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from appliance.memory.loading import Workers, loading
from appliance.memory.modules import Machinery
from kernels.ops import get_ops
from models import loader
from models.spec import ModelSpec
from quant.checkpoint import Checkpoint


@dataclass(frozen=True)
class Peak:
    """Bytes: the ``planned`` peak, that of the process while it loaded, and how many of these were ``code`` (files in memory)."""

    planned: int
    taken: int
    code: int

    @property
    def measured(self) -> int:
        """Without code: the system takes its pages away, and brings them back, as it likes."""
        return self.taken - self.code


def status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(key))


def peak_of_loading(checkpoint: Path, quantization: str | None, isa: str, workers: int) -> Peak:
    """``isa`` is native or torch. Linux only."""
    os.environ["APPLIANCE_CPU_ISA"] = "torch" if isa == "torch" else "auto"
    ops = get_ops("cpu", threads=1)
    with Checkpoint.open(checkpoint, quantization) as source:
        spec = ModelSpec.from_config(source.config)
        machinery = Machinery(ops=ops.name, dtype="bfloat16", head_bits=8 if ops.name == "cpu-native" else None)
        gc.collect()
        loader.release_memory()
        before, code = status("VmRSS"), status("RssFile")
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        decoder = loader.load_model(source, spec, ops, dtype=torch.bfloat16, max_len=64, workers=workers, ends_first=True)
        taken, code = status("VmHWM") - before, status("RssFile") - code
        planned = loading(spec, source.scheme, machinery).device.peak(decoder.nbytes, Workers(workers, ends_first=True))
    return Peak(planned, taken, max(code, 0))
