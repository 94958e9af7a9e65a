"""The CPU's operators from the native extension: tensors in, addresses to the kernels. One thread pool per process."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels.cpu import backend
from kernels.layout import int8_product
from kernels.ops import KVCache, Norm, Ops, PagedBatch, Weight
from quant.errors import CheckpointError
from quant.tensor import QuantTensor

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float8_e4m3fn: 3, torch.int8: 4}  # Type in native/types.h
CODES = {torch.bfloat16: 3, torch.float16: 4, torch.float32: 5}  # Codes there, of dense weights
INT4, INT8, FP8 = 0, 1, 2


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


@dataclass(frozen=True, eq=False)
class NativeWeight:
    """Panels of 64 outputs, see native/pack.h. Keeps the storage that ``handle`` points into."""

    handle: Any
    codes: Tensor  # uint8
    scales: Tensor | None
    zeros: Tensor | None
    bias: Tensor | None  # float32, in panel order
    perm: Tensor | None  # int32 [K]
    N: int  # outputs of the product
    K: int

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.codes, self.scales, self.zeros, self.bias, self.perm) if t is not None)


def quantizes(weight: QuantTensor, dtype: torch.dtype, activation: str) -> bool:
    """Whether activations are rounded to int8 for this weight, so that products are those of integers."""
    if weight.kind == "fp8":
        return False
    wanted = activation == "int8" or (activation == "auto" and dtype != torch.float32)
    asymmetric = weight.zeros is not None
    return wanted or int8_product(bits=weight.bits, groups=weight.groups, asymmetric=asymmetric, activation=weight.activation)


def expanded_rounding(weight: QuantTensor, dtype: torch.dtype) -> torch.dtype:
    """Weights that are expanded to float32 are rounded to the dtype of their scales, as by the tools that published them."""
    return torch.float32 if dtype == torch.bfloat16 else weight.scales.dtype


class NativeOps:
    """The callables of Ops over one pool of threads."""

    def __init__(self, isa: str, threads: int) -> None:
        module = backend.native()
        if module is None:
            raise RuntimeError("the native extension is not built")
        self.module = module
        self.machine = module.Machine(isa, threads, True)

    def pack(
        self,
        weight: QuantTensor | Tensor,
        *,
        dtype: torch.dtype,
        bias: Tensor | None = None,
        gated: bool = False,
        activation: str = "auto",
    ) -> NativeWeight:
        """Panels for activations of ``dtype``. CheckpointError for an FP8 weight that holds NaN."""
        if isinstance(weight, QuantTensor):
            return self._pack_quantized(weight, dtype, bias, gated, activation)
        N, K = weight.shape
        options = {"N": N, "K": K, "group": K, "gated": gated, "codes": CODES[dtype], "scale_type": 0, "round_to": 0}
        return self._lay_out(weight.to(dtype).contiguous(), bias, options | {"quantize": False, "per_token": False})

    def _pack_quantized(
        self, weight: QuantTensor, dtype: torch.dtype, bias: Tensor | None, gated: bool, activation: str
    ) -> NativeWeight:
        scales, packed = weight.scales, weight.packed
        if weight.kind == "fp8":
            packed, scales = packed.view(torch.uint8), scales.float()
            if bool(((packed & 0x7F) == 0x7F).any()):
                raise CheckpointError("an FP8 weight holds NaN: the checkpoint is damaged")
        options = {
            "N": weight.N,
            "K": weight.K,
            "group": weight.group_size,
            "gated": gated,
            "codes": FP8 if weight.kind == "fp8" else INT4 if weight.bits == 4 else INT8,
            "scale_type": TYPES[scales.dtype],
            "round_to": TYPES[expanded_rounding(weight, dtype)],
            "quantize": quantizes(weight, dtype, activation),
            "per_token": weight.activation == "int8-token",
        }
        perm = None if weight.perm is None else weight.perm.to(torch.int32)
        zeros = None if weight.zeros is None else weight.zeros.contiguous()
        return self._lay_out(packed.contiguous(), bias, options, scales=scales.contiguous(), zeros=zeros, perm=perm)

    def _lay_out(
        self,
        codes: Tensor,
        bias: Tensor | None,
        options: dict[str, Any],
        *,
        scales: Tensor | None = None,
        zeros: Tensor | None = None,
        perm: Tensor | None = None,
    ) -> NativeWeight:
        """Copy into panels, in one pass by all threads: each touches first what it will read (that decides where it lies)."""
        shape = self.module.Linear(**options, data=0, scales=0, zeros=0, bias=0, perm=0)
        outputs, gated = shape.panels * 64, options["gated"]
        to_codes = torch.empty(shape.code_bytes, dtype=torch.uint8)
        to_scales = None if scales is None else torch.empty(scales.shape[0] * outputs, dtype=scales.dtype)
        to_zeros = None if zeros is None else torch.empty(zeros.shape[0] * outputs, dtype=torch.uint8)
        self.machine.pack(
            shape, address(codes), address(scales), address(zeros), address(to_codes), address(to_scales), address(to_zeros)
        )
        to_bias = None if bias is None else panel_order(bias.float(), outputs, gated)
        handle = self.module.Linear(
            **options,
            data=address(to_codes),
            scales=address(to_scales),
            zeros=address(to_zeros),
            bias=address(to_bias),
            perm=address(perm),
        )
        N = options["N"] // 2 if gated else options["N"]
        return NativeWeight(handle, to_codes, to_scales, to_zeros, to_bias, perm, N, options["K"])

    def matmul(
        self,
        x: Tensor,
        weight: Weight,
        *,
        norm: Norm | None = None,
        residual: Tensor | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> Tensor:
        if not isinstance(weight, NativeWeight):
            raise TypeError(f"a {type(weight).__name__} was packed for other operators than the native ones")
        if x.stride(1) != 1:
            x = x.contiguous()
        rows = x.shape[0]
        if residual is not None and (out_dtype is None or out_dtype == residual.dtype):
            out = residual = residual.contiguous()
        else:
            out = torch.empty(rows, weight.N, dtype=out_dtype or x.dtype)
        if rows:
            self.machine.matmul(
                weight.handle,
                x.data_ptr(),
                rows,
                x.stride(0),
                TYPES[x.dtype],
                0 if norm is None else norm.weight.data_ptr(),
                0.0 if norm is None else norm.eps,
                address(residual),
                out.data_ptr(),
                TYPES[out.dtype],
            )
        return out

    def embedding(self, ids: Tensor, table: Tensor | Weight, dtype: torch.dtype) -> Tensor:
        if isinstance(table, Tensor) and table.dtype != dtype:
            return table.index_select(0, ids).to(dtype)
        if isinstance(table, NativeWeight) and (table.handle.floating or table.perm is not None):
            raise TypeError("only integer tables without a permutation can be looked up row by row")
        columns = table.shape[1] if isinstance(table, Tensor) else table.K
        out = torch.empty(ids.shape[0], columns, dtype=dtype)
        if isinstance(table, Tensor):
            self.machine.embed_rows(table.data_ptr(), columns, ids.data_ptr(), ids.shape[0], out.data_ptr(), TYPES[dtype])
        elif isinstance(table, NativeWeight):
            self.machine.embed_packed(table.handle, ids.data_ptr(), ids.shape[0], out.data_ptr(), TYPES[dtype])
        else:
            raise TypeError(f"a {type(table).__name__} was packed for other operators than the native ones")
        return out

    def rms_norm(self, x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
        x = x.contiguous()
        out, columns = torch.empty_like(x), x.shape[-1]
        rows = x.numel() // columns
        if rows:
            self.machine.rms_norm(x.data_ptr(), rows, columns, columns, TYPES[x.dtype], weight.data_ptr(), eps, out.data_ptr())
        return out

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        rows, columns = gate_up.shape
        gate_up = gate_up.contiguous()
        out = torch.empty(rows, columns // 2, dtype=gate_up.dtype)
        if rows:
            self.machine.silu_mul(gate_up.data_ptr(), rows, columns, columns, TYPES[gate_up.dtype], out.data_ptr())
        return out

    def rope_store(
        self,
        qkv: Tensor,
        heads: int,
        cache: KVCache,
        batch: PagedBatch,
        cos_sin: Tensor,
        *,
        q_norm: Norm | None = None,
        k_norm: Norm | None = None,
    ) -> Tensor:
        tokens, size = qkv.shape[0], cache.k.shape[3]
        if qkv.stride(1) != 1:
            qkv = qkv.contiguous()
        if tokens:
            self.machine.rope_store(
                qkv.data_ptr(),
                tokens,
                qkv.stride(0),
                TYPES[qkv.dtype],
                heads,
                self._cache(cache),
                batch.positions.data_ptr(),
                batch.slots.data_ptr(),
                cos_sin.data_ptr(),
                cos_sin.shape[1],
                0 if q_norm is None else q_norm.weight.data_ptr(),
                0 if k_norm is None else k_norm.weight.data_ptr(),
                0.0 if q_norm is None else q_norm.eps,
            )
        return qkv.as_strided((tokens, heads, size), (qkv.stride(0), size, 1))

    def attention(self, q: Tensor, cache: KVCache, batch: PagedBatch, *, scale: float, window: int | None = None) -> Tensor:
        tokens, heads, size = q.shape
        if q.stride(2) != 1 or q.stride(1) != size:
            q = q.contiguous()
        out = torch.empty(tokens, heads, size, dtype=q.dtype)
        if tokens:
            self.machine.attention(
                q.data_ptr(),
                q.stride(0),
                out.data_ptr(),
                TYPES[q.dtype],
                heads,
                self._cache(cache),
                batch.seq_lens.shape[0],
                batch.query_starts.data_ptr(),
                batch.seq_lens.data_ptr(),
                batch.block_tables.data_ptr(),
                batch.block_tables.shape[1],
                scale,
                window or 0,
            )
        return out

    def argmax(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        rows, columns = logits.shape
        logits = logits.contiguous()
        values, ids = torch.empty(rows, dtype=torch.float32), torch.empty(rows, dtype=torch.int64)
        if rows:
            self.machine.argmax(logits.data_ptr(), rows, columns, columns, values.data_ptr(), ids.data_ptr())
        return values, ids

    def kth_largest(self, row: Tensor, k: int) -> float:
        if not 1 <= k <= row.numel():
            raise ValueError(f"there is no largest number {k} among {row.numel()}")
        row = row.contiguous()
        return float(self.machine.kth_largest(row.data_ptr(), row.numel(), k))

    def _cache(self, cache: KVCache) -> Any:
        """The cache as the kernels see it, kept with it: every layer of every step asks twice."""
        found = cache.__dict__.get("_native")
        if found is None:
            _, block_size, heads, size = cache.k.shape
            scales = address(cache.k_scale), address(cache.v_scale)
            found = self.module.Cache(
                cache.k.data_ptr(), cache.v.data_ptr(), *scales, TYPES[cache.k.dtype], block_size, heads, size
            )
            cache.__dict__["_native"] = found
        return found


def make_ops(device: torch.device, threads: int | None = None) -> Ops:
    """The native operators for the instruction set that ``backend.name()`` says, on ``threads`` threads (default: all cores)."""
    module = backend.native()
    if module is None:
        raise RuntimeError("the native extension is not built")
    native = NativeOps(backend.name(), threads or len(module.physical_cores()))
    return Ops(
        name="cpu-native",
        device=device,
        pack=native.pack,
        matmul=native.matmul,
        embedding=native.embedding,
        rms_norm=native.rms_norm,
        rope_store=native.rope_store,
        attention=native.attention,
        silu_mul=native.silu_mul,
        argmax=native.argmax,
        kth_largest=native.kth_largest,
    )


def panel_order(bias: Tensor, outputs: int, gated: bool) -> Tensor:
    """float32 [N] -> [outputs], padded with zeros; gated: 64 of the first half, 64 of the second, and so on."""
    if not gated:
        return torch.nn.functional.pad(bias, (0, outputs - bias.numel()))
    halves = bias.view(2, -1)
    padded = torch.nn.functional.pad(halves, (0, outputs // 2 - halves.shape[1]))
    return padded.view(2, -1, 64).transpose(0, 1).reshape(-1).contiguous()
