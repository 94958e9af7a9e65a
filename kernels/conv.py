"""A short gated convolution over the tokens of each sequence, in torch."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from kernels.batch import PagedBatch
from kernels.layout import CONV_ROWS
from kernels.states import StateCache


def short_conv(x: Tensor, weight: Tensor, cache: StateCache, batch: PagedBatch) -> Tensor:
    """As models.conv says, between its products: x [T, 3 * channels] (b, c and x) -> [T, channels] in x's dtype.

    ``weight`` float32 [kernel, channels]. A sequence whose rows begin at position 0 begins with zeros, whatever is in its place
    (batch.states) of the cache; others go on from what is there. What comes after its last row is written there. Other places are
    left alone. All of it is computed in float32.
    """
    if batch.states is None:
        raise ValueError("the batch does not say where the states of its sequences are")
    out = x.new_empty(x.shape[0], weight.shape[1])
    single: list[tuple[int, int, int]] = []  # (number of a sequence, its first row, the one behind its last)
    long: list[tuple[int, int, int]] = []
    for number, (row, stop) in enumerate(pairwise(batch.query_starts_list)):
        (single if stop - row == 1 else long).append((number, row, stop))
    for first in range(0, len(single), CONV_ROWS):  # all at once: most steps have nothing else
        some = single[first : first + CONV_ROWS]
        numbers, rows = (torch.tensor([one[part] for one in some]) for part in (0, 1))
        places = batch.states[numbers]
        kept = cache.conv[places]
        fresh = [at for at, (number, *_) in enumerate(some) if batch.seq_lens_list[number] == 1]
        kept[fresh] = 0
        out[rows], cache.conv[places] = _convolved(x[rows, None], weight, kept)
    for number, row, stop in long:
        kept = cache.conv[batch.states[number], None]
        kept = torch.zeros_like(kept) if batch.seq_lens_list[number] == stop - row else kept
        for first in range(row, stop, CONV_ROWS):
            last = min(first + CONV_ROWS, stop)
            out[first:last], kept = _convolved(x[None, first:last], weight, kept)
        cache.conv[batch.states[number]] = kept[0]
    return out


def _convolved(x: Tensor, weight: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """(x [n, T, 3 * channels] of n sequences -> [n * T, channels], what is kept then) with [n, kernel - 1, channels] before."""
    tokens = x.shape[1]
    b, c, value = x.float().chunk(3, dim=2)
    seen = torch.cat((kept, b * value), dim=1)
    found = seen[:, :tokens] * weight[0]
    for i, tap in enumerate(weight[1:], 1):
        found.addcmul_(seen[:, i : i + tokens], tap)
    return found.mul_(c).flatten(0, 1).to(x.dtype), seen[:, tokens:]
