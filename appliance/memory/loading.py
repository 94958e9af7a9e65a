"""What loading takes for a while beside the weights: what is read, what that becomes on the way, and the layouts being made.

The loader (models/loader.py) works on some layers at a time, with embedding and head beside them, or before them::

    beside     | weights so far | embedding, head: what they need | a layer | a layer | a layer |
    before     | embedding, head, and what they need |
               | weights so far                      | a layer | a layer | a layer | a layer |
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from appliance.memory.modules import (
    EMBEDDING,
    HEAD,
    JOINED,
    NATIVE,
    UP,
    Ends,
    Loaded,
    Machinery,
    ends,
    has_both,
    loaded,
    parents,
    published_table,
    told,
)
from appliance.memory.settings import ITEM_SIZE
from kernels import layout
from models.spec import ModelSpec
from quant.headers import ITEM_SIZE as FILE_ITEM
from quant.scheme import QuantScheme

WORKERS = 4  # modules converted at a time, at most: models/loader.py
SLAB_BYTES, SLAB_ITEM = 96 << 20, 24
"""While a weight is rounded in slabs of 4 M values (quant/rows.py): five floats each, and what the allocator keeps of them.

Native code needs nothing beside what it makes, nor to turn the words of AWQ; beside cards it may not be there."""
READ = {
    "awq-gemm": 1.3, "awq-gemv": 1.2, "awq-gemv-fast": 4.0, "gptq": 3.3, "pack-quantized": 3.3,
    "int-quantized": 2.1, "float-quantized": 1.1, "fp8-block": 1.1, "mxfp4": 0.5, "nvfp4": 0.5,
}  # fmt: skip
"""Bytes a weight while it is read into canonical form, with that: measured as the peak of a process (scales come on top)."""
TURNED = 1.0
"""The same of awq-gemm with native kernels."""
STRAIGHT = {("gptq", 4): 1.1, ("gptq", 8): 2.1, ("pack-quantized", 4): 0.6}
"""The same of bytes that need no new order."""
PACK = {"cpu": {4: 4.2, 8: 5.0}, "triton": {4: 3.6, 8: 2.4}}
"""Bytes a weight of integers while it is packed, with what it becomes, measured as above. Native kernels need nothing else."""


@dataclass(frozen=True)
class Workers:
    """How many layers are loaded at a time, and whether embedding and head come before them or beside them."""

    count: int = WORKERS
    ends_first: bool = False

    @classmethod
    def choices(cls, threads: int) -> list[Workers]:
        """The fastest first, the one that takes the least memory last."""
        most = min(threads, WORKERS)
        return [cls(most, most == 1), *(cls(count, True) for count in range(most, 0, -1) if count > 1 or most > 1)]


@dataclass(frozen=True)
class Transient:
    """Bytes of one memory while weights are loaded into it, or through it."""

    ends: int = 0  # embedding and head, with what they need for a while
    ends_kept: int = 0  # what is left of them
    layer: int = 0  # what a layer needs beside what is left of it

    def peak(self, weights: int, workers: Workers) -> int:
        """At most so many bytes are taken at once by loading; ``weights``: what is left of all."""
        if workers.ends_first:
            return max(self.ends, weights + workers.count * self.layer)
        return weights + max(self.ends - self.ends_kept + (workers.count - 1) * self.layer, workers.count * self.layer)


@dataclass(frozen=True)
class Loading:
    """Of the device that has the weights, and of the host, where that is another memory."""

    device: Transient = Transient()
    host: Transient = Transient()


NOTHING, ALL_AT_ONCE = Loading(), Workers()


def loading(spec: ModelSpec, scheme: QuantScheme, machinery: Machinery) -> Loading:
    """What loading this model takes."""
    last, more = ends(spec, scheme, machinery), told(spec, scheme, machinery)
    both = [(parent.published, parent.joined) for parent in parents(spec, scheme)]
    if machinery.ops == "triton":
        device = max(max(_on_card(one, machinery) for one in weights) + _beside(weights, machinery) for _, weights in both)
        host = max(
            max(_reading(published, machinery), _read(published) + max(map(_joined, weights))) for published, weights in both
        )
        kept = last.embedding_bytes + last.head_bytes + sum(size for _, _, size in more)
        table, head = (_host_end(*one, machinery) for one in _ends(spec, scheme, last))
        read = [(published, _canonical(published), made) for published, made, _ in more]
        rest = (one[1] if _untouched(one[0], one[2]) else _host_end(*one, machinery) for one in read)
        laid = (made for published, made, _ in more if not _untouched(published, made))
        on_card = max(_on_card(one, machinery) for one in (last.embedding, last.head, *laid))
        return Loading(
            Transient(kept + max(on_card, spec.vocab * spec.hidden * _file_item(spec, scheme)), kept, device),
            Transient(max(table + head if spec.tie_embeddings else max(table, head), *rest, 0), 0, host),
        )
    layer = max(_part(published, weights, machinery) for published, weights in both)
    kept, most = last.embedding_bytes + last.head_bytes, _ends_peak(spec, scheme, machinery, last)
    for published, made, size in more:
        most, kept = max(most, kept + _told_peak(published, made, size, machinery)), kept + size
    return Loading(Transient(most, kept, layer))


def _untouched(published: Loaded, made: Loaded) -> bool:
    """Whether it is a dense table of what layers are told, which stays as it is read."""
    return made.slot == "embedding" and not (published.stored.quantized or made.stored.quantized)


def _told_peak(published: Loaded, made: Loaded, packed: int, machinery: Machinery) -> int:
    """The most while this is read and laid out."""
    if _untouched(published, made):
        return packed
    if made.slot == "embedding":
        machinery = replace(machinery, ops=layout.table_ops(machinery.ops))
    return _end(published, _canonical(published), made, packed, machinery)


def _part(published: Sequence[Loaded], fused: Sequence[Loaded], machinery: Machinery) -> int:
    """The most beside what is left, while a part of a layer is read, and then joined and laid out weight by weight.

    What was read stays, in canonical form, until all of the part is laid out.
    """
    most, read, done = _reading(published, machinery), _read(published), 0
    for one in fused:
        done += one.nbytes(machinery)
        most = max(most, read + done + _joined(one) + _pack_extra(one, machinery))
    return max(0, most - done)


def _canonical(one: Loaded) -> int:
    """Bytes of the canonical form, as published."""
    module, stored = one.module, one.stored
    if one.kind == "dense":
        return module.N * module.K * one.file_bytes
    return layout.weight_nbytes(
        ops="reference",
        dtype="bfloat16",
        kind=one.kind,
        bits=4 if stored.bits <= 4 else 8,
        N=module.N,
        K=module.K,
        group_size=one.group_size,
        asymmetric=not stored.symmetric,
        act_order=stored.act_order,
        scale_bytes=one.scale_bytes,
        factors=stored.layout == "nvfp4",
    )


def _read_bytes(one: Loaded, machinery: Machinery) -> int:
    """While it is read, with its canonical form."""
    module, stored = one.module, one.stored
    if one.kind == "dense":
        return _canonical(one)
    if stored.layout == "rows":  # as published, until it is rounded
        return module.N * module.K * one.file_bytes + _canonical(one) + _rounding(module.N * module.K, machinery)
    straight = not stored.act_order and not stored.planar
    factor = STRAIGHT.get((stored.layout, stored.bits)) if straight else None
    if stored.layout == "awq-gemm" and machinery.ops == NATIVE:
        factor = TURNED
    scales = _canonical(one) - module.N * module.K * (4 if stored.bits <= 4 else 8) // 8
    return int(module.N * module.K * (factor or READ[stored.layout])) + 2 * max(0, scales)


def _read(published: Sequence[Loaded]) -> int:
    """All that was read of a part, in canonical form: it stays until the part is done."""
    return sum(map(_canonical, published))


def _reading(published: Sequence[Loaded], machinery: Machinery) -> int:
    """The most while a part is read: what is there of it so far, and the one that is being read."""
    most = done = 0
    for one in published:
        most, done = max(most, done + _read_bytes(one, machinery)), done + _canonical(one)
    return most


def _joined(one: Loaded) -> int:
    """The copy that joins parts to one weight."""
    return _canonical(one) if one.slot in JOINED else 0


def _pack_extra(one: Loaded, machinery: Machinery) -> int:
    """While it is laid out, beside its canonical form and what it becomes."""
    numbers, packed = one.module.N * one.module.K, one.nbytes(machinery)
    if one.slot == UP:
        return numbers * ITEM_SIZE[machinery.dtype] + (0 if one.kind == "dense" else _slab(numbers))
    if one.kind == "dense":
        return numbers * ITEM_SIZE[machinery.dtype]  # in the activations' type
    if machinery.ops in ("reference", NATIVE) or one.kind == "fp4":
        return numbers if one.kind == "fp8" and machinery.ops == NATIVE else 0
    if machinery.ops == "triton" and packed >= numbers * ITEM_SIZE[machinery.dtype]:
        return 14 * numbers  # dequantized by way of float32: codes, scales and values
    if one.kind == "fp8":
        return (4 if machinery.ops == "triton" else 2) * numbers
    bits = 4 if one.stored.bits <= 4 else 8
    return max(0, int(PACK[machinery.ops][bits] * numbers) - packed)


def _on_card(one: Loaded, machinery: Machinery) -> int:
    """On a card, beside what it becomes: its canonical form and what laying it out takes; of a dense one, one copy."""
    return _canonical(one) + (0 if one.kind == "dense" else _pack_extra(one, machinery))


def _beside(weights: Sequence[Loaded], machinery: Machinery) -> int:
    """What an expert becomes, until it is copied to its place among the others."""
    return sum(one.nbytes(machinery) for one in weights if one.module.part == "experts")


def _ends(spec: ModelSpec, scheme: QuantScheme, last: Ends) -> list[tuple[Loaded, int, Loaded]]:
    """Embedding and head: as published, the bytes of that once it is read, and what is made of it."""
    table = published_table(spec, scheme)
    head = loaded(last.head.module, spec, scheme) if has_both(spec, scheme) else table
    dense = spec.vocab * spec.hidden * _file_item(spec, scheme)
    return [
        (one, _canonical(one) if one.stored.quantized else dense, made)
        for one, made in ((table, last.embedding), (head, last.head))
    ]


def _file_item(spec: ModelSpec, scheme: QuantScheme) -> int:
    """Bytes of a number in the larger of the dense tables."""
    tensors = scheme.index.tensors if scheme.index is not None else {}
    found = [tensors[name] for name in (f"{EMBEDDING}.weight", f"{HEAD}.weight") if name in tensors]
    return max((FILE_ITEM[one.dtype] for one in found), default=ITEM_SIZE[spec.dtype])


def _slab(numbers: int) -> int:
    return min(SLAB_BYTES, SLAB_ITEM * numbers)


def _rounding(numbers: int, machinery: Machinery) -> int:
    return 0 if machinery.ops == NATIVE else _slab(numbers)


def _numbers(one: Loaded) -> int:
    return one.module.N * one.module.K


def _until_canonical(published: Loaded, read: int, made: Loaded, machinery: Machinery) -> int:
    """The most until the canonical form is there: of one that was published quantized, or is to be."""
    if published.stored.quantized:
        return _read_bytes(published, machinery)
    return read + _canonical(made) + _rounding(_numbers(made), machinery)


def _host_end(published: Loaded, read: int, made: Loaded, machinery: Machinery) -> int:
    """Beside a card, which lays out what it is sent: with a copy in another float type."""
    if made.stored.quantized:
        return _until_canonical(published, read, made, machinery)
    return read + max(_slab(_numbers(made)), 4 * _numbers(made))


def _end(published: Loaded, read: int, made: Loaded, packed: int, machinery: Machinery) -> int:
    """The most while embedding or head is read, quantized where that is wanted, and laid out, with what it becomes."""
    if not made.stored.quantized:
        extra = (
            _slab(_numbers(made))
            if published.stored.quantized
            else 0
            if made.slot == "embedding"
            else _pack_extra(made, machinery)
        )
        return max(_read_bytes(published, machinery), read + packed + extra)
    laid = _canonical(made)  # which the reference keeps
    if machinery.ops != "reference":
        laid += packed + _pack_extra(made, machinery)
    return max(_until_canonical(published, read, made, machinery), laid)


def _ends_peak(spec: ModelSpec, scheme: QuantScheme, machinery: Machinery, last: Ends) -> int:
    """One after the other where they have nothing to do with each other; else both are there, as published, all the time."""
    (table, read, embedding), (head, other, _) = _ends(spec, scheme, last)
    if last.head_bytes == 0:  # one copy of both
        copy = spec.vocab * spec.hidden * ITEM_SIZE[machinery.dtype]
        dense = not embedding.stored.quantized
        return read + 2 * copy if dense else _end(table, read, embedding, last.embedding_bytes, machinery)
    where = replace(machinery, ops=layout.table_ops(machinery.ops))
    first = _end(table, read, embedding, last.embedding_bytes, where)
    second = _end(head, other, last.head, last.head_bytes, machinery)
    beside = (other, read) if spec.tie_embeddings else (0, 0)
    return max(first + beside[0], second + beside[1] + last.embedding_bytes)
