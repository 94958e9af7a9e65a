"""Quantization settings of AutoAWQ, AutoGPTQ/GPTQModel, AutoRound, compressed-tensors, FP8 tools, gpt-oss and ModelOpt -> rules.

Keys that only record how a model was made are ignored; a value that changes what the tensors mean and is not known is refused.
No torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from fnmatch import translate
from typing import Any

from quant import compressed, values
from quant.errors import CheckpointError
from quant.rules import DENSE, MXFP4, NVFP4, Rule, Settings, WeightScheme

AWQ_VERSIONS = {
    "gemm": "awq-gemm", "exllama": "awq-gemm", "exllamav2": "awq-gemm", "ipex": "awq-gemm",
    "gemv": "awq-gemv", "gemv_fast": "awq-gemv-fast", "llm-awq": "awq-gemv-fast",
}  # fmt: skip
AUTO_ROUND = {
    "auto_round": ("gptq", 0), "gptqmodel": ("gptq", 0), "exllamav2": ("gptq", 0), "tritonv2": ("gptq", 0), "triton": ("gptq", 0),
    "auto_gptq": ("gptq", 1), "gptq": ("gptq", 1), "auto": ("gptq", 1), "auto_awq": ("awq-gemm", 0), "awq": ("awq-gemm", 0),
}  # fmt: skip
"""AutoRound's packings: the layout, and what is missing from its zero points. Until 0.4 some had the names of kernels."""
MODELOPT = {
    "NVFP4": NVFP4, "W4A16_NVFP4": NVFP4, "FP8": WeightScheme("float-quantized", 8, activation="fp8-tensor"),
    "FP8_PER_CHANNEL_PER_TOKEN": WeightScheme("float-quantized", 8, activation="fp8-token"),
    "FP8_PB_WO": WeightScheme("fp8-block", 8, 128, block=(128, 128)), "MXFP8": WeightScheme("float-quantized", 8, 32),
}  # fmt: skip
WHOLE_NAME = re.compile(r"[\w-]+(\.[\w-]+)*\.\d+(\.[\w-]+)+")  # of a module of a layer: no pattern


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
    if method.removeprefix("intel/").replace("_", "-").partition(":")[0] == "auto-round":
        return _auto_round(config, source)
    if method in ("compressed-tensors", "compressed_tensors"):
        return compressed.parse(config, source)
    if method in ("fp8", "fbgemm_fp8"):
        return _fp8(config, source, method)
    if method == "mxfp4":
        names = values.names(source, config, "modules_to_not_convert")
        rules = [Rule("regex", values.regex(source, "modules_to_not_convert", name), DENSE) for name in names]
        return Settings("mxfp4", tuple(rules), MXFP4, source)
    if method in ("modelopt", "modelopt_fp4"):
        return _modelopt(config, source)
    raise CheckpointError(
        f"{source}: quant_method {method!r} is not supported; "
        "awq, gptq, auto-round, compressed-tensors, fp8, mxfp4 and modelopt are"
    )


def _awq(config: Mapping[str, Any], source: str) -> Settings:
    """AutoAWQ; also its early quant_config.json (w_bit, q_group_size) and GPTQModel's AWQ (format, sym)."""
    bits = values.choice(source, "bits", values.integer(source, config, ("bits", "w_bit"), 4), (4,))
    version = "llm-awq" if config.get("backend") == "llm-awq" else config.get("version") or config.get("format") or "gemm"
    if str(version).lower() == "gptq":  # GPTQModel's default, which says nothing about AWQ
        version = config.get("checkpoint_format") or "gemm"
    layout = AWQ_VERSIONS[values.choice(source, "version", str(version).lower(), AWQ_VERSIONS)]
    zero_point = config.get("zero_point", not config.get("sym", False))
    default = WeightScheme(
        layout, bits, values.group_size(source, config, ("group_size", "q_group_size"), 128), symmetric=not zero_point
    )
    rules = [Rule("part", name, DENSE) for name in values.names(source, config, "modules_to_not_convert")]
    return Settings("awq", tuple(rules), default, source)


