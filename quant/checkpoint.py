"""A checkpoint directory, read one module at a time: nothing is read that is not asked for, nothing is left over unnoticed."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quant.errors import CheckpointError
from quant.formats import awq, compressed_tensors, dense, fp8, gptq, mxfp4, nvfp4
from quant.headers import CheckpointIndex, TensorInfo, check_stack
from quant.rows import quantize_rows
from quant.rules import WeightScheme
from quant.scheme import QuantScheme, read_scheme
from quant.tensor import QuantTensor

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


def _rounded(source: Checkpoint, name: str, scheme: WeightScheme, expect: tuple[int, int] | None) -> QuantTensor:
    """A weight that was published in a float dtype, in fewer bits (QuantScheme.as_stated)."""
    return quantize_rows(dense.load(source, name, scheme, expect), scheme.bits)


LOADERS: dict[str, Callable[..., QuantTensor | Tensor]] = {
    "dense": dense.load,
    "rows": _rounded,
    "awq-gemm": awq.load,
    "awq-gemv": awq.load,
    "awq-gemv-fast": awq.load,
    "gptq": gptq.load,
    "pack-quantized": compressed_tensors.load,
    "int-quantized": compressed_tensors.load,
    "float-quantized": fp8.load,
    "fp8-block": fp8.load,
    "mxfp4": mxfp4.load,
    "nvfp4": nvfp4.load,
}
# Tensors that change nothing here: rotary tables and causal masks, which are computed; scales of a quantized KV cache, as far
# as models/kv_scales.py does not read them.
IGNORABLE = re.compile(
    r"(.*\.)?(rotary_emb\.(inv_freq|cos_cached|sin_cached)|attn\.(bias|masked_bias)|attention\.(bias|masked_bias)"
    r"|(k|v|q|kv|prob)_(scale|zero_point)|(k|v)_proj\.(k|v|output)_scale|self_attn\.attn\.(k|v|q)_scale)"
)


class Checkpoint:
    """The weights of a directory in canonical form. Use it as a context manager, or call ``close``."""

    def __init__(self, index: CheckpointIndex, config: dict[str, Any], scheme: QuantScheme) -> None:
        self.index = index
        self.config = config
        self.scheme = scheme
        self.consumed: set[str] = set()
        self._files: dict[Path, int] = {}
        self._opening = threading.Lock()  # modules may be read by several threads

    @classmethod
    def open(cls, directory: str | Path, quantization: str | None = None) -> Checkpoint:
        """Read the headers and the configs. CheckpointError or InputError where they do not make sense together.

        ``quantization`` states the method (see QuantScheme.as_stated); without it the checkpoint tells.
        """
        index = CheckpointIndex.open(directory)
        config, scheme = read_scheme(index, quantization)
        return cls(index, config, scheme)

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the files. Reading again opens them again."""
        while self._files:
            os.close(self._files.popitem()[1])

    def has(self, name: str) -> bool:
        """Whether the checkpoint has a tensor of this full name."""
        return name in self.index.tensors

    def info(self, name: str) -> TensorInfo | None:
        """The header of a tensor, or None where there is none."""
        return self.index.tensors.get(name)

    def weight(self, name: str, expect: tuple[int, int] | None = None) -> QuantTensor | Tensor:
        """The weight of a module (``model.layers.0.mlp.up_proj``): canonical, or a dense tensor [N, K] where it is not quantized.

        ``expect`` is its (N, K) by config.json; CheckpointError names the tensor, what was found and what was expected.
        """
        scheme = self.scheme.for_module(name)
        weight = self._load(name, scheme, expect)
        if self.scheme.method == "gptq" and isinstance(weight, QuantTensor):
            weight = self._in_model_dtype(weight)
        shape = (weight.N, weight.K) if isinstance(weight, QuantTensor) else tuple(weight.shape)
        if expect is not None and shape != tuple(expect):
            raise CheckpointError(f"{name}: found a weight [out, in] of {list(shape)}, config.json expects {list(expect)}")
        return weight

    def _in_model_dtype(self, weight: QuantTensor) -> QuantTensor:
        """GPTQ files hold float16 scales, but GPTQModel and transformers cast them to the model's dtype before use.

        Not so AutoRound with its own: it multiplies in float16.
        """
        dtype = {"float16": torch.float16, "bfloat16": torch.bfloat16}.get(
            self.config.get("dtype") or self.config.get("torch_dtype") or ""
        )
        return weight if dtype is None else replace(weight, scales=weight.scales.to(dtype))

    def _load(self, name: str, scheme: WeightScheme, expect: tuple[int, int] | None) -> QuantTensor | Tensor:
        try:
            return LOADERS[scheme.layout](self, name, scheme, expect)
        except CheckpointError:
            raise
        except ValueError as error:  # QuantTensor.check
            raise CheckpointError(f"{name}: its {scheme.layout} tensors do not fit together: {error}") from error

    def tensor(self, name: str) -> Tensor:
        """A plain tensor (norm, bias, embedding) as published."""
        return self.take(name, dtypes=tuple(DTYPES))

    def take(self, name: str, *, dtypes: tuple[str, ...], shape: tuple[int | None, ...] | None = None) -> Tensor:
        """Read a tensor into memory of its own. CheckpointError where it is missing or of another dtype or shape (None: any)."""
        info = self.index.tensors.get(name)
        expected = "/".join(dtypes) if len(dtypes) <= 4 else "a tensor"
        if shape is not None:
            expected += "[" + ", ".join("*" if n is None else str(n) for n in shape) + "]"
        if info is None:
            check_stack(self.index.tensors, name)
            raise CheckpointError(f"{name}: the tensor is missing from {self.index.directory}, expected {expected}")
        fits = shape is None or (
            len(shape) == len(info.shape) and all(n in (None, m) for n, m in zip(shape, info.shape, strict=True))
        )
        if info.dtype not in dtypes or not fits:
            raise CheckpointError(f"{name}: found {info}, expected {expected}")
        self.consumed.add(name)
        return self._read(info)

    def skip(self, name: str) -> None:
        """Knowingly leave a tensor unread, if there is one."""
        if name in self.index.tensors:
            self.consumed.add(name)

    def leftover(self) -> list[str]:
        """Tensors that nobody asked for and that could mean something.

        Not counted: what IGNORABLE names, and biases of zeros beside a weight that was read (AutoGPTQ gave every module one).
        """
        rest = [name for name in self.index.tensors if name not in self.consumed and not IGNORABLE.fullmatch(name)]
        return sorted(name for name in rest if not self._is_zero_bias(name))

    def _is_zero_bias(self, name: str) -> bool:
        module = name.removesuffix(".bias")
        if module == name or not any(f"{module}.{suffix}" in self.consumed for suffix in ("qweight", "weight", "weight_packed")):
            return False
        return not bool(self._read(self.index.tensors[name]).any())

    def _read(self, info: TensorInfo) -> Tensor:
        """Read bytes into a fresh buffer: a mapped file would count as this process's memory and stay with it."""
        dtype = DTYPES.get(info.dtype)
        if dtype is None:
            raise CheckpointError(f"{info.name}: dtype {info.dtype} is not supported")
        if info.nbytes == 0:
            return torch.empty(info.shape, dtype=dtype)
        with self._opening:
            if info.file not in self._files:
                self._files[info.file] = os.open(info.file, os.O_RDONLY)
        columns, width = (info.shape[1], info.nbytes // info.shape[1]) if info.pitch else (1, info.nbytes)
        length = (columns - 1) * info.pitch + width  # what is between them is read, too: one read for all
        buffer = torch.empty(length, dtype=torch.uint8)
        view, done = buffer.numpy().data, 0
        while done < length:
            count = os.preadv(self._files[info.file], [view[done:]], info.start + done)
            if count == 0:
                raise CheckpointError(f"{info.file}: truncated while reading {info.name}: the file changed under us")
            done += count
        if info.pitch:
            return buffer.view(dtype).as_strided(info.shape, (1, info.pitch // dtype.itemsize)).contiguous()
        return buffer.view(dtype).reshape(info.shape)
