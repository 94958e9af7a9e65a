"""Small unsigned fields inside bytes: unpacking what packers wrote, and the nibble form that this project keeps.

All multi-byte words are little endian, as safetensors stores them and as every supported machine reads them.
"""

from __future__ import annotations

import torch
from torch import Tensor

PLANES = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,)}  # widths of the bit planes, low plane first


def as_bytes(words: Tensor) -> Tensor:
    """Integer words [R, W] of B bytes -> uint8 [R, W * B]."""
    # By way of one dimension: torch wants a unit stride even where the width is 1.
    return words.contiguous().reshape(-1).view(torch.uint8).view(words.shape[0], words.shape[1] * words.element_size())


def unpack_stream(words: Tensor, bits: int, count: int) -> Tensor:
    """Integer words [R, W] holding a dense little-endian stream of ``bits``-wide fields per row -> uint8 [R, count].

    Field i is the bits i * bits .. i * bits + bits - 1 of the row, so 3-bit fields may straddle words.
    """
    data = as_bytes(words)
    if bits == 8:
        return data[:, :count]
    if bits in (2, 4):
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
        fields = data.unsqueeze(-1).bitwise_right_shift(shifts).bitwise_and_((1 << bits) - 1)
        return fields.view(data.shape[0], -1)[:, :count]
    position = torch.arange(count) * bits
    byte, shift = position // 8, (position % 8).to(torch.int16)
    padded = torch.nn.functional.pad(data, (0, 1)).to(torch.int16)
    pair = padded[:, byte] | (padded[:, byte + 1] << 8)
    # The sign that an int16 shift drags in stays above the field: shift + bits <= 15.
    return ((pair >> shift) & ((1 << bits) - 1)).to(torch.uint8)


def unpack_words(words: Tensor, bits: int, count: int) -> Tensor:
    """int32 words [R, W] with 32 // bits whole fields each and the remaining bits unused -> uint8 [R, count]."""
    per_word = 32 // bits
    shifts = torch.arange(per_word, dtype=torch.int32) * bits
    fields = (words.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)
    return fields.to(torch.uint8).view(words.shape[0], -1)[:, :count]


def unpack_planes(words: Tensor, bits: int, count: int) -> Tensor:
    """int32 words [R, W] in the planar layout -> uint8 [R, count].

    Every 32 fields take ``bits`` words: those of the low bit plane, then those of the higher ones; a plane is a dense stream.
    """
    rows, width = words.shape
    blocks = words.reshape(rows * (width // bits), bits)
    fields = torch.zeros(blocks.shape[0], 32, dtype=torch.uint8)
    first = 0
    for plane in PLANES[bits]:
        fields |= unpack_stream(blocks[:, first : first + plane], plane, 32) << first
        first += plane
    return fields.view(rows, -1)[:, :count]


def pack_nibbles(values: Tensor) -> Tensor:
    """uint8 [N, K] below 16 -> uint8 [N, ceil(K / 2)], even columns in the low nibbles, the odd nibble out zero."""
    if values.shape[1] % 2:
        values = torch.nn.functional.pad(values, (0, 1))
    return values[:, 0::2] | (values[:, 1::2] << 4)


def unpack_nibbles(packed: Tensor, columns: int) -> Tensor:
    """The inverse of pack_nibbles: uint8 [N, ceil(K / 2)] -> uint8 [N, columns]."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).view(packed.shape[0], -1)[:, :columns]
