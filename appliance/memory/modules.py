"""The weights of a model as they will lie in memory, joined and laid out by the loader's rules. Headers only, no torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from operator import attrgetter

from appliance.config import EngineConfig
from appliance.memory.devices import DeviceInfo, cpu_threads
from appliance.memory.settings import ITEM_SIZE, block_size, resolve_dtype
from kernels import layout
from models.spec import ModelSpec, ModuleShape
from quant.headers import ITEM_SIZE as FILE_ITEM
from quant.rules import DENSE, ROWS, WeightScheme
from quant.scheme import QuantScheme

NATIVE, EMBEDDING, HEAD = "cpu-native", "model.embed_tokens", "lm_head"
SLOTS = {
    "q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "qkv_proj": "qkv", "o_proj": "o",
    "gate_proj": "gate_up", "up_proj": "gate_up", "gate_up_proj": "gate_up", "down_proj": "down",
    "in_proj_qkv": "qkv", "in_proj_z": "qkv", "in_proj_qkvz": "qkv", "in_proj_b": "ba", "in_proj_a": "ba", "in_proj_ba": "ba",
    "in_proj": "qkv",
    "out_proj": "o", "gate": "router", "router": "router", "wg": "router", "proj": "router", "shared_expert_gate": "router",
    "w1": "gate_up", "w3": "gate_up", "w2": "down", "lm_head": "head", "embed_tokens": "embedding",
    "per_layer_input_gate": "told", "per_layer_projection": "told", "per_layer_model_projection": "told",
    "embed_tokens_per_layer": "embedding", "q_a_proj": "qkv", "kv_a_proj_with_mqa": "qkv", "q_b_proj": "q_b", "kv_b_proj": "kv_b",
}  # fmt: skip
FLOATS4 = ("mxfp4", "nvfp4")  # layouts of 4-bit floats
UP = "kv_b"  # the slot of what is kept dense, in the activations' type, whatever it was (kernels/latent.py)
JOINED = ("qkv", "ba", "gate_up")  # slots whose parts become one weight where they are stored alike


@dataclass(frozen=True, kw_only=True)
class Machinery:
    """What computes: it decides how weights are laid out and what a product needs."""

    ops: str  # name of the Ops, see kernels.layout
    dtype: str  # of activations
    head_bits: int | None  # of a head that the checkpoint has not quantized, see kernels.layout.head_bits
    embedding_bits: int | None = None  # the same of an embedding that is not one with the head
    activation: str = "auto"  # --activation-dtype
    threads: int = 1
    block_size: int = 16  # tokens in a block of the cache

    @classmethod
    def choose(cls, config: EngineConfig, published: str, device: DeviceInfo, *, float16: bool = True) -> Machinery:
        """For a checkpoint ``published`` in that dtype. Raises InputError for options that do not exist."""
        ops = layout.ops_name(device.kind, reference=config.reference_ops)
        dtype = resolve_dtype(config.dtype, published, device, float16=float16)
        return cls(
            ops=ops,
            dtype=dtype,
            head_bits=layout.head_bits(config.lm_head_dtype, ops=ops, dtype=dtype),
            embedding_bits=layout.embedding_bits(config.embedding_dtype),
            activation=config.activation_dtype,
            threads=cpu_threads(config.threads),
            block_size=block_size(config, device.kind),
        )


@dataclass(frozen=True)
class Loaded:
    """One weight as the loader makes it of the published ones."""

    module: ModuleShape
    stored: WeightScheme
    scale_bytes: int
    gated: bool = False
    file_bytes: int = 2  # of a number, as published: of those in a float dtype

    @property
    def parent(self) -> str:
        """The module that it is a part of."""
        return self.module.name.rpartition(".")[0]

    @property
    def slot(self) -> str:
        """What it is within a layer, by whatever name it is published; or what it is at the ends."""
        return SLOTS[self.module.name.rpartition(".")[2]]

    @property
    def kind(self) -> str:
        """As in kernels.layout.weight_nbytes."""
        if not self.stored.quantized:
            return "dense"
        if self.stored.layout in FLOATS4:
            return "fp4"
        return "fp8" if self.stored.layout in ("float-quantized", "fp8-block") else "int"

    @property
    def group_size(self) -> int:
        stored = self.stored
        return stored.block[1] if stored.block else self.module.K if stored.group_size == -1 else stored.group_size

    def nbytes(self, machinery: Machinery) -> int:
        """Bytes of what ``Ops.pack`` makes of it."""
        module, stored, ops, dtype = self.module, self.stored, machinery.ops, machinery.dtype
        if self.slot == UP:
            return module.N * module.K * ITEM_SIZE[dtype]
        packed = layout.weight_nbytes(
            ops=ops,
            dtype=dtype,
            kind=self.kind,
            bits=4 if stored.bits <= 4 else 8,  # 2 and 3 bits widen to 4, 5 to 7 bits to 8
            N=module.N,
            K=module.K,
            group_size=self.group_size,
            asymmetric=not stored.symmetric,
            act_order=stored.act_order,
            scale_bytes=self.scale_bytes,
            activation=stored.activation,
            gated=self.gated,
            factors=stored.layout == "nvfp4",
        )
        return packed + (layout.bias_nbytes(ops=ops, dtype=dtype, N=module.N, gated=self.gated) if module.bias else 0)


@dataclass(frozen=True)
class Parent:
    """Weights that have a parent in common, and how many parents have such."""

    published: Sequence[Loaded]
    joined: Sequence[Loaded]
    count: int


@dataclass(frozen=True)
class _Known:
    published: Sequence[Loaded]
    parents: Sequence[Parent]


@dataclass(frozen=True)
class Ends:
    """Embedding and head. What they share counts as embedding."""

    embedding: Loaded  # as it is looked up in
    head: Loaded
    embedding_bytes: int
    head_bytes: int
    words: str  # what the head is stored as
    embedding_words: str  # the same of the embedding


def layer_weights(spec: ModelSpec, scheme: QuantScheme) -> Iterator[Loaded]:
    """The weights of the decoder layers.

    q, k and v, and gate and up, become one weight where they are stored alike; the order of an act-order down_proj moves into
    gate and up.
    """
    return _joined(published_weights(spec, scheme), adapted=spec.adapters is not None)


def _joined(published: Iterable[Loaded], *, adapted: bool) -> Iterator[Loaded]:
    """``adapted``: MLPs that all tokens go through may have adapters, and what is in them stays in its order."""
    for (_, slot), run in groupby(published, key=lambda one: (one.parent, one.slot)):
        parts = list(run)
        if slot in JOINED and len({(part.stored, part.scale_bytes) for part in parts}) == 1:
            module = replace(parts[0].module, N=sum(part.module.N for part in parts))
            alone = len(parts) == 1 and parts[0].module.name.endswith(".up_proj")  # an MLP without a gate
            yield replace(parts[0], module=module, gated=slot == "gate_up" and not alone)
        elif slot == "down" and not (adapted and parts[0].parent.endswith(".mlp")):
            yield from map(_in_order, parts)
        else:
            yield from parts


def _in_order(one: Loaded) -> Loaded:
    return replace(one, stored=replace(one.stored, act_order=False)) if one.stored.act_order else one


def published_weights(spec: ModelSpec, scheme: QuantScheme) -> Sequence[Loaded]:
    """The same as the files have them."""
    return _known(spec, scheme).published


def parents(spec: ModelSpec, scheme: QuantScheme) -> Sequence[Parent]:
    """What is read and laid out before the next: attention, an MLP, a router, an expert. Those that are alike are one here."""
    return _known(spec, scheme).parents


def _known(spec: ModelSpec, scheme: QuantScheme) -> _Known:
    """Kept with the scheme: a mixture of experts has thousands of weights, and a plan asks for them again and again."""
    known: dict[ModelSpec, _Known] = scheme.__dict__.setdefault("_known", {})
    if spec not in known:
        published = [loaded(module, spec, scheme) for module in spec.modules() if module.in_layer]
        known[spec] = _Known(published, _alike(published, adapted=spec.adapters is not None))
    return known[spec]


def _alike(published: Sequence[Loaded], *, adapted: bool) -> list[Parent]:
    found: dict[tuple[object, ...], list[list[Loaded]]] = {}
    for _, run in groupby(published, key=attrgetter("parent")):
        weights = list(run)
        found.setdefault(tuple(map(_kind, weights)), []).append(weights)
    return [Parent(same[0], list(_joined(same[0], adapted=adapted)), len(same)) for same in found.values()]


def _kind(one: Loaded) -> tuple[object, ...]:
    """All that a plan sees of it."""
    module = one.module
    return one.slot, module.N, module.K, module.part, module.bias, one.stored, one.scale_bytes, one.file_bytes


def loaded(module: ModuleShape, spec: ModelSpec, scheme: QuantScheme) -> Loaded:
    """A module by itself. Scales are of the size the header says; GPTQ's are cast to a 16-bit model's dtype when read."""
    stored = scheme.for_module(module.name)
    weight = None if scheme.index is None else scheme.index.tensors.get(f"{module.name}.weight")
    file = 2 if weight is None else FILE_ITEM.get(weight.dtype, 2)
    if stored.layout == "rows":
        return replace(in_rows(module, stored.bits), file_bytes=file)
    size = 1 if stored.layout in FLOATS4 else 2
    if scheme.index is not None and (scheme.method != "gptq" or spec.dtype == "float32"):
        found = (scheme.index.tensors.get(f"{module.name}.{n}") for n in ("scales", "weight_scale", "weight_scale_inv"))
        size = next((4 if info.dtype == "F32" else size for info in found if info is not None), size)
    return Loaded(module, stored, size, file_bytes=file)


def in_rows(module: ModuleShape, bits: int) -> Loaded:
    """What quant.rows makes of it."""
    return Loaded(module, ROWS[bits], 4 if bits == 8 else 2)


def ends(spec: ModelSpec, scheme: QuantScheme, machinery: Machinery) -> Ends:
    """Embedding and head by the loader's rules.

    What the checkpoint has quantized stays as it is, and is one with the other only where a tied checkpoint has a single table.
    Where rows can be looked up in what the head becomes (kernels.layout.shares_table), a tied embedding needs no other copy.
    """
    bits, dtype, both = machinery.head_bits, machinery.dtype, has_both(spec, scheme)
    module, table = ModuleShape(HEAD, spec.vocab, spec.hidden, "head", False), published_table(spec, scheme)
    head = loaded(module, spec, scheme) if both else replace(table, module=module)
    words = _words(head, bits, dtype)
    if not head.stored.quantized and bits is not None:
        head = in_rows(module, bits)
    packed = head.nbytes(machinery)
    shares = layout.shares_table(machinery.ops, head.stored.bits if head.stored.quantized else None)
    if not both and shares and (not table.stored.quantized or has_rows(table)):
        return Ends(head, head, packed, 0, f"{words}, shared with the embedding", words)
    embedding, size = _looked_up(table, machinery, ITEM_SIZE[dtype])
    asked = None if table.stored.quantized else machinery.embedding_bits
    return Ends(embedding, head, size, packed, words, _words(embedding, asked, dtype))


def told(spec: ModelSpec, scheme: QuantScheme, machinery: Machinery) -> list[tuple[Loaded, Loaded, int]]:
    """Of the table of what layers are told, and the projection beside it: as published, as kept, and the bytes of that."""
    if spec.per_layer is None:
        return []
    table, projection = (loaded(one, spec, scheme) for one in spec.per_layer.ends(spec.vocab, spec.hidden))
    item = ITEM_SIZE[machinery.dtype] if table.stored.quantized else table.file_bytes
    return [(table, *_looked_up(table, machinery, item)), (projection, projection, projection.nbytes(machinery))]


def _looked_up(table: Loaded, machinery: Machinery, item: int) -> tuple[Loaded, int]:
    """(a table by itself as it is kept, its bytes), ``item`` a number where it is dense."""
    if not table.stored.quantized and machinery.embedding_bits is not None:
        kept = in_rows(table.module, machinery.embedding_bits)
    else:
        kept = table if has_rows(table) else Loaded(table.module, DENSE, 2)
    if not kept.stored.quantized:
        return kept, table.module.N * table.module.K * item
    return kept, kept.nbytes(replace(machinery, ops=layout.table_ops(machinery.ops)))


def has_rows(table: Loaded) -> bool:
    """Whether rows of a quantized table can be looked up; of others the loader makes a dense one."""
    return table.kind == "int" and not table.stored.act_order


def published_table(spec: ModelSpec, scheme: QuantScheme) -> Loaded:
    """The token table as the files have it: under the head's name where a tied checkpoint has it there alone."""
    name = EMBEDDING if not spec.tie_embeddings or _stored(scheme, EMBEDDING) or not _stored(scheme, HEAD) else HEAD
    return loaded(ModuleShape(name, spec.vocab, spec.hidden, "embedding", False), spec, scheme)


def has_both(spec: ModelSpec, scheme: QuantScheme) -> bool:
    """Whether there is a head beside the embedding; of a tied model two dense tables are taken to be the same."""
    if not spec.tie_embeddings:
        return True
    dense = {f"{EMBEDDING}.weight", f"{HEAD}.weight"}
    names = scheme.index.tensors if scheme.index is not None else {}
    tables = [name for name in names if name.startswith((f"{EMBEDDING}.", f"{HEAD}."))]
    return _stored(scheme, HEAD) and _stored(scheme, EMBEDDING) and any(name not in dense for name in tables)


def _stored(scheme: QuantScheme, module: str) -> bool:
    return scheme.index is not None and any(name.startswith(f"{module}.") for name in scheme.index.tensors)


def _words(one: Loaded, bits: int | None, dtype: str) -> str:
    """What a table is stored as; ``bits``: what it is quantized to where the checkpoint has not done that."""
    if one.stored.quantized and one.stored.layout != "rows":
        return f"{one.stored.bits} bits as published"
    return dtype if bits is None else f"int{bits}"