def _gptq(config: Mapping[str, Any], source: str) -> Settings:
    """AutoGPTQ, GPTQModel, GPTQ-for-LLaMa. ``dynamic`` overrides single modules; its first matching pattern decides."""
    default = _gptq_scheme(config, source)
    rules = [Rule("part", name, DENSE) for name in values.names(source, config, "modules_to_not_convert")]
    dynamic = config.get("dynamic") or {}
    if not isinstance(dynamic, Mapping):
        raise CheckpointError(f"{source}: dynamic is {dynamic!r}, expected an object of patterns")
    for key, overrides in dynamic.items():
        pattern = values.regex(source, "dynamic", key[2:] if key[:2] in ("+:", "-:") else key)
        merged = {**config, **(overrides or {})}
        scheme = DENSE if key.startswith("-:") else _gptq_scheme(merged, f"{source}, dynamic {key!r}")
        rules.append(Rule("regex", pattern, scheme))
    if config.get("lm_head"):
        rules += [Rule("regex", r"(.*\.)?lm_head$", default)]
    return Settings("gptq", tuple(rules), default, source)


def _gptq_scheme(config: Mapping[str, Any], source: str) -> WeightScheme:
    bits = values.choice(source, "bits", values.integer(source, config, ("bits", "w_bit", "wbits"), None), (2, 3, 4, 5, 6, 7, 8))
    stored = str(config.get("checkpoint_format") or config.get("format") or "gptq").lower()
    if config.get("is_marlin_format"):
        stored = "marlin"
    values.choice(source, "checkpoint_format", stored, ("gptq", "gptq_v2", "gptq_p"))
    if config.get("rotation"):
        raise CheckpointError(
            f"{source}: rotation {config['rotation']!r} is not supported: it needs activations rotated at run time"
        )
    pack = str(config.get("pack_dtype") or "int32").removeprefix("torch.")
    values.choice(source, "pack_dtype", pack, ("int32",) if bits not in (2, 4, 8) else ("int32", "int8", "int16", "int64"))
    meta = config.get("meta")
    quantizer = str(meta.get("quantizer", "")) if isinstance(meta, Mapping) else ""
    return WeightScheme(
        "gptq",
        bits,
        values.group_size(source, config, ("group_size", "groupsize"), -1),
        symmetric=bool(config.get("sym", True)),
        act_order=bool(config.get("desc_act", False)),
        zero_offset=int(stored == "gptq"),
        zero_borrow="gptqmodel" in quantizer.lower() and bits in (2, 4, 8),
        planar=stored == "gptq_p" or bits in (5, 6, 7),
    )


def _auto_round(config: Mapping[str, Any], source: str) -> Settings:
    """AutoRound: tensors as AutoGPTQ, AutoAWQ or FP8 tools lay them out. ``extra_config`` overrides single modules.

    A key of it is a module's name or, as AutoRound reads it, a pattern found anywhere in names; names go before patterns.
    """
    default = _auto_round_scheme(config, source)
    extra = config.get("extra_config") or {}
    if not isinstance(extra, Mapping) or not all(isinstance(given, Mapping) for given in extra.values()):
        raise CheckpointError(f"{source}: extra_config is {extra!r:.80}, expected an object of objects")
    names: dict[WeightScheme, list[str]] = {}
    patterns = []
    for key, given in extra.items():
        where = f"{source}, extra_config {key!r}"
        merged = {**config, **{name: value for name, value in given.items() if value is not None}}
        scheme = DENSE if values.integer(where, merged, ("bits",), None) >= 16 else _auto_round_scheme(merged, where)
        names.setdefault(scheme, []).append(re.escape(key))
        if not WHOLE_NAME.fullmatch(key):
            patterns.append(Rule("regex", values.regex(source, "extra_config", f".*(?:{key})"), scheme))
    # One rule for all names of a scheme: there are hundreds where every norm is named.
    rules = [Rule("regex", f"(?:{'|'.join(same)})$", scheme) for scheme, same in names.items()]
    return Settings("auto-round", (*rules, *patterns), default, source)


