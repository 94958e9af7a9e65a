"""The memory of what is known of sequences: keys and values by block, and states by seat. All of it is allocated at the start."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import torch

from appliance.memory.plan import MemoryPlan
from kernels.ops import KVCache, StateCache
from models.spec import ModelSpec


def allocate_caches(
    plan: MemoryPlan, blocks: int, *, device: torch.device, given: Sequence[tuple[float, float] | None]
) -> list[KVCache]:
    """The whole pool; ``given``: the checkpoint's scales of each layer, as ``Decoder.given_scales`` has them.

    Keys of all layers of one shape are one piece of memory, and so are their values: a card's allocator rounds each request up to
    whole 2 MiB.
    """
    kv, parts = plan.kv, {}
    for shape, count in Counter(kv.by_layer).items():
        whole = KVCache.zeros(count * blocks, kv.block_size, *shape, dtype=kv.dtype, device=device, values=kv.values)
        parts[shape] = whole.split(blocks)
    layers = [next(parts[shape]) for shape in kv.by_layer]
    return [replace(layer, given=scales) for layer, scales in zip(layers, given, strict=True)]


def allocate_states(spec: ModelSpec, places: int, *, device: torch.device) -> list[StateCache]:
    """So many places in each of the layers that have states: seats of those that run, then places where some are kept."""
    net, count = spec.recurrent, sum(spec.linear)
    if net is None:
        return []
    shapes = net.conv_shape, net.state_shape
    whole = [torch.zeros((count, places, *shape), dtype=torch.float32, device=device) for shape in shapes]
    return [StateCache(*one) for one in zip(*whole, strict=True)]


def move_states(states: Sequence[StateCache], source: int, target: int) -> None:
    """From place to place, in all layers, on the steps' own stream: with no memory in passing."""
    for tensor in (tensor for cache in states for tensor in cache):
        tensor[target].copy_(tensor[source])
