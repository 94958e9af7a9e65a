"""Embedding and head: as they are, or in codes. A slab of rows is worked on at a time.

A tied model has one table for both. No other program reads a table of codes as both, so where either is to be quantized, the new
checkpoint has two, and its config.json says that they are not tied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from appliance.memory.text import size_text
from appliance.quantize.layer import Watcher
from appliance.quantize.options import Options
from appliance.quantize.recipe import KEPT, stored_bytes
from models.plain import FLOATS
from models.spec import ModelSpec
from quant.algorithms.awq import search_cuts
from quant.algorithms.gptq import factored, sweep
from quant.algorithms.grid import Grid, Quantized, round_to_nearest
from quant.checkpoint import Checkpoint
from quant.errors import InputError
from quant.publish import EMBEDDING, HEAD, check_shape, tensors_of

SLAB = 1 << 25  # values that are worked on at a time
GROUPS = {8: (128, 64, 32), 4: (32,)}  # of an embedding, by bits: the first that divides the hidden size
ROUNDED = 8  # bits of a head with which the method's own way gains nothing that could be measured
Make = Callable[[Tensor], Quantized]


class Ends:
    """What becomes of them, by ``--lm-head-bits`` and ``--embedding-bits``."""

    def __init__(self, spec: ModelSpec, options: Options, default: Grid) -> None:
        """``default``: the grid of the layers. Raises InputError for what the format cannot say."""
        self.spec, self.options = spec, options
        self.grids: dict[str, Grid | None] = {}  # of those that are quantized, by module
        if options.embedding_bits != KEPT:
            self.grids[EMBEDDING] = _embedding_grid(default, options.embedding_bits, spec.hidden)
        if options.lm_head_bits != KEPT:
            self.grids[HEAD] = _head_grid(default, options.lm_head_bits, str(options.format), spec.vocab)
        for name, grid in self.grids.items():
            assert grid is not None
            check_shape(str(options.format), name, spec.vocab, spec.hidden, grid)
        self.untied = spec.tie_embeddings and bool(self.grids)
        own = {"gptq": True, "awq": options.clip, "rtn": False}[options.method]
        self.calibrated = own and options.lm_head_bits < ROUNDED

    @property
    def nbytes(self) -> int:
        """Of both in the new checkpoint, about."""
        names = [EMBEDDING] if self.spec.tie_embeddings and not self.untied else [EMBEDDING, HEAD]
        return sum(self._stored(self.grids.get(name)) for name in names)

    def _stored(self, grid: Grid | None) -> int:
        return stored_bytes(self.spec.vocab, self.spec.hidden, grid, str(self.options.format))

    def told(self) -> str | None:
        """What there is to know of a model that is not tied any more, in words."""
        if not self.untied:
            return None
        before, after = size_text(self._stored(None)), size_text(self.nbytes)
        return (
            f"embedding and head were one table of {before}; they are two now, of {after}: no other program reads one in codes "
            "as both. (Unquantized, it is one in codes here: serve --lm-head-dtype)"
        )

    def tensors(
        self,
        checkpoint: Checkpoint,
        hidden: Iterator[Tensor] | None,
        publish: Callable[[str, Tensor], Tensor],
        device: torch.device,
    ) -> dict[str, Tensor]:
        """Of embedding, last norm and head, by name. ``publish``: name and tensor -> as it is written.

        ``hidden``: float32 [.., hidden] from the last layer, where ``calibrated``. Raises InputError naming a module whose
        numbers are not finite.
        """
        norm = checkpoint.take("model.norm.weight", dtypes=FLOATS)
        found = {"model.norm.weight": publish("model.norm.weight", norm)}
        for name in (EMBEDDING, HEAD):
            stored = name if checkpoint.has(f"{name}.weight") else EMBEDDING if name == HEAD else HEAD
            grid = self.grids.get(name)
            if stored != name and not self.untied:
                continue  # a tied table, which keeps its one name
            table = checkpoint.take(f"{stored}.weight", dtypes=FLOATS, shape=(self.spec.vocab, self.spec.hidden))
            if grid is None:
                found[f"{name}.weight"] = publish(name, table)
                continue
            make = self._head(grid, norm.float(), hidden, device) if name == HEAD and hidden is not None else _rounded(grid)
            made = by_slabs(name, table, make, device)
            del table  # before the codes are packed
            found |= {f"{name}.{key}": tensor for key, tensor in tensors_of(str(self.options.format), made).items()}
        return found

    def _head(self, grid: Grid, norm: Tensor, hidden: Iterator[Tensor], device: torch.device) -> Make:
        """The method's own way, for the last norm's outputs: GPTQ's sweep, or AWQ's search for extremes to cut off."""
        batches, norm = list(hidden), norm.to(device) + self.spec.norm_offset
        watcher = Watcher(self.options.method, len(batches), False)
        for batch in batches:
            x = batch.to(device).float()
            watcher(HEAD, x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.spec.eps) * norm)
        seen, options = watcher.seen[HEAD], self.options
        if seen.hessian is None:
            some = torch.cat(seen.some)
            return lambda rows: round_to_nearest(rows, grid, search_cuts(rows, some, grid))
        damping = seen.hessian.damping(options.damping)
        factor = factored(seen.hessian.taken(), act_order=options.act_order, damping=damping, name=HEAD)
        return lambda rows: sweep(rows, factor, grid, static_groups=options.static).weight


def by_slabs(name: str, table: Tensor, make: Make, device: torch.device | str = "cpu") -> Quantized:
    """What ``make`` makes of a table [N, K] of any float type, float32 rows by rows. Raises InputError naming it."""
    N, K = table.shape
    codes, parts = torch.empty(N, K, dtype=torch.uint8), []
    step = max(1, SLAB // K)
    for first in range(0, N, step):
        rows = table[first : first + step].to(device).float()
        if not bool(torch.isfinite(rows).all()):
            raise InputError(f"{name}: some of its values are not finite numbers: the checkpoint is damaged")
        part = make(rows)
        codes[first : first + step] = part.codes
        parts.append(replace(part, codes=codes[:0]))
    scales, zeros = (torch.cat([getattr(part, key).cpu() for part in parts], dim=1) for key in ("scales", "zeros"))
    perm = parts[0].perm  # the inputs', and so the same for all
    return Quantized(codes, scales, zeros, parts[0].grid, None if perm is None else perm.cpu())


def _rounded(grid: Grid) -> Make:
    return lambda rows: round_to_nearest(rows, grid)


def _embedding_grid(default: Grid, bits: int, hidden: int) -> Grid:
    """Symmetric, since vLLM looks rows up without zero points."""
    size = next((size for size in GROUPS[bits] if hidden % size == 0), -1)
    return replace(default, bits=bits, group_size=size, symmetric=True)


def _head_grid(default: Grid, bits: int, form: str, vocab: int) -> Grid:
    """That of the layers with other bits. vLLM cuts packed zero points by whole words of the vocabulary."""
    whole = vocab * bits % 32 == 0 or form != "compressed-tensors"
    return replace(default, bits=bits, symmetric=default.symmetric or not whole)
