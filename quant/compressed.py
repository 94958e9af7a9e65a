"""Quantization settings of compressed-tensors (llm-compressor) -> rules; see quant.configs. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quant import values
from quant.errors import CheckpointError
from quant.rules import DENSE, MXFP4, NVFP4, Rule, Settings, WeightScheme

FLOATS = {"nvfp4-pack-quantized": (4,), "mxfp4-pack-quantized": (4,), "mixed-precision": (4, 8)}
"""Bits of floats in formats that hold others than 8."""
FLOAT4 = {"tensor_group": NVFP4, "group": MXFP4}
"""4-bit floats by their strategy; groups have one size in each."""
FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "mxfp8-quantized", "naive-quantized", "dense", *FLOATS)


def parse(config: Mapping[str, Any], source: str) -> Settings:
    """compressed-tensors: ``ignore`` first, then targets from the most exact kind to the least: name, regex, class."""
    stored = str(config.get("format") or "dense")
    if stored == "fakequant":
        stored = "dense"
    values.choice(source, "format", stored, FORMATS)
    transform = config.get("transform_config") or {}
    if isinstance(transform, Mapping) and transform.get("config_groups"):
        raise CheckpointError(f"{source}: transform_config is not supported: it needs activations rotated at run time")
    sparsity = (config.get("sparsity_config") or {}).get("format", "dense")
    values.choice(source, "sparsity_config format", sparsity, ("dense",))
    rules = [_target(source, "ignore", name, DENSE) for name in values.names(source, config, "ignore")]
    groups = config.get("config_groups")
    if not isinstance(groups, Mapping):
        raise CheckpointError(f"{source}: config_groups is {groups!r}, expected an object of groups")
    targets: list[Rule] = []
    for name, group in groups.items():
        if not isinstance(group, Mapping):
            raise CheckpointError(f"{source}: group {name!r} is {group!r}; presets must be written out as weights and targets")
        scheme = _scheme(group, stored, f"{source}, {name}")
        targets += [_target(source, "targets", target, scheme) for target in values.names(source, group, "targets")]
    order = ("name", "regex", "class")
    return Settings("compressed-tensors", (*rules, *sorted(targets, key=lambda rule: order.index(rule.kind))), DENSE, source)


def _target(source: str, key: str, target: str, scheme: WeightScheme) -> Rule:
    if target.startswith("re:"):
        return Rule("regex", values.regex(source, key, target[3:]), scheme)
    return Rule("class" if target[:1].isupper() and "." not in target else "name", target, scheme)


def _scheme(group: Mapping[str, Any], stored: str, source: str) -> WeightScheme:
    weights = group.get("weights")
    stored = str(group.get("format") or stored)
    values.choice(source, "format", stored, FORMATS)
    if weights is None or stored == "dense":
        return DENSE
    kind = values.choice(source, "weights.type", str(weights.get("type", "int")).lower(), ("int", "float"))
    widths = FLOATS.get(stored, (8,)) if kind == "float" else (2, 3, 4, 5, 6, 7, 8)
    bits = values.choice(source, "weights.num_bits", weights.get("num_bits", 8), widths)
    if weights.get("dynamic"):
        raise CheckpointError(
            f"{source}: weights.dynamic {weights['dynamic']!r} is not supported; weights are quantized beforehand"
        )
    size = weights.get("group_size")
    implied = "tensor" if size is None else "channel" if size == -1 else "group"
    strategy = str(weights.get("strategy") or implied).lower()
    four = kind == "float" and bits == 4
    held = [name for name, scheme in FLOAT4.items() if stored.partition("-")[0] in (scheme.layout, "mixed")]
    values.choice(source, "weights.strategy", strategy, tuple(held) if four else ("tensor", "channel", "group", "block"))
    order = values.choice(
        source, "weights.actorder", weights.get("actorder"), (None, False, True, "weight", "static", "group", "dynamic")
    )
    activation = _activation(group.get("input_activations"), source)
    if four:
        values.choice(source, "weights.group_size", size, (FLOAT4[strategy].group_size,))
        return FLOAT4[strategy]  # activations, most in 4 bits, are left as they are
    written = {"naive-quantized": f"{kind}-quantized", "mxfp8-quantized": "float-quantized", "mixed-precision": ""}
    layout = written.get(stored, stored)
    if not layout:  # as compressed-tensors infers it
        layout = "float-quantized" if kind == "float" else "int-quantized" if activation == "int8-token" else "pack-quantized"
    if (layout == "float-quantized") != (kind == "float") or layout in FLOATS:
        raise CheckpointError(f"{source}: format {stored!r} does not hold weights of type {kind!r}")
    block = None
    if strategy == "block":
        block = values.block(source, "weights.block_structure", weights.get("block_structure"))
    return WeightScheme(
        layout,
        bits,
        block[1] if block else values.group_size(source, weights, ("group_size",), -1) if strategy == "group" else -1,
        symmetric=bool(weights.get("symmetric", True)),
        act_order=order in (True, "group", "dynamic"),
        activation=None if block else activation,
        block=block,
    )


def _activation(args: Mapping[str, Any] | None, source: str) -> str | None:
    """The 8-bit kinds by name; other run-time roundings (4 bits, groups) are left out, which only adds precision."""
    if args is None:
        return None
    kind = values.choice(source, "input_activations.type", str(args.get("type", "int")).lower(), ("int", "float"))
    strategy = str(args.get("strategy") or "tensor").lower()
    values.choice(source, "input_activations.strategy", strategy, ("token", "tensor", "group", "tensor_group", "channel"))
    if args.get("num_bits", 8) != 8 or strategy not in ("token", "tensor"):
        return None
    return f"{'fp8' if kind == 'float' else 'int8'}-{'token' if args.get('dynamic') else 'tensor'}"
