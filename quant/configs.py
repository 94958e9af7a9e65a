"""Quantization settings as AutoAWQ, AutoGPTQ/GPTQModel, compressed-tensors, FP8 tools and gpt-oss write them -> rules (no torch).

Keys that only record how a model was made are ignored; a value that changes what the tensors mean and is not known is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from quant.errors import CheckpointError
from quant.rules import DENSE, MXFP4, Rule, Settings, WeightScheme

AWQ_VERSIONS = {
    "gemm": "awq-gemm", "exllama": "awq-gemm", "exllamav2": "awq-gemm", "ipex": "awq-gemm",
    "gemv": "awq-gemv", "gemv_fast": "awq-gemv-fast", "llm-awq": "awq-gemv-fast",
}  # fmt: skip
CT_FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "mixed-precision", "dense")


def parse(config: Mapping[str, Any], source: str) -> Settings:
    """The settings of one quantization config; CheckpointError names what is not known, and what would be."""
    method = str(config.get("quant_method") or config.get("method") or "").lower()
    if not method:  # files from before the key existed
        awq = "zero_point" in config or "w_bit" in config or str(config.get("version", "")).lower() in AWQ_VERSIONS
        method = "compressed-tensors" if "config_groups" in config else "awq" if awq else "gptq"
    if method == "gptq" and str(config.get("checkpoint_format", "")).lower() in AWQ_VERSIONS:
        method = "awq"  # AWQ weights as AutoGPTQ saves them
    if method == "awq":
        return _awq(config, source)
    if method == "gptq":
        return _gptq(config, source)
    if method in ("compressed-tensors", "compressed_tensors"):
        return _compressed_tensors(config, source)
    if method in ("fp8", "fbgemm_fp8"):
        return _fp8(config, source, method)
    if method == "mxfp4":
        names = _names(source, config, "modules_to_not_convert")
        rules = [Rule("regex", _regex(source, "modules_to_not_convert", name), DENSE) for name in names]
        return Settings("mxfp4", tuple(rules), MXFP4, source)
    raise CheckpointError(f"{source}: quant_method {method!r} is not supported; awq, gptq, compressed-tensors, fp8 and mxfp4 are")


def _choice(source: str, key: str, value: Any, known: Mapping[str, Any] | tuple[Any, ...]) -> Any:
    if value not in known:
        raise CheckpointError(f"{source}: {key} {value!r} is not supported; one of {', '.join(map(str, known))} is")
    return value


def _integer(source: str, config: Mapping[str, Any], keys: tuple[str, ...], default: int | None) -> int:
    for key in keys:
        if config.get(key) is not None:
            value = config[key]
            if isinstance(value, bool) or not re.fullmatch(r"-?\d+", str(value)):
                raise CheckpointError(f"{source}: {key} is {value!r}, expected a whole number")
            return int(value)
    if default is None:
        raise CheckpointError(f"{source}: {keys[0]} is missing")
    return default


def _group(source: str, config: Mapping[str, Any], keys: tuple[str, ...], default: int) -> int:
    size = _integer(source, config, keys, default)
    if size == 0 or size < -1:
        raise CheckpointError(
            f"{source}: {keys[0]} {size} is not a group size; a positive number is, or -1 for one group per output"
        )
    return size


def _names(source: str, config: Mapping[str, Any], key: str) -> list[str]:
    names = config.get(key) or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"{source}: {key} is {names!r}, expected a list of module names")
    return names


def _regex(source: str, key: str, pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise CheckpointError(f"{source}: {key} has {pattern!r}, which is not a regular expression ({error})") from None
    return pattern


def _awq(config: Mapping[str, Any], source: str) -> Settings:
    """AutoAWQ; also its early quant_config.json (w_bit, q_group_size) and GPTQModel's AWQ (format, sym)."""
    bits = _choice(source, "bits", _integer(source, config, ("bits", "w_bit"), 4), (4,))
    version = "llm-awq" if config.get("backend") == "llm-awq" else config.get("version") or config.get("format") or "gemm"
    if str(version).lower() == "gptq":  # GPTQModel's default, which says nothing about AWQ
        version = config.get("checkpoint_format") or "gemm"
    layout = AWQ_VERSIONS[_choice(source, "version", str(version).lower(), AWQ_VERSIONS)]
    zero_point = config.get("zero_point", not config.get("sym", False))
    default = WeightScheme(layout, bits, _group(source, config, ("group_size", "q_group_size"), 128), symmetric=not zero_point)
    rules = [Rule("part", name, DENSE) for name in _names(source, config, "modules_to_not_convert")]
    return Settings("awq", tuple(rules), default, source)