def _auto_round_scheme(config: Mapping[str, Any], source: str) -> WeightScheme:
    kind = str(config.get("data_type") or "int")
    weights_alone = values.integer(source, config, ("act_bits",), 16) >= 16
    if kind not in ("int", "fp") or (kind == "int" and not weights_alone):
        raise CheckpointError(
            f"{source}: data_type {kind!r} with act_bits {config.get('act_bits', 16)} is not supported; 'int' with act_bits 16 "
            "is, and 'fp' of 8 bits: AutoRound's schemes W2A16 to W8A16, FPW8A16, FP8_STATIC and FP8_BLOCK"
        )
    for key in ("rotation_config", "spinquant_config"):
        if config.get(key):
            raise CheckpointError(f"{source}: {key} is not supported: it needs activations rotated at run time")
    if kind == "fp":
        values.choice(source, "bits", values.integer(source, config, ("bits",), None), (8,))
        scheme = _fp8(config, source, "auto-round").default
        return replace(scheme, activation=None) if weights_alone else scheme
    stored = str(config.get("packing_format") or config.get("backend") or "auto").lower()  # the latter until 0.4
    packing = stored.removeprefix("auto_round:").partition(":")[0]
    if packing not in AUTO_ROUND or "marlin" in stored:
        known = ", ".join(("auto_round", *(f"auto_round:{name}" for name in ("gptqmodel", "auto_gptq", "auto_awq"))))
        raise CheckpointError(f"{source}: packing_format {stored!r} is not supported; one of {known} is")
    layout, offset = AUTO_ROUND[packing]
    bits = values.choice(
        source, "bits", values.integer(source, config, ("bits",), None), (2, 3, 4, 5, 6, 7, 8) if layout == "gptq" else (4,)
    )
    return WeightScheme(
        layout,
        bits,
        values.group_size(source, config, ("group_size",), 128),
        symmetric=bool(config.get("sym", True)),
        zero_offset=offset,
        zero_borrow=offset == 1 and bits in (2, 4, 8),
    )


def _fp8(config: Mapping[str, Any], source: str, method: str) -> Settings:
    """FP8 as DeepSeek and Qwen publish it (scales per block), AutoFP8 (one per weight) and fbgemm (one per output)."""
    values.choice(source, "fmt", str(config.get("fmt") or "e4m3").lower(), ("e4m3", "float8_e4m3fn"))
    scheme = values.choice(source, "activation_scheme", config.get("activation_scheme") or "dynamic", ("dynamic", "static"))
    activation = "fp8-token" if scheme == "dynamic" else "fp8-tensor"
    default = WeightScheme("float-quantized", 8, activation=activation)
    if config.get("weight_block_size") is not None:
        block = values.block(source, "weight_block_size", config["weight_block_size"])
        # Activations are rounded per 128 inputs there; leaving them alone is closer to the original model.
        default = replace(default, layout="fp8-block", group_size=block[1], activation=None, block=block)
    names = [name for key in ("modules_to_not_convert", "ignored_layers") for name in values.names(source, config, key)]
    rules = [
        Rule("regex", values.regex(source, "ignored_layers", n[3:]), DENSE) if n.startswith("re:") else Rule("part", n, DENSE)
        for n in names
    ]
    return Settings("fp8", tuple(rules), default, f"{source}, {method}")


def _modelopt(config: Mapping[str, Any], source: str) -> Settings:
    """NVIDIA's ModelOpt, in config.json or in hf_quant_config.json, which name the same differently. Its lists are of globs.

    Activations that are rounded to 4 bits there are left as they are, which only adds precision.
    """
    scheme = MODELOPT[values.choice(source, "quant_algo", str(config.get("quant_algo") or "none").upper(), MODELOPT)]
    if scheme.block is None and scheme.group_size > 0:
        values.choice(source, "group_size", config.get("group_size") or scheme.group_size, (scheme.group_size,))
    names = [name for key in ("ignore", "exclude_modules") for name in values.names(source, config, key)]
    return Settings("modelopt", tuple(Rule("regex", translate(name), DENSE) for name in names), scheme, source)
