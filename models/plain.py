"""One decoder layer over whole sequences, with dense weights and no cache: what quantizing looks into. Driven by ModelSpec."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from models.rope import query_scales
from models.spec import ModelSpec
from quant.checkpoint import Checkpoint
from quant.errors import CheckpointError
from quant.tensor import QuantTensor

FLOATS = ("F16", "BF16", "F32")
INPUTS = {
    "self_attn.qkv_proj": "attention", "self_attn.q_proj": "attention", "self_attn.k_proj": "attention",
    "self_attn.v_proj": "attention", "self_attn.o_proj": "heads",
    "mlp.gate_up_proj": "mlp", "mlp.gate_proj": "mlp", "mlp.up_proj": "mlp", "mlp.down_proj": "inner",
}  # fmt: skip
"""What each linear reads: the norms' outputs, the heads' outputs side by side, and the gated product."""
Watch = Callable[[str, Tensor], None]


def _nobody(name: str, value: Tensor) -> None:
    """Watches nothing."""


def compute_dtype(published: str, device: torch.device) -> torch.dtype:
    """In which to go through the layers of a model that was published in this type.

    On a card its own. On a CPU bfloat16 where it has products of that (four times as fast as float32, and what is lost is far
    below what rounding weights to 8 bits loses), but for models in float32; else float32.
    """
    if device.type != "cpu" or published == "float32":
        return getattr(torch, published)
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if fast else torch.float32


@dataclass
class PlainLayer:
    """``weights`` [N, K] and ``biases`` [N] by module, ``norms`` by name, of any float types; and what all layers share."""

    spec: ModelSpec
    number: int
    cos_sin: Tensor  # float32 [max_len, rotary_dim], of this layer
    weights: dict[str, Tensor] = field(default_factory=dict)
    biases: dict[str, Tensor] = field(default_factory=dict)
    norms: dict[str, Tensor] = field(default_factory=dict)
    compute: torch.dtype = torch.float32  # of the inputs and outputs of linears and attention; what is between layers is wider

    @classmethod
    def read(
        cls,
        checkpoint: Checkpoint,
        spec: ModelSpec,
        number: int,
        cos_sin: Tensor,
        dtype: torch.dtype | None,
        compute: torch.dtype | None = None,
    ) -> PlainLayer:
        """One layer of a checkpoint. Quantized modules are dequantized.

        ``dtype``: in which the tensors are kept; None: weights as published, and the rest in float32. ``compute`` None: the same.
        Raises CheckpointError for what is missing or holds numbers that are not finite.
        """
        layer, prefix = cls(spec, number, cos_sin, compute=compute or dtype or torch.float32), f"model.layers.{number}"
        small = dtype or torch.float32
        for module in spec.layer_modules():
            weight = checkpoint.weight(f"{prefix}.{module.name}", expect=(module.N, module.K))
            dense = weight.dequantize() if isinstance(weight, QuantTensor) else weight
            layer.weights[module.name] = _finite(f"{prefix}.{module.name}", dense.to(dtype or dense.dtype))
            if module.bias:
                bias = checkpoint.take(f"{prefix}.{module.name}.bias", dtypes=FLOATS, shape=(module.N,))
                layer.biases[module.name] = _finite(f"{prefix}.{module.name}.bias", bias.to(small))
        for name, size in spec.small_tensors():
            if name.startswith(f"{prefix}."):
                short = name.removeprefix(f"{prefix}.").removesuffix(".weight")
                layer.norms[short] = _finite(name, checkpoint.take(name, dtypes=FLOATS, shape=(size,)).to(small))
        return layer

    def to(self, device: torch.device) -> PlainLayer:
        """The same on a device."""
        weights, biases, norms = (
            {name: tensor.to(device) for name, tensor in part.items()} for part in (self.weights, self.biases, self.norms)
        )
        return replace(self, cos_sin=self.cos_sin.to(device), weights=weights, biases=biases, norms=norms)

    def full(self, name: str) -> str:
        """A module's name in the checkpoint."""
        return f"model.layers.{self.number}.{name}"

    def forward(self, hidden: Tensor, watch: Watch | None = None) -> Tensor:
        """Hidden states [B, T, hidden] -> the same after this layer, in float32 or as they were. Positions are 0 .. T - 1.

        ``watch`` is told the inputs of linears, by the names of INPUTS, and "keys" [B, heads, T, head size], as they are cached,
        and "values".
        """
        hidden, inner = self.look(hidden, watch)
        return hidden + self._down(inner)

    def look(self, hidden: Tensor, watch: Watch | None = None) -> tuple[Tensor, Tensor]:
        """All but the last product: (what that is added to, what it reads), after ``watch`` is told everything."""
        told = watch or _nobody
        x = self._before(hidden, self.spec.input_norm)
        told("attention", x)
        hidden = hidden + self.attention(x, told)
        x = self._before(hidden, self.spec.norms[1])
        told("mlp", x)
        inner = self._inner(x)
        told("inner", inner)
        return hidden, inner

    def attention(self, x: Tensor, told: Watch = _nobody) -> Tensor:
        """What attention adds [B, T, hidden] for the norm's outputs ``x`` [B, T, hidden]."""
        heads = self._attention(*self._heads(x), told).transpose(1, 2).flatten(2)
        told("heads", heads)
        added = self._linear(heads, "self_attn.o_proj")
        return self._norm(added, self.spec.norms[0]) if self.spec.norms[0] else added

    def mlp(self, x: Tensor) -> Tensor:
        """What the MLP adds [.., hidden] for the norm's outputs ``x`` [.., hidden]."""
        return self._down(self._inner(x))

    def _down(self, inner: Tensor) -> Tensor:
        added = self._linear(inner, "mlp.down_proj")
        return self._norm(added, self.spec.norms[2]) if self.spec.norms[2] else added

    def _inner(self, x: Tensor) -> Tensor:
        if self.spec.ungated:  # others than relu2 are not quantized
            return F.relu(self._linear(x, "mlp.up_proj")).square()
        if self.spec.fused_gate_up:
            gate, up = self._linear(x, "mlp.gate_up_proj").chunk(2, dim=-1)
        else:
            gate, up = self._linear(x, "mlp.gate_proj"), self._linear(x, "mlp.up_proj")
        return (F.gelu(gate, approximate="tanh") if self.spec.gelu else F.silu(gate)) * up

    def _heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [B, heads, T, head size], not yet rotated."""
        spec = self.spec
        if spec.fused_qkv:
            parts = self._linear(x, "self_attn.qkv_proj").split([spec.q_size, spec.kv_size, spec.kv_size], dim=-1)
        else:
            parts = tuple(self._linear(x, f"self_attn.{name}_proj") for name in "qkv")
        if spec.whole_qk_norm:
            parts = *self._qk_normed(parts[0], parts[1]), parts[2]
        q, k, v = (part.unflatten(-1, (-1, spec.head_dim)).transpose(1, 2) for part in parts)
        if spec.qk_norm and not (spec.whole_qk_norm or spec.late_qk_norm):
            q, k = self._qk_normed(q, k)
        return q, k, v

    def _qk_normed(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        names = [f"self_attn.{name}" for name in self.spec.qk_names]
        return self._norm(q, names[0]), self._norm(k, names[1])

    def _attention(self, q: Tensor, k: Tensor, v: Tensor, told: Watch) -> Tensor:
        q, k = self._rotated(q), self._rotated(k)
        if self.spec.late_qk_norm:
            q, k = self._qk_normed(q, k)
        told("keys", k)
        told("values", v)
        spec, length = self.spec, q.shape[2]
        scales = query_scales(spec.rope, torch.arange(length, device=q.device))
        q = q if scales is None else q * scales.to(q.dtype)[:, None]
        window = spec.windows[self.number] if spec.windows else None
        mask = None
        if spec.cap is not None or (window is not None and window < length):
            places = torch.arange(length, device=q.device)
            distance = places.unsqueeze(1) - places
            mask = (distance >= 0) & (distance < (window or length))
        if spec.cap is None or mask is None:
            return F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, scale=spec.scale, enable_gqa=True
            )
        k, v = (x.repeat_interleave(spec.heads // spec.kv_heads, dim=1) for x in (k, v))
        scores = spec.cap * torch.tanh(q @ k.transpose(-1, -2) * (spec.scale / spec.cap))
        return scores.float().masked_fill(~mask, -torch.inf).softmax(-1).to(v.dtype) @ v

    def _rotated(self, x: Tensor) -> Tensor:
        """[B, heads, T, head size]: the first rotary_dim features turned, halves against each other, and then in that order."""
        cos, sin = self.cos_sin[: x.shape[2]].to(x.device).chunk(2, dim=-1)
        half = cos.shape[-1]
        turned, rest = x[..., : 2 * half].float(), x[..., 2 * half :]
        a, b = (turned[..., 0::2], turned[..., 1::2]) if self.spec.interleaved else turned.chunk(2, dim=-1)
        return torch.cat([(a * cos - b * sin).to(x.dtype), (b * cos + a * sin).to(x.dtype), rest], dim=-1)

    def _before(self, x: Tensor, name: str) -> Tensor:
        """What attention or the MLP reads."""
        return self._norm(x, name) if self.spec.pre_norm else x.to(self.compute)

    def _norm(self, x: Tensor, name: str) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.spec.eps)
        return (wide * (self.norms[name] + self.spec.norm_offset)).to(self.compute)

    def _linear(self, x: Tensor, name: str) -> Tensor:
        bias = self.biases.get(name)
        return F.linear(x, self.weights[name].to(self.compute), None if bias is None else bias.to(self.compute))


def embedded(table: Tensor, ids: Tensor, spec: ModelSpec) -> Tensor:
    """Rows of an embedding [V, hidden] for ids [..] -> [.., hidden], scaled, in the model's own type."""
    rows = table[ids].to(getattr(torch, spec.dtype))
    return rows if spec.embedding_scale == 1.0 else rows * embedding_scale(spec, rows.dtype)


def embedding_scale(spec: ModelSpec, dtype: torch.dtype) -> float:
    """What embeddings are multiplied by where activations have this type."""
    return torch.tensor(spec.embedding_scale, dtype=dtype).item() if spec.rounded_scale else spec.embedding_scale


def finite(tensor: Tensor) -> bool:
    """Whether all its values are finite numbers: told by the extremes, without as much memory again."""
    low, high = tensor.aminmax()
    return bool(torch.isfinite(low) & torch.isfinite(high))


def _finite(name: str, tensor: Tensor) -> Tensor:
    if not finite(tensor):
        raise CheckpointError(f"{name}: some of its values are not finite numbers: the checkpoint is damaged")
    return tensor