def _gptq(config: Mapping[str, Any], source: str) -> Settings:
    """AutoGPTQ, GPTQModel, GPTQ-for-LLaMa. ``dynamic`` overrides single modules; its first matching pattern decides."""
    default = _gptq_scheme(config, source)
    rules = [Rule("part", name, DENSE) for name in _names(source, config, "modules_to_not_convert")]
    dynamic = config.get("dynamic") or {}
    if not isinstance(dynamic, Mapping):
        raise CheckpointError(f"{source}: dynamic is {dynamic!r}, expected an object of patterns")
    for key, overrides in dynamic.items():
        pattern = _regex(source, "dynamic", key[2:] if key[:2] in ("+:", "-:") else key)
        merged = {**config, **(overrides or {})}
        scheme = DENSE if key.startswith("-:") else _gptq_scheme(merged, f"{source}, dynamic {key!r}")
        rules.append(Rule("regex", pattern, scheme))
    if config.get("lm_head"):
        rules += [Rule("regex", r"(.*\.)?lm_head$", default)]
    return Settings("gptq", tuple(rules), default, source)


def _gptq_scheme(config: Mapping[str, Any], source: str) -> WeightScheme:
    bits = _choice(source, "bits", _integer(source, config, ("bits", "w_bit", "wbits"), None), (2, 3, 4, 5, 6, 7, 8))
    stored = str(config.get("checkpoint_format") or config.get("format") or "gptq").lower()
    if config.get("is_marlin_format"):
        stored = "marlin"
    _choice(source, "checkpoint_format", stored, ("gptq", "gptq_v2", "gptq_p"))
    if config.get("rotation"):
        raise CheckpointError(
            f"{source}: rotation {config['rotation']!r} is not supported: it needs activations rotated at run time"
        )
    pack = str(config.get("pack_dtype") or "int32").removeprefix("torch.")
    _choice(source, "pack_dtype", pack, ("int32",) if bits not in (2, 4, 8) else ("int32", "int8", "int16", "int64"))
    meta = config.get("meta")
    quantizer = str(meta.get("quantizer", "")) if isinstance(meta, Mapping) else ""
    return WeightScheme(
        "gptq",
        bits,
        _group(source, config, ("group_size", "groupsize"), -1),
        symmetric=bool(config.get("sym", True)),
        act_order=bool(config.get("desc_act", False)),
        zero_offset=int(stored == "gptq"),
        zero_borrow="gptqmodel" in quantizer.lower() and bits in (2, 4, 8),
        planar=stored == "gptq_p" or bits in (5, 6, 7),
    )


def _compressed_tensors(config: Mapping[str, Any], source: str) -> Settings:
    """compressed-tensors: ``ignore`` first, then targets from the most exact kind to the least: name, regex, class."""
    stored = str(config.get("format") or "dense")
    if stored == "fakequant":
        stored = "dense"
    _choice(source, "format", stored, CT_FORMATS)
    transform = config.get("transform_config") or {}
    if isinstance(transform, Mapping) and transform.get("config_groups"):
        raise CheckpointError(f"{source}: transform_config is not supported: it needs activations rotated at run time")
    sparsity = (config.get("sparsity_config") or {}).get("format", "dense")
    _choice(source, "sparsity_config format", sparsity, ("dense",))
    rules = [_target(source, "ignore", name, DENSE) for name in _names(source, config, "ignore")]
    groups = config.get("config_groups")
    if not isinstance(groups, Mapping):
        raise CheckpointError(f"{source}: config_groups is {groups!r}, expected an object of groups")
    targets: list[Rule] = []
    for name, group in groups.items():
        if not isinstance(group, Mapping):
            raise CheckpointError(f"{source}: group {name!r} is {group!r}; presets must be written out as weights and targets")
        scheme = _ct_scheme(group, stored, f"{source}, {name}")
        targets += [_target(source, "targets", target, scheme) for target in _names(source, group, "targets")]
    order = ("name", "regex", "class")
    return Settings("compressed-tensors", (*rules, *sorted(targets, key=lambda rule: order.index(rule.kind))), DENSE, source)


def _target(source: str, key: str, target: str, scheme: WeightScheme) -> Rule:
    if target.startswith("re:"):
        return Rule("regex", _regex(source, key, target[3:]), scheme)
    return Rule("class" if target[:1].isupper() and "." not in target else "name", target, scheme)


