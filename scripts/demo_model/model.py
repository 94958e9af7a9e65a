"""A small Llama in plain torch, with weights that can be rounded to 4 bits while they are trained."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quant.algorithms.grid import Grid

GRID = Grid(bits=4, group_size=64, symmetric=False)
"""What weights are rounded to: as `appliance quantize --method rtn --group-size 64` does, which so makes what was trained."""


@dataclass(frozen=True)
class Shape:
    vocab: int
    hidden: int = 192
    layers: int = 4
    heads: int = 6
    kv_heads: int = 3
    inner: int = 512
    max_len: int = 512
    theta: float = 10000.0
    eps: float = 1e-5

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads


class Linear(nn.Linear):
    """Without bias; with ``rounded`` on, the forward pass uses the 4-bit weight and the gradient passes straight through."""

    rounded = False

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if not Linear.rounded:
            return F.linear(x, self.weight)
        with torch.no_grad():
            error = GRID.rounded(self.weight) - self.weight
        return F.linear(x, self.weight + error)


class Layer(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape, kv = shape, shape.kv_heads * shape.head_dim
        self.input_layernorm = nn.RMSNorm(shape.hidden, eps=shape.eps)
        self.post_attention_layernorm = nn.RMSNorm(shape.hidden, eps=shape.eps)
        self.q_proj, self.k_proj, self.v_proj = (Linear(shape.hidden, n) for n in (shape.hidden, kv, kv))
        self.o_proj = Linear(shape.hidden, shape.hidden)
        self.gate_proj, self.up_proj = Linear(shape.hidden, shape.inner), Linear(shape.hidden, shape.inner)
        self.down_proj = Linear(shape.inner, shape.hidden)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        h = self.input_layernorm(x)
        q, k, v = (p(h).unflatten(-1, (-1, self.shape.head_dim)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        out = F.scaled_dot_product_attention(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), is_causal=True)
        x = x + self.o_proj(out.transpose(1, 2).flatten(2))
        h = self.post_attention_layernorm(x)
        return x + self.down_proj(F.silu(self.gate_proj(h)) * self.up_proj(h))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


class Llama(nn.Module):
    """Token ids [B, T] -> the final hidden states [B, T, hidden]; the head is the embedding."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        assert shape.heads == 2 * shape.kv_heads
        self.shape = shape
        self.embed_tokens = nn.Embedding(shape.vocab, shape.hidden)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.hidden, eps=shape.eps)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.03)

    def forward(self, ids: Tensor) -> Tensor:
        half = torch.arange(0, self.shape.head_dim, 2) / self.shape.head_dim
        angles = torch.outer(torch.arange(ids.shape[1]).float(), 1.0 / self.shape.theta**half)
        cos, sin = angles.cos(), angles.sin()
        x = self.embed_tokens(ids)
        for layer in self.layers:
            x = layer(x, cos, sin)
        return self.norm(x)

    def loss(self, ids: Tensor, wanted: Tensor) -> Tensor:
        """Mean cross entropy of the tokens that ``wanted`` [B, T] (bool) marks, each predicted from those before it."""
        hidden = self(ids)[:, :-1][wanted[:, 1:]]
        return F.cross_entropy(F.linear(hidden, self.embed_tokens.weight).float(), ids[:, 1:][wanted[:, 1:]])
