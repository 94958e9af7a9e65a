"""The CPU's operators from the native extension: tensors in, addresses to the kernels. One thread pool per process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kernels.cpu import backend, native_delta, native_stack, native_weights
from kernels.cpu.native_weights import TYPES, NativeWeight, address, halves_joined
from kernels.layout import SCALED_CACHES
from kernels.mixture import mix
from kernels.ops import Clamp, Forward, KVCache, Mixture, Norm, Ops, PagedBatch, Stack, Weight
from kernels.reference import queries_alone
from kernels.states import DeltaRule, StateCache
from quant.tensor import QuantTensor


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
        gelu: bool = False,
        clamp: Clamp | None = None,
        activation: str = "auto",
    ) -> NativeWeight:
        return native_weights.pack(
            self.module,
            self.machine,
            weight,
            dtype=dtype,
            bias=bias,
            gated=gated,
            gelu=gelu,
            clamp=clamp,
            activation=activation,
        )

    def matmul(
        self,
        x: Tensor,
        weight: Weight,
        *,
        norm: Norm | None = None,
        residual: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        if not isinstance(weight, NativeWeight):
            raise TypeError(f"a {type(weight).__name__} was packed for other operators than the native ones")
        if x.stride(1) != 1:
            x = x.contiguous()
        rows, width = x.shape[0], weight.handle.panels * 64 if weight.paired else weight.N
        residual = None if residual is None else residual.contiguous()
        if out is None:
            out = torch.empty(rows, width, dtype=torch.float32 if weight.paired else x.dtype) if residual is None else residual
        elif out.shape != (rows, weight.N) or not out.is_contiguous():
            raise ValueError(f"out is {list(out.shape)}; [{rows}, {weight.N}] is needed, contiguous")
        if rows:
            self.machine.matmul(
                weight.handle,
                x.data_ptr(),
                rows,
                x.stride(0),
                TYPES[x.dtype],
                0 if norm is None else norm.weight.data_ptr(),
                0.0 if norm is None else norm.eps,
                0.0 if norm is None else norm.offset,
                address(residual),
                out.data_ptr(),
                TYPES[out.dtype],
            )
        return halves_joined(out, weight.N) if weight.paired else out

    def ungated(self, weight: Weight) -> Weight:
        assert isinstance(weight, NativeWeight)
        return native_weights.ungated(self.module, weight)

    def embedding(self, ids: Tensor, table: Tensor | Weight, dtype: torch.dtype) -> Tensor:
        if isinstance(table, Tensor) and table.dtype != dtype:
            return table.index_select(0, ids).to(dtype)
        columns = table.shape[1] if isinstance(table, Tensor) else table.K
        out = torch.empty(ids.shape[0], columns, dtype=dtype)
        self.embed(ids, table, out)
        return out

    def embed(self, ids: Tensor, table: Tensor | Weight, out: Tensor) -> None:
        where = ids.data_ptr(), ids.shape[0], out.data_ptr(), TYPES[out.dtype]
        if isinstance(table, Tensor):
            self.machine.embed_rows(table.data_ptr(), table.shape[1], *where)
        elif not isinstance(table, NativeWeight):
            raise TypeError(f"a {type(table).__name__} was packed for other operators than the native ones")
        elif table.handle.floating or table.perm is not None:
            raise TypeError("only integer tables without a permutation can be looked up row by row")
        else:
            self.machine.embed_packed(table.handle, *where)

    def rms_norm(self, x: Tensor, weight: Tensor, *, eps: float, offset: float = 0.0, residual: Tensor | None = None) -> Tensor:
        x = x.contiguous()
        residual = None if residual is None else residual.contiguous()
        out = torch.empty_like(x) if residual is None else residual
        self.normalize(x, Norm(weight, eps, offset), residual, out)
        return out

    def normalize(self, x: Tensor, norm: Norm, residual: Tensor | None, out: Tensor) -> None:
        columns = x.shape[-1]
        if rows := x.numel() // columns:
            where = x.data_ptr(), rows, columns, columns, TYPES[x.dtype]
            self.machine.rms_norm(*where, norm.weight.data_ptr(), norm.eps, norm.offset, address(residual), out.data_ptr())

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        return self._gate_mul(gate_up, gelu=False)

    def gelu_mul(self, gate_up: Tensor) -> Tensor:
        return self._gate_mul(gate_up, gelu=True)

    def _gate_mul(self, gate_up: Tensor, *, gelu: bool) -> Tensor:
        rows, columns = gate_up.shape
        gate_up = gate_up.contiguous()
        out = torch.empty(rows, columns // 2, dtype=gate_up.dtype)
        if rows:
            self.machine.gate_mul(gelu, gate_up.data_ptr(), rows, columns, columns, TYPES[gate_up.dtype], out.data_ptr())
        return out

    def mix(self, x: Tensor, mixture: Mixture, *, norm: Norm, alone: bool = False) -> Tensor:
        handle = self.experts(mixture)
        if handle is None:
            return mix(self.matmul, self.rms_norm, self.silu_mul, self.gelu_mul, x, mixture, norm=norm, alone=alone)
        x = x.contiguous()
        out = torch.empty_like(x)
        gain = norm.weight.data_ptr(), norm.eps, norm.offset
        self.machine.mixture(handle, x.data_ptr(), len(x), TYPES[x.dtype], *gain, out.data_ptr(), alone)
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
        tokens, size = qkv.shape[0], cache.head_dim
        if qkv.stride(1) != 1:
            qkv = qkv.contiguous()
        nothing = queries_alone(qkv, heads, cache)
        if tokens:
            self.machine.rope_store(
                qkv.data_ptr(),
                tokens,
                qkv.stride(0),
                TYPES[qkv.dtype],
                heads,
                self.module.Cache(0, 0, 0, 0, 0, 1, 0, size, 0.0, 0.0) if nothing else self.cache(cache),
                batch.positions.data_ptr(),
                batch.slots.data_ptr(),
                cos_sin.data_ptr(),
                cos_sin.shape[1],
                0 if q_norm is None else q_norm.weight.data_ptr(),
                0 if k_norm is None else k_norm.weight.data_ptr(),
                0.0 if q_norm is None else q_norm.eps,
                0.0 if q_norm is None else q_norm.offset,
            )
        return qkv.as_strided((tokens, heads, size), (qkv.stride(0), size, 1))

    def attention(
        self,
        q: Tensor,
        cache: KVCache,
        batch: PagedBatch,
        *,
        scale: float,
        window: int | None = None,
        cap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        tokens, heads, size = q.shape
        if q.stride(2) != 1 or q.stride(1) != size:
            q = q.contiguous()
        sinks = None if sinks is None else sinks.to(q.dtype).contiguous()
        out = torch.empty(tokens, heads, size, dtype=q.dtype)
        if tokens:
            self.machine.attention(
                q.data_ptr(),
                q.stride(0),
                out.data_ptr(),
                TYPES[q.dtype],
                heads,
                self.cache(cache),
                batch.seq_lens.shape[0],
                batch.query_starts.data_ptr(),
                batch.seq_lens.data_ptr(),
                batch.block_tables.data_ptr(),
                batch.block_tables.shape[1],
                scale,
                window or 0,
                cap or 0.0,
                address(sinks),
            )
        return out

    def delta(self, x: Tensor, gates: Tensor, rule: DeltaRule, cache: StateCache, batch: PagedBatch) -> Tensor:
        return native_delta.delta(self.module, self.machine, x, gates, rule, cache, batch)

    def sigmoid_mul(self, x: Tensor, gate: Tensor) -> Tensor:
        x, gate = x.contiguous(), gate if gate.stride(1) == 1 else gate.contiguous()
        if len(x):
            where = x.data_ptr(), gate.data_ptr(), *x.shape, gate.stride(0), TYPES[x.dtype], x.data_ptr()
            self.machine.sigmoid_mul(*where)
        return x

    def bind(
        self, stack: Stack, caches: Sequence[KVCache], *, states: Sequence[StateCache] = (), max_tokens: int
    ) -> Forward | None:
        return native_stack.bind(self, stack, caches, states=states, max_tokens=max_tokens)

    def experts(self, mixture: Mixture) -> Any:
        """The experts as the kernels see them, kept with them; None where they need the operators one by one."""
        if "_native" not in mixture.__dict__:
            parts: Any = [(one.gate_up, one.down) for one in (*mixture.experts, mixture.shared) if one is not None]
            gate_ups, downs = [gate_up[0].handle for gate_up, _ in parts], [down.handle for _, down in parts]
            shared = (None, None) if mixture.shared is None else (gate_ups.pop(), downs.pop())
            router: Any = mixture.router
            gate: Any = mixture.shared_gate
            mixture.__dict__["_native"] = all(len(gate_up) == 1 for gate_up, _ in parts) and self.module.Experts(
                router=router.handle,
                gate_up=gate_ups,
                down=downs,
                active=mixture.active,
                normalized=mixture.normalized,
                correction=address(mixture.correction),
                **mixture.scores._asdict(),
                shared_gate_up=shared[0],
                shared_down=shared[1],
                shared_gate=None if gate is None else gate.handle,
                router_norm=address(mixture.norm),
                gains=address(mixture.gains),
            )
        return mixture.__dict__["_native"] or None

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

    def cache(self, cache: KVCache) -> Any:
        """The cache as the kernels see it, kept with it: every layer of every step asks twice."""
        found = cache.__dict__.get("_native")
        if found is None:
            _, block_size, heads, _ = cache.k.shape
            if cache.dtype in SCALED_CACHES and (cache.k_scale is None or cache.v_scale is None):
                raise ValueError(f"a cache in {cache.dtype} needs scales beside its codes")
            places = (address(t) for t in (cache.k, cache.v, cache.k_scale, cache.v_scale))
            shape = block_size, heads, cache.head_dim
            found = self.module.Cache(*places, TYPES[cache.k.dtype], *shape, *(cache.given or (0.0, 0.0)))
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
        gelu_mul=native.gelu_mul,
        mix=native.mix,
        bind=native.bind,
        delta=native.delta,
        ungated=native.ungated,
        adapts=native_stack.adapts,
        sigmoid_mul=native.sigmoid_mul,
    )