def _ct_scheme(group: Mapping[str, Any], stored: str, source: str) -> WeightScheme:
    weights = group.get("weights")
    stored = str(group.get("format") or stored)
    _choice(source, "format", stored, CT_FORMATS)
    if weights is None or stored == "dense":
        return DENSE
    kind = _choice(source, "weights.type", str(weights.get("type", "int")).lower(), ("int", "float"))
    bits = _choice(source, "weights.num_bits", weights.get("num_bits", 8), (8,) if kind == "float" else (2, 3, 4, 5, 6, 7, 8))
    if weights.get("dynamic"):
        raise CheckpointError(
            f"{source}: weights.dynamic {weights['dynamic']!r} is not supported; weights are quantized beforehand"
        )
    size = weights.get("group_size")
    implied = "tensor" if size is None else "channel" if size == -1 else "group"
    strategy = str(weights.get("strategy") or implied).lower()
    _choice(source, "weights.strategy", strategy, ("tensor", "channel", "group", "block"))
    order = _choice(
        source, "weights.actorder", weights.get("actorder"), (None, False, True, "weight", "static", "group", "dynamic")
    )
    activation = _ct_activation(group.get("input_activations"), source)
    layout = {"naive-quantized": f"{kind}-quantized", "mixed-precision": ""}.get(stored, stored)
    if not layout:  # as compressed-tensors infers it
        layout = "float-quantized" if kind == "float" else "int-quantized" if activation == "int8-token" else "pack-quantized"
    if (layout == "float-quantized") != (kind == "float"):
        raise CheckpointError(f"{source}: format {stored!r} does not hold weights of type {kind!r}")
    block = None
    if strategy == "block":
        block = _block(source, "weights.block_structure", weights.get("block_structure"))
    return WeightScheme(
        layout,
        bits,
        block[1] if block else _group(source, weights, ("group_size",), -1) if strategy == "group" else -1,
        symmetric=bool(weights.get("symmetric", True)),
        act_order=order in (True, "group", "dynamic"),
        activation=None if block else activation,
        block=block,
    )


def _ct_activation(args: Mapping[str, Any] | None, source: str) -> str | None:
    """The 8-bit kinds by name; other run-time roundings (4 bits, groups) are left out, which only adds precision."""
    if args is None:
        return None
    kind = _choice(source, "input_activations.type", str(args.get("type", "int")).lower(), ("int", "float"))
    strategy = str(args.get("strategy") or "tensor").lower()
    _choice(source, "input_activations.strategy", strategy, ("token", "tensor", "group", "tensor_group", "channel"))
    if args.get("num_bits", 8) != 8 or strategy not in ("token", "tensor"):
        return None
    return f"{'fp8' if kind == 'float' else 'int8'}-{'token' if args.get('dynamic') else 'tensor'}"


def _block(source: str, key: str, value: Any) -> tuple[int, int]:
    if isinstance(value, str):
        value = value.split("x")
    if not isinstance(value, list) or len(value) != 2 or not all(str(n).isdigit() and int(n) > 0 for n in value):
        raise CheckpointError(f"{source}: {key} is {value!r}, expected two positive numbers such as [128, 128]")
    return int(value[0]), int(value[1])


def _fp8(config: Mapping[str, Any], source: str, method: str) -> Settings:
    """FP8 as DeepSeek and Qwen publish it (scales per block), AutoFP8 (one per weight) and fbgemm (one per output)."""
    _choice(source, "fmt", str(config.get("fmt") or "e4m3").lower(), ("e4m3", "float8_e4m3fn"))
    scheme = _choice(source, "activation_scheme", config.get("activation_scheme") or "dynamic", ("dynamic", "static"))
    activation = "fp8-token" if scheme == "dynamic" else "fp8-tensor"
    default = WeightScheme("float-quantized", 8, activation=activation)
    if config.get("weight_block_size") is not None:
        block = _block(source, "weight_block_size", config["weight_block_size"])
        # Activations are rounded per 128 inputs there; leaving them alone is closer to the original model.
        default = replace(default, layout="fp8-block", group_size=block[1], activation=None, block=block)
    names = [name for key in ("modules_to_not_convert", "ignored_layers") for name in _names(source, config, key)]
    rules = [
        Rule("regex", _regex(source, "ignored_layers", n[3:]), DENSE) if n.startswith("re:") else Rule("part", n, DENSE)
        for n in names
    ]
    return Settings("fp8", tuple(rules), default, f"{source}, {method}")
