"""What the tensors themselves tell about their quantization (names, dtypes and shapes; no torch, no weight read)."""

from __future__ import annotations

import math
from collections.abc import Mapping

from quant.errors import CheckpointError
from quant.headers import CheckpointIndex, TensorInfo
from quant.rules import DENSE, MXFP4, NVFP4, Settings, WeightScheme


def awq_layout(name: str, tensors: Mapping[str, TensorInfo]) -> str | None:
    """Which of AutoAWQ's packings a module has, by the shapes of its qweight and scales; None: none of them."""
    qweight, scales = tensors[f"{name}.qweight"], tensors.get(f"{name}.scales")
    if scales is None or len(qweight.shape) != 2 or len(scales.shape) != 2:
        return None
    if qweight.dtype == "I16" and qweight.shape[0] * 4 == scales.shape[1]:
        return "awq-gemv-fast"
    if qweight.dtype == "I32" and qweight.shape[1] * 8 == scales.shape[1]:
        return "awq-gemm"
    if qweight.dtype == "I32" and qweight.shape[0] == scales.shape[0]:
        return "awq-gemv"
    return None


def family(index: CheckpointIndex) -> tuple[str, str] | None:
    """(awq or gptq, the evidence) from the first packed module; None where there is none, or where it fits neither or both."""
    tensors = index.tensors
    for name, qweight in tensors.items():
        if not name.endswith(".qweight") or len(qweight.shape) != 2:
            continue
        module = name.removesuffix(".qweight")
        scales = tensors.get(f"{module}.scales")
        evidence = f"{name} {qweight} beside scales {scales}"
        if f"{module}.g_idx" in tensors:
            return "gptq", f"{evidence} and a g_idx"
        if scales is not None and scales.shape == qweight.shape:
            return None  # GPTQ in groups of one word, or AWQ's gemv with as many padded groups as words: the config must tell
        if scales is not None and len(scales.shape) == 2 and scales.shape[1] == qweight.shape[1]:
            return "gptq", evidence
        return ("awq", evidence) if awq_layout(module, tensors) else None
    return None


def detect(index: CheckpointIndex) -> Settings:
    """The settings of a checkpoint without a quantization config."""
    found = family(index)
    if found is None:
        return _without_words(index)
    method, evidence = found
    source = f"seen from the tensors: {evidence}"
    module = next(name for name in index.tensors if name.endswith(".qweight")).removesuffix(".qweight")
    scheme = (_awq if method == "awq" else _gptq)(module, index.tensors)
    return Settings(method, (), scheme, source)


def _without_words(index: CheckpointIndex) -> Settings:
    for name, info in index.tensors.items():
        if name.endswith(".weight_scale_inv"):
            scheme = WeightScheme("fp8-block", 8, 128, block=(128, 128))
            return Settings("fp8", (), scheme, f"seen from the tensors: {name} {info}")
        if name.endswith(".blocks") and info.dtype == "U8":
            return Settings("mxfp4", (), MXFP4, f"seen from the tensors: {name} {info}")
        if name.endswith(".weight_scale") and f"{name}_2" in index.tensors:
            return Settings("modelopt", (), NVFP4, f"seen from the tensors: {name} {info} beside {name}_2")
        if name.endswith((".weight_packed", ".weight_scale", ".qweight")):
            raise CheckpointError(
                f"{name} {info} is quantized, but config.json has no quantization_config to say how; "
                "take config.json from the model's publisher"
            )
    return Settings("none", (), DENSE, "config.json has no quantization_config and the tensors are not quantized")


def _awq(module: str, tensors: Mapping[str, TensorInfo]) -> WeightScheme:
    layout = awq_layout(module, tensors)
    if layout != "awq-gemm":  # the padded scales of the others hide the group size
        raise CheckpointError(f"{module}: AWQ weights of the {layout} packing need a quantization_config with their group_size")
    inputs, groups = tensors[f"{module}.qweight"].shape[0], tensors[f"{module}.scales"].shape[0]
    size = math.ceil(inputs / groups) if groups > 1 else -1
    return WeightScheme(layout, 4, size, symmetric=f"{module}.qzeros" not in tensors)


def _gptq(module: str, tensors: Mapping[str, TensorInfo]) -> WeightScheme:
    """bits from qzeros [G, N * bits / 32] or from g_idx [K]; the v1 zero points of nearly every published checkpoint."""
    rows, outputs = tensors[f"{module}.qweight"].shape
    qzeros, g_idx = tensors.get(f"{module}.qzeros"), tensors.get(f"{module}.g_idx")
    if qzeros is not None and len(qzeros.shape) == 2 and outputs:
        bits = round(qzeros.shape[1] * 32 / outputs)
    elif g_idx is not None and g_idx.numel:
        bits = round(rows * 32 / g_idx.numel)
    else:
        raise CheckpointError(
            f"{module}: neither qzeros nor g_idx tells the bits of this GPTQ weight; a quantize_config.json would"
        )
    if bits not in (2, 3, 4, 8):
        raise CheckpointError(f"{module}: {bits}-bit GPTQ needs a quantize_config.json that says how it is packed")
    inputs = g_idx.numel if g_idx is not None else rows * 32 // bits
    groups = tensors[f"{module}.scales"].shape[0]
    size = math.ceil(inputs / groups) if groups > 1 else -1
    return WeightScheme("gptq", bits, size, symmetric=qzeros is None, act_order=g_idx is not None, zero_offset=1)
