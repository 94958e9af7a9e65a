"""What a decoder is made of, read from config.json alone (no torch), refused by name where it is not known."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RopeSpec:
    """Rotary embedding. ``rotary_dim`` features of each head rotate; the kinds and their parameters are transformers'."""

    kind: str  # default, linear, dynamic, llama3, yarn, longrope
    theta: float
    rotary_dim: int
    max_position: int  # max_position_embeddings
    factor: float = 1.0
    original_max_position: int | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    attention_factor: float | None = None
    truncate: bool = True
    short_factor: tuple[float, ...] | None = None
    long_factor: tuple[float, ...] | None = None


@dataclass(frozen=True)
class ModuleShape:
    """One linear (or embedding) of the checkpoint: weight [N, K], by its published name."""

    name: str
    N: int
    K: int
    part: str  # embedding, attention, mlp, head
    bias: bool


@dataclass(frozen=True)
class ModelSpec:
    """A decoder-only transformer; every flag a supported architecture needs, none it does not."""

    architecture: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    rope: RopeSpec
    eps: float
    tie_embeddings: bool
    max_len: int  # the longest context the model was made for
    dtype: str  # float16, bfloat16 or float32, as published
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    fused_qkv: bool = False  # the checkpoint stores qkv_proj and gate_up_proj
    windows: tuple[int | None, ...] = ()  # sliding window by layer; None sees everything
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
