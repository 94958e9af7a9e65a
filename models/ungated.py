"""The activations of MLPs without a gate, as checkpoints have them."""

from __future__ import annotations

from kernels.activations import XIELU, Activation, relu2
from quant.checkpoint import Checkpoint

FLOATS = ("F16", "BF16", "F32")


def read_activation(checkpoint: Checkpoint, kind: str, layer: str) -> Activation | None:
    """That of a layer, by ModelSpec.ungated; None for gated MLPs. CheckpointError where a tensor of it is missing."""
    if kind != "xielu":
        return relu2 if kind == "relu2" else None
    name = f"{layer}.mlp.act_fn"
    alpha_p, alpha_n = (checkpoint.take(f"{name}.{alpha}", dtypes=FLOATS, shape=(1,)) for alpha in ("alpha_p", "alpha_n"))
    beta, least = (
        checkpoint.take(f"{name}.{key}", dtypes=FLOATS).item() if checkpoint.has(f"{name}.{key}") else default
        for key, default in (("beta", 0.5), ("eps", -1e-6))  # constants of transformers
    )
    return XIELU.of(alpha_p, alpha_n, beta, least)
