"""The gated delta rule by the native extension: tensors in, addresses to the kernel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.batch import PagedBatch
from kernels.cpu.native_weights import TYPES, NativeWeight, address
from kernels.states import DeltaRule, StateCache

LOST = "the batch does not say where the states of its sequences are"


def delta(module: Any, machine: Any, x: Tensor, gates: Tensor, rule: DeltaRule, cache: StateCache, batch: PagedBatch) -> Tensor:
    """As kernels.states.Delta."""
    if batch.states is None:
        raise ValueError(LOST)
    x, gates = (one if one.stride(1) == 1 else one.contiguous() for one in (x, gates))
    out = torch.empty(x.shape[0], rule.value_heads * rule.value_dim, dtype=x.dtype)
    if x.shape[0]:
        machine.delta(
            _native(module, rule),
            x.data_ptr(),
            x.stride(0),
            gates.data_ptr(),
            gates.stride(0),
            TYPES[x.dtype],
            out.data_ptr(),
            cache.conv.data_ptr(),
            cache.conv.stride(0),
            cache.state.data_ptr(),
            cache.state.stride(0),
            batch.seq_lens.shape[0],
            batch.query_starts.data_ptr(),
            batch.seq_lens.data_ptr(),
            batch.states.data_ptr(),
        )
    return out


def layer(module: Any, rule: DeltaRule, gates: NativeWeight, cache: StateCache) -> Any:
    """What the kernels of all layers in one call have of such a layer, over these states."""
    return module.Delta(
        rule=_native(module, rule),
        gates=gates.handle,
        conv=cache.conv.data_ptr(),
        conv_stride=cache.conv.stride(0),
        state=cache.state.data_ptr(),
        state_stride=cache.state.stride(0),
    )


def _native(module: Any, rule: DeltaRule) -> Any:
    """The rule as the kernel sees it, kept with it."""
    if "_native" not in rule.__dict__:
        places = {name: address(getattr(rule, name)) for name in ("conv", "rate", "dt_bias", "norm")}
        sizes = {name: getattr(rule, name) for name in ("key_heads", "value_heads", "key_dim", "value_dim", "eps")}
        rule.__dict__["_native"] = module.DeltaRule(**places, **sizes, kernel=rule.conv.shape[0])
    return rule.__dict__["_native"]
