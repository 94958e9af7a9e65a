"""What cached keys and values take. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from kernels.layout import kv_nbytes


@dataclass(frozen=True)
class KVSpec:
    """Shape of the cached keys and values."""

    layers: int
    kv_heads: int
    head_dim: int
    block_size: int
    dtype: str  # of the cache: that of the activations, or a quantized one (kernels.layout.SCALED_CACHES)
    shapes: tuple[tuple[int, int], ...] = ()  # (kv_heads, head_dim) by layer, where not all have these
    values: bool = True  # False: they are the keys

    @property
    def by_layer(self) -> tuple[tuple[int, int], ...]:
        """(heads, their size) of each layer."""
        return self.shapes or ((self.kv_heads, self.head_dim),) * self.layers

    @property
    def token_bytes(self) -> int:
        """Keys and values of one token in all layers."""
        return (2 if self.values else 1) * sum(heads * kv_nbytes(self.dtype, size) for heads, size in self.by_layer)

    @property
    def block_bytes(self) -> int:
        return self.token_bytes * self.block_size

    def blocks(self, tokens: int) -> int:
        return -(-tokens // self.block_size)
