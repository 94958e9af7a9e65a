"""To which products of a model LoRA adapters may be added. No torch."""

from __future__ import annotations

from models.module import ModuleShape
from models.spec import ModelSpec
from quant.errors import InputError

GROUPS = {  # products by what is added to them at once: what the modules are called, in their order
    "qkv": ("self_attn.qkv_proj", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_up_proj", "mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}


def check_adaptable(spec: ModelSpec) -> None:
    """Raise InputError where the products of a model are not those that adapters are added to."""
    if spec.latent is not None or spec.recurrent is not None:
        what = "attention over latents" if spec.latent is not None else "layers that keep states"
        raise InputError(f"LoRA adapters are not supported for {spec.architecture}, which has {what}: merge the adapter into it")


def adaptable(spec: ModelSpec, layer: int) -> dict[str, list[ModuleShape]]:
    """Modules of a layer that an adapter may add to, by group: attention's, and those of an MLP that all tokens go through."""
    shapes = {module.name: module for module in spec.layer_modules(layer)}
    return {slot: [shapes[name] for name in names if name in shapes] for slot, names in GROUPS.items()}
