"""Heads of layers that have others than most (Gemma 4), in both of the ways in which configs say so. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from models.family import Architecture
from models.fields import Fields
from models.module import ModuleShape
from quant.errors import InputError


@dataclass(frozen=True)
class KVHeads:
    """Keys and values of a layer."""

    count: int
    size: int  # that of heads of queries, too
    keys_only: bool = False  # there is no v_proj: values are what k_proj gives
    shared: bool = False  # there are none: another layer's are read


def most_heads(kind: Architecture, fields: Fields, hidden: int, heads: int) -> tuple[int, int]:
    """(heads of keys and values, their size): as given, or all, and as many features as make the hidden size."""
    kv_heads = fields.integer("num_key_value_heads", default=heads)
    if heads % kv_heads:
        raise InputError(f"config.json: num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}")
    if fields.get("head_dim") is not None or kind.default_head_dim is not None:
        return kv_heads, fields.integer("head_dim", default=kind.default_head_dim)
    if hidden % heads:
        raise InputError(
            f"config.json: hidden_size {hidden} is no multiple of num_attention_heads {heads}, and head_dim is missing"
        )
    return kv_heads, hidden // heads


def wide_heads(kind: Architecture, fields: Fields, windows: Sequence[int | None], most: KVHeads, heads: int) -> KVHeads | None:
    """Those of layers without a window; None in families of which all layers have those of ``most``.

    global_head_dim and num_global_key_value_heads say which, or, as transformers 5.23 writes it, per_layer_config, layer by
    layer. InputError where layers of one kind differ, or the last one has a window, which transformers would take from it.
    """
    if not kind.global_heads:
        return None
    if windows[-1] is not None:
        raise InputError(
            "config.json: layer_types ends with sliding_attention, but the last layer of such a model sees everything"
        )
    keys_only = fields.flag("attention_k_eq_v", default=False)
    given = fields.get("per_layer_config")
    if given is None:
        count = fields.integer("num_global_key_value_heads", default=most.count) if keys_only else most.count
        found = {(count, fields.integer("global_head_dim", default=512))}
    else:
        by_layer = [_own(given, layer, most) for layer in range(len(windows))]
        found = {own for own, window in zip(by_layer, windows, strict=True) if window is None}
        if (
            any(own != (most.count, most.size) for own, window in zip(by_layer, windows, strict=True) if window is not None)
            or len(found) > 1
        ):
            raise InputError("config.json: per_layer_config has other heads for some layers of a type than for the others")
    ((count, size),) = found
    if heads % count:
        raise InputError(f"config.json: num_attention_heads {heads} is no multiple of {count} global key-value heads")
    return KVHeads(count, size, keys_only)


def _own(given: Any, layer: int, most: KVHeads) -> tuple[int, int]:
    """(key-value heads, their size) of a layer. Its number may have zeros before it."""
    if not isinstance(given, Mapping) or not all(str(key).isdecimal() for key in given):
        raise InputError(f"config.json: per_layer_config is {given!r:.60}, expected an object by number of layer")
    own = next((value for key, value in given.items() if int(key) == layer), None) or {}
    if not isinstance(own, Mapping) or not set(own) <= {"head_dim", "num_key_value_heads"}:
        raise InputError(f"config.json: per_layer_config[{layer}] is {own!r:.60}; known are head_dim and num_key_value_heads")
    fields = Fields(own, f"config.json: per_layer_config[{layer}]")
    return fields.integer("num_key_value_heads", default=most.count), fields.integer("head_dim", default=most.size)


def attention_modules(
    heads: int, kv: KVHeads, hidden: int, *, fused: bool, gates: bool, bias: bool, o_bias: bool
) -> Iterator[ModuleShape]:
    """The linears of a layer of attention with so many heads of queries; ``gates``: each has one more for what it gives."""
    q, size = heads * kv.size, kv.count * kv.size
    if fused:
        yield ModuleShape("self_attn.qkv_proj", q + 2 * size, hidden, "attention", bias)
    else:
        parts = {"q_proj": 2 * q if gates else q, "k_proj": size, "v_proj": size}
        for name, outputs in list(parts.items())[: 1 if kv.shared else 2 if kv.keys_only else 3]:
            yield ModuleShape(f"self_attn.{name}", outputs, hidden, "attention", bias)
    yield ModuleShape("self_attn.o_proj", hidden, q, "attention", o_bias)
