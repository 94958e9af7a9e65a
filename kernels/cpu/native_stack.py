"""A whole model over its caches in one native call: weights and caches as kernels/cpu/native/stack.h wants them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kernels.adapters import Adapted
from kernels.batch import moved_up
from kernels.cpu import native_delta
from kernels.cpu.native_weights import TYPES, address
from kernels.layout import NATIVE_ROWS
from kernels.ops import Forward, KVCache, Layer, Mixture, Norm, PagedBatch, Stack
from kernels.states import StateCache

if TYPE_CHECKING:
    from kernels.cpu.native_ops import NativeOps


def bind(
    ops: NativeOps, stack: Stack, caches: Sequence[KVCache], *, states: Sequence[StateCache] = (), max_tokens: int
) -> Forward | None:
    """As kernels.ops.Bind; None where weights come in parts."""
    layers, norm = stack.layers, stack.norm
    if any(len(layer.qkv) > (1 if layer.delta is None else 2) or _inner(ops, layer) is None for layer in layers):
        return None
    places: dict[bool, Iterator[Any]] = {False: iter(caches), True: iter(states)}  # by whether a layer has states
    size, dtype = norm.weight.shape[0], norm.weight.dtype
    made = [_layer(ops, layer, next(places[layer.delta is not None]), stack.rotation(layer)) for layer in layers]
    settings: dict[str, Any] = {"type": TYPES[dtype], "heads": stack.heads, "eps": norm.eps, "offset": norm.offset}
    settings |= {"scale": stack.scale, "cap": stack.cap or 0.0}
    storing = stack.storing
    whole, first, rest = (ops.module.Stack(some, **settings) for some in (made, made[:storing], made[storing:]))
    # Made and touched here, once: what comes and goes with every step is memory that grows in pieces.
    hidden = torch.zeros(max_tokens, size, dtype=dtype)
    workspace = torch.zeros(max_tokens * max(whole.width, size), dtype=dtype)

    unlike = {(type(layer.mlp), layer.delta is None, layer.o.K, layer.shared): layer for layer in reversed(layers)}
    for layer in unlike.values():
        _rehearse(ops, layer, hidden.view(-1), workspace, min(max_tokens, NATIVE_ROWS))

    def run(handle: Any, tokens: int, batch: PagedBatch, told: Tensor | None) -> None:
        adapted = [_adapted(ops, one) for one in batch.adapters]
        ops.machine.layers(
            handle,
            tokens,
            batch.seq_lens.shape[0],
            batch.positions.data_ptr(),
            batch.slots.data_ptr(),
            batch.query_starts.data_ptr(),
            batch.seq_lens.data_ptr(),
            batch.block_tables.data_ptr(),
            batch.block_tables.shape[1],
            address(batch.states),
            address(told),
            0 if told is None else told.stride(0),
            adapted,
            hidden.data_ptr(),
            workspace.data_ptr(),
        )

    def forward(ids: Tensor, batch: PagedBatch, alive: Any = (stack, caches, states)) -> Tensor:  # handles have their addresses
        tokens = ids.shape[0]
        if tokens > max_tokens:
            raise ValueError(f"{tokens} tokens, but at most {max_tokens} were said to come at once")
        if states and batch.states is None:
            raise ValueError(native_delta.LOST)
        ops.embed(ids, stack.embedding, hidden)
        if stack.embedding_scale != 1.0:
            hidden[:tokens].mul_(stack.embedding_scale)
        told = None if stack.told is None else stack.told(ids, hidden[:tokens])
        if (wanted := batch.wanted) is None:
            run(whole, tokens, batch, told)
        else:
            run(first, tokens, batch, told)
            tokens = moved_up(hidden, wanted.rows).shape[0]
            if not tokens:
                return hidden[:0]
            run(rest, tokens, wanted.batch, None if told is None else moved_up(told[:, storing:], wanted.rows))
        out = workspace[: tokens * size].view(tokens, size)
        ops.normalize(hidden[:tokens], norm, None, out)
        return out

    return forward


def adapts(stack: Stack) -> bool:
    """Whether what adapters add to gate and up is in panels of its own for each of the two."""
    gated = (layer.mlp.gate_up[0].N for layer in stack.layers if not isinstance(layer.mlp, Mixture))
    return all(outputs % 64 == 0 for outputs in gated)


def _adapted(ops: NativeOps, one: Adapted) -> Any:
    """Rows with an adapter as the kernels see them; the adapter itself is kept with its weights."""
    weights = one.weights
    if "_native" not in weights.__dict__:
        made = ops.module.Adapter(layers=len(weights.layers))
        for number, layer in enumerate(weights.layers):
            for slot, pair in enumerate((layer.qkv, layer.o, layer.gate_up, layer.down)):
                if pair is not None:
                    made.add(number, slot, pair.a.handle, pair.b.handle)  # type: ignore[attr-defined]
        weights.__dict__["_native"] = made
    rows = one.rows
    where = (0, rows.start, rows.stop - rows.start) if isinstance(rows, slice) else (rows.data_ptr(), 0, len(rows))
    return ops.module.Adapted(weights.__dict__["_native"], *where)


def _rehearse(ops: NativeOps, layer: Layer, hidden: Tensor, workspace: Tensor, rows: int) -> None:
    """Products of as many rows as are prepared at a time: the memory that they need is there before the first request."""
    products = [(hidden, layer.qkv[0], workspace), (workspace, layer.o, hidden)]
    mixture, norm = (layer.mlp, layer.post_norm) if layer.beside is None else (layer.beside.mixture, layer.beside.norm)
    if isinstance(mixture, Mixture):
        assert norm is not None
        ops.mix(hidden[: rows * layer.o.N].view(rows, -1), mixture, norm=Norm(norm, 1.0))
    if not isinstance(layer.mlp, Mixture):
        products += [(hidden, layer.mlp.gate_up[0], workspace), (workspace, layer.mlp.down, hidden)]
    for source, weight, target in products:
        x, out = source[: rows * weight.K].view(rows, weight.K), target[: rows * weight.N].view(rows, weight.N)
        ops.matmul(x, weight, out=out)


def _inner(ops: NativeOps, layer: Layer) -> dict[str, Any] | None:
    """What takes the place of its MLP in one call; None where weights come in parts."""
    if isinstance(layer.mlp, Mixture):
        experts = ops.experts(layer.mlp)
        return None if experts is None else {"experts": experts}
    gate_up, down = layer.mlp.gate_up, layer.mlp.down
    if len(gate_up) > 1:
        return None
    found = {"gate_up": gate_up[0].handle, "down": down.handle}  # type: ignore[attr-defined]
    if (beside := layer.beside) is None:
        return found
    experts = ops.experts(beside.mixture)
    norms = {"norm": beside.norm, "mixture_norm": beside.mixture_norm, "mlp_norm": beside.mlp_norm}
    places = {name: address(norm) for name, norm in norms.items()}
    return None if experts is None else {**found, "beside": ops.module.Beside(experts=experts, **places)}


def _layer(ops: NativeOps, layer: Layer, cache: Any, cos_sin: Tensor) -> Any:
    weights: Any = {"qkv": layer.qkv[0], "o": layer.o}
    kept: dict[str, Any] = {}
    if layer.delta is None:
        kept["cache"] = ops.cache(cache)
        if layer.v_norm is not None:
            whole = (layer.o.K // cache.head_dim + 2 * cache.k.shape[2]) * cache.head_dim
            kept["values"] = ops.module.Values(norm=address(layer.v_norm), keys_only=whole > layer.qkv[0].N, moved=layer.moved)
    else:
        gates: Any = layer.qkv[1]
        kept["delta"] = native_delta.layer(ops.module, layer.delta, gates, cache)
    if (told := layer.told) is not None:
        gate, down = told.weights
        kept["told"] = ops.module.Told(gate=gate.handle, down=down.handle, norm=address(told.norm))  # type: ignore[attr-defined]
    return ops.module.Layer(
        **{name: weight.handle for name, weight in weights.items()},
        **(_inner(ops, layer) or {}),
        input_norm=address(layer.input_norm),
        post_norm=address(layer.post_norm),
        q_norm=address(layer.q_norm),
        k_norm=address(layer.k_norm),
        attention_norm=address(layer.attention_norm),
        mlp_norm=address(layer.mlp_norm),
        cos_sin=address(cos_sin),
        rotary=cos_sin.shape[1],
        **kept,
        shared=layer.shared,
        window=layer.window or 0,
        sinks=address(layer.sinks),
        scalar=address(layer.scalar),
    )
