"""Which models the kernels for cards know, told before anything is loaded. Headers only, no torch."""

from __future__ import annotations

from appliance.memory.modules import Loaded, Machinery, ends, layer_weights, parents
from models.spec import ModelSpec
from quant.errors import InputError
from quant.scheme import QuantScheme


def check_experts(spec: ModelSpec, scheme: QuantScheme, machinery: Machinery, model: str) -> None:
    """InputError naming the first weight of an expert that cannot lie among the others' (kernels/triton/experts.py).

    Before that for short convolutions, and sinks: with these come biases of experts, and gates that are clamped, which are not
    known either (gpt-oss). And for experts that are chosen by groups, and 4-bit floats, wherever they are.
    """
    if spec.conv is not None:
        raise InputError(f"{model}: cards have no kernel for short convolutions ({spec.architecture}): --device cpu serves it")
    if spec.sinks:
        raise InputError(f"{model}: cards have no kernel for attention with sinks ({spec.architecture}): --device cpu serves it")
    if spec.mixture is not None and spec.mixture.scores.groups > 1:
        raise InputError(f"{model}: cards have no kernel for experts in groups (n_group): --device cpu serves it")
    weights = [*(one for parent in parents(spec, scheme) for one in parent.joined), ends(spec, scheme, machinery).head]
    if floats := next((one for one in weights if one.kind == "fp4"), None):
        raise InputError(
            f"{model}: {floats.module.name}: cards have no kernel for 4-bit floats ({floats.stored.layout.upper()}): "
            "--device cpu serves them; of its other versions, AWQ, GPTQ and FP8 run on cards"
        )
    kinds = [parent.joined for parent in parents(spec, scheme) if parent.joined[0].module.part == "experts"]
    first: dict[tuple[str, str], Loaded] = {}
    for one in kinds[0] if len(kinds) == 1 else layer_weights(spec, scheme) if kinds else ():
        if one.module.part != "experts":
            continue
        if machinery.dtype == "float32":
            raise InputError(
                f"{model}: cards have no kernel for experts in float32: --dtype float16 or bfloat16, or --device cpu"
            )
        mixture = one.parent.rpartition(".")[0]
        if why := _wrong(one, first.setdefault((mixture, one.slot), one)):
            raise InputError(f"{model}: {one.module.name} {why}: cards have no kernel for such experts, --device cpu serves them")


def _wrong(one: Loaded, first: Loaded) -> str:
    """What keeps it from a card; ``first``: the same of the first expert."""
    if one.slot == "gate_up" and not one.gated:
        return "and its other half (gate, up) are stored in different ways"
    if one.stored.act_order:
        return "has its inputs in an order of its own (act-order)"
    if one.stored.activation == "int8-token":
        return "asks for activations in int8"
    if _form(one) != _form(first):
        return f"is stored in another way than {first.module.name}"
    return ""


def _form(one: Loaded) -> tuple[str, bool, int, int]:
    return one.kind, one.stored.bits <= 4, one.group_size, one.scale_bytes
