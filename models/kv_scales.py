"""Scales of a quantized KV cache that a checkpoint brings, under the names that its tools gave them."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from kernels.kv_cache import LARGEST
from quant.checkpoint import Checkpoint
from quant.errors import CheckpointError

log = logging.getLogger("appliance.loader")

# Of "k" or "v", in self_attn: llm-compressor and vLLM; the same from inside of vLLM; ModelOpt; a fused projection; older
# compressed-tensors; AutoFP8, one for both.
NAMES = ("{0}_scale", "attn.{0}_scale", "{0}_proj.{0}_scale", "qkv_proj.{0}_scale", "{0}_proj.output_scale", "kv_scale")


def read_largest(checkpoint: Checkpoint, attention: str, kv_heads: int) -> tuple[float, float] | None:
    """The largest magnitudes of keys and of values that the scales of one layer (``model.layers.0.self_attn``) are made for.

    A scale is worth 448 (the largest of e4m3), 127 where ``kv_cache_scheme`` says integers, or 6 * 448 where ModelOpt says NVFP4.
    None where there are no scales, or such as a cache here cannot have: one for each head, or with zero points. CheckpointError
    names one that is not a positive number or has another shape, and one whose counterpart is missing.
    """
    key, value = (_find(checkpoint, attention, part) for part in "kv")
    if key is None and value is None:
        return None
    if key is None or value is None:
        raise CheckpointError(
            f"{key or value}: a scale of the KV cache, but {attention} has none of the {'keys' if key is None else 'values'}"
        )
    scales = [scale for name in (key, value) if (scale := _read(checkpoint, name, kv_heads)) is not None]
    if len(scales) < 2:
        return None
    largest = _largest_code(checkpoint.config)
    return scales[0] * largest, scales[1] * largest


def _find(checkpoint: Checkpoint, attention: str, part: str) -> str | None:
    found = (f"{attention}.{name.format(part)}" for name in NAMES)
    return next((name for name in found if checkpoint.has(name)), None)


def _read(checkpoint: Checkpoint, name: str, kv_heads: int) -> float | None:
    scale = checkpoint.take(name, dtypes=("F32", "BF16", "F16")).float()
    if scale.numel() not in (1, kv_heads):
        raise CheckpointError(
            f"{name}: found {list(scale.shape)}, expected one scale of the KV cache, or {kv_heads}, one for each head"
        )
    if not bool((scale.isfinite() & (scale > 0)).all()):
        raise CheckpointError(f"{name}: found {scale.flatten()[:4].tolist()}, scales of a KV cache are positive numbers")
    zeros = f"{name.removesuffix('scale')}zero_point"
    if scale.numel() > 1:
        log.warning("%s is not used: it has a scale for each head. The cache computes its own, for each token and head", name)
    elif checkpoint.has(zeros) and bool(checkpoint.tensor(zeros).float().any()):
        log.warning("%s is not used: it comes with a zero point. The cache computes scales of its own", name)
    else:
        return scale.item()
    return None


def _largest_code(config: Mapping[str, Any]) -> float:
    section = config.get("quantization_config") or config.get("compression_config")
    scheme = section.get("kv_cache_scheme") or section.get("kv_cache_quant_algo") if isinstance(section, Mapping) else None
    if scheme == "NVFP4":  # ModelOpt's scale for those of groups
        return 6 * LARGEST["fp8_e4m3"]
    if not isinstance(scheme, Mapping) or scheme.get("type", "float") == "float":
        return LARGEST["fp8_e4m3"]
    if (scheme.get("type"), scheme.get("num_bits")) != ("int", 8):
        raise CheckpointError(f"kv_cache_scheme: found {dict(scheme)}, expected 8 bits of type float or int")
    return LARGEST["int8"]
