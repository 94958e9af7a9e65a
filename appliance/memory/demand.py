"""What a model asks of the memory, from config.json and the headers of its files alone: never a weight, no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from appliance.memory.activations import activation_bytes, delta_size, torch_activations
from appliance.memory.adapters import adapter_weights, adapters_nbytes, adapters_workspace
from appliance.memory.experts import check_experts
from appliance.memory.kv import KVSpec
from appliance.memory.loading import NOTHING, Loading, loading
from appliance.memory.modules import NATIVE, Loaded, Machinery, ends, parents, told
from appliance.memory.offload import streamed_parts
from appliance.memory.reference import Moment, moments
from appliance.memory.settings import ITEM_SIZE
from kernels import layout
from models.spec import Latent, ModelSpec
from quant.scheme import QuantScheme

LOGIT_ROWS = 64
"""Rows of logits that exist at a time: sampling and prompt log-probabilities work in slices of so many."""
SPLIT_PROGRAMS = 2 * 192
"""Programs of an attention in Triton that is split: two for each multiprocessor (kernels/triton/attention_decode.py), of which no
card has more than 192."""


@dataclass(frozen=True, kw_only=True)
class Demand:
    """Bytes that do not depend on utilization or lengths, and the rates of those that do."""

    model: str
    architecture: str
    quantization: str
    dtype: str
    layers: int
    kv_heads: int
    head_dim: int
    max_len: int
    vocab: int
    weights: dict[str, int]  # by part
    slab: int  # what one product, or one attention, needs beside its input and output
    layer_slab: int  # the same without the head's product, which is in no recorded step
    token_bytes: int  # activations of one token of a step
    hidden_bytes: int  # the hidden state of one token
    logits_row_bytes: int
    position_bytes: int  # the rotary tables' rows of one position
    moments: tuple[Moment, ...] = ()  # of a step, of which one is there beside all that, or none: of the reference, of torch's
    state_layers: int = 0  # of all layers, those that have states in place of keys and values
    shared_layers: int = 0  # that read the keys and values of others
    sequence_bytes: int = 0  # their states of one sequence
    streamed: tuple[dict[str, int], ...] = ()  # what each layer brings when it is streamed in, see streamed_parts
    loading: Loading = NOTHING  # what it takes for a while to load it
    threads: int = 1  # of the CPU, that load it
    kv_shapes: tuple[tuple[int, int], ...] = ()  # as in KVSpec
    values: bool = True  # whether the cache has values beside its keys
    exchange: int = 0  # buffers in which several cards exchange their sums
    head: str = "as published"  # what the output head is stored as, in words
    embedding: str = "as published"  # the same of the embedding

    @property
    def kv_layers(self) -> int:
        """Those that have keys and values of their own."""
        return self.layers - self.state_layers - self.shared_layers

    def kv(self, block_size: int, dtype: str | None = None) -> KVSpec:
        """The cache in ``dtype``, or in that of the activations."""
        return KVSpec(self.kv_layers, self.kv_heads, self.head_dim, block_size, dtype or self.dtype, self.kv_shapes, self.values)

    def products(self, tokens: int, length: int) -> int:
        """What products and attention need in a step of so many tokens, of sequences of at most ``length``."""
        return self.slab + max((0, *(one.nbytes(tokens, length) for one in self.moments)))

    @classmethod
    def of(cls, spec: ModelSpec, scheme: QuantScheme, machinery: Machinery, *, model: str) -> Demand:
        """The demand of a model whose every module has the shape and the scheme that the config and the headers state."""
        size, last, alike = ITEM_SIZE[machinery.dtype], ends(spec, scheme, machinery), parents(spec, scheme)
        if machinery.ops == "triton":
            check_experts(spec, scheme, machinery, model)
        one_of = partial(_workspace, spec, machinery=machinery)
        weights, more = {"embedding": last.embedding_bytes}, told(spec, scheme, machinery)
        if more:
            weights["per_layer_embedding"] = sum(nbytes for _, _, nbytes in more)
        for parent in alike:
            for one in parent.joined:
                weights[one.module.part] = weights.get(one.module.part, 0) + parent.count * one.nbytes(machinery)
        layers = [one for parent in alike for one in parent.joined]  # of those that are alike, one
        products = [*layers, *(made for _, made, _ in more[1:])]
        if spec.adapters is not None:
            weights["adapters"] = adapters_nbytes(spec, machinery)
            products += [half for number in spec.unlike for pair in adapter_weights(spec, number) for half in pair]
        token = activation_bytes(spec, layers, machinery)
        weights |= {"head": last.head_bytes, "norms": spec.small_nbytes(size)}
        return cls(
            model=model,
            architecture=spec.architecture,
            quantization=scheme.method,
            dtype=machinery.dtype,
            layers=spec.layers,
            kv_heads=spec.kv_heads,
            head_dim=spec.head_dim,
            kv_shapes=spec.kv_shapes,
            values=spec.latent is None,
            max_len=spec.max_len,
            vocab=spec.vocab,
            weights=weights,
            slab=one_of([*products, last.head]),
            layer_slab=one_of(products),
            token_bytes=token,
            hidden_bytes=spec.hidden * size,
            # float32; torch's operators widen a product in the activations' type, the reference copies it
            logits_row_bytes=spec.vocab * (4 + {NATIVE: 0, "reference": 4}.get(machinery.ops, size)),
            position_bytes=4 * sum(rope.rotary_dim for rope in spec.ropes),
            moments=_moments(spec, products, last.head, machinery, token),
            state_layers=sum(spec.linear),
            shared_layers=sum(spec.shared),
            sequence_bytes=0 if spec.recurrent is None else sum(spec.linear) * spec.recurrent.state_bytes,
            head=last.words,
            embedding=last.embedding_words,
            loading=loading(spec, scheme, machinery),
            threads=machinery.threads,
            streamed=streamed_parts(spec, scheme, machinery) if machinery.ops == "triton" else (),
        )


def _workspace(spec: ModelSpec, weights: Sequence[Loaded], machinery: Machinery) -> int:
    """Bytes beside activations, whatever the lengths are."""
    if machinery.ops == "reference":
        return 0  # see _moments
    copies = 0 if spec.latent is None else latent_copies(spec, spec.latent, machinery)
    workspace = max(product_workspace(spec, weights, machinery), attention_workspace(spec, machinery))
    workspace += adapters_workspace(spec, machinery)
    return workspace + (activated(spec) if machinery.ops != "cpu" else 0) + copies  # see _moments


def product_workspace(spec: ModelSpec, weights: Sequence[Loaded], machinery: Machinery) -> int:
    """Bytes that a product, or a mixture of experts, needs beside its input and output, at most.

    Native kernels prepare some rows of the input (of a mixture's for all experts at once), and have the same memory for
    attention; those in Triton have partial sums of few rows, and for many expand a slab of a quantized weight at a time. Torch's
    operators expand such a slab into bytes and into floats.
    """
    dtype, quantized = machinery.dtype, [one for one in weights if one.kind != "dense"]
    if machinery.ops == "triton":
        quantized = [one for one in quantized if one.module.part != "experts"]
        narrow = [one.module.N for one in quantized if one.module.N < layout.TRITON_SPLIT_OUTPUTS]
        narrow += [spec.hidden] if spec.mixture is not None else []  # the experts' sums
        split = layout.TRITON_SPLIT_ROWS * 4 * max(narrow, default=0)
        return max(split, max((layout.triton_slab_nbytes(one.module.K) for one in quantized), default=0))
    if machinery.ops == "cpu":
        return max((_slab(one, machinery) for one in quantized), default=0)
    by_choice, rows = (
        machinery.activation == "int8" or (machinery.activation == "auto" and dtype != "float32"),
        layout.NATIVE_ROWS,
    )
    shapes = {
        (one.module.part == "experts", one.module.K, one.group_size, one.kind in ("int", "fp4") and by_choice) for one in weights
    }
    parts = [layout.native_workspace_bytes(rows, K, group, rounded=rounded) for _, K, group, rounded in shapes]
    attention = partial(layout.native_attention_bytes, machinery.threads, heads=spec.heads)
    parts += [attention(kv_heads=one.count, head_dim=one.size) for one in set(spec.by_layer)]
    shared, routes = max(shared for shared, _ in parts), 0
    if spec.mixture is not None:
        counts, shared_mlp = {"experts": spec.mixture.experts, "active": spec.mixture.active}, spec.mixture.shared
        routes = layout.native_routes_bytes(rows, spec.intermediate, ITEM_SIZE[dtype], **counts, shared=shared_mlp)
        mixed = [shape[1:] for shape in shapes if shape[0]]
        rows_of = (layout.native_mixture_bytes(rows, K, group, rounded=rounded, **counts) for K, group, rounded in mixed)
        shared = max(shared, *rows_of)
    return shared + routes + machinery.threads * max(thread for _, thread in parts)


def _slab(one: Loaded, machinery: Machinery) -> int:
    """Bytes of a slab of this weight while torch's operators expand it into bytes and floats: at most all of it."""
    size = 2 if machinery.dtype == "bfloat16" and one.kind != "fp4" else 4
    return 2 * size * one.module.K * min(layout.slab_rows(one.module.K, size), layout.padded(one.module.N, layout.BLOCK_N))


def attention_workspace(spec: ModelSpec, machinery: Machinery) -> int:
    """Bytes that attention, or the gated delta rule, needs beside queries and result.

    Triton's leaves the parts of sequences that it has split there, when tokens are decoded: float32, with a sum a head. Native
    kernels use the memory of products, which is large enough for it.
    """
    delta = delta_workspace(spec, machinery)
    if spec.conv is not None:
        delta = layout.conv_nbytes(spec.conv.channels, spec.conv.kernel)
    if machinery.ops == "cpu":
        attention = partial(
            layout.paged_attention_nbytes,
            heads=spec.heads,
            item_size=ITEM_SIZE[machinery.dtype],
            block_size=machinery.block_size,
            capped=spec.cap is not None,
        )
        stays = 0 if _given_back(spec) else delta
        return max(stays, *(attention(kv_heads=one.count, head_dim=one.size) for one in set(spec.by_layer)))
    if machinery.ops != "triton":
        return delta
    return max(SPLIT_PROGRAMS * -(-spec.heads // one.count) * (one.size + 1) * 4 for one in set(spec.by_layer))


def delta_workspace(spec: ModelSpec, machinery: Machinery) -> int:
    """Bytes that the gated delta rule needs beside what it reads and its result."""
    if spec.delta is None:
        return 0
    heads, key_dim, value_dim = spec.delta.value_heads, spec.delta.key_dim, spec.delta.value_dim
    sizes = {"channels": spec.delta.channels, "value_heads": heads, "key_dim": key_dim, "value_dim": value_dim}
    return layout.delta_nbytes(ops=machinery.ops, **sizes)


def _given_back(spec: ModelSpec) -> bool:
    """Whether torch's blocks for the delta rule are so large that the allocator keeps none for what comes later."""
    return spec.delta is not None and layout.DELTA_ROWS * 4 * spec.delta.channels >= layout.KEPT_BYTES


def activated(spec: ModelSpec) -> int:
    """Bytes that an activation without a gate needs beside what it overwrites: five parts in float32, of a row at least."""
    return 0 if spec.ungated != "xielu" else 5 * 4 * max(spec.intermediate, layout.ACTIVATED_AT_ONCE)


def latent_copies(spec: ModelSpec, net: Latent, machinery: Machinery) -> int:
    """Bytes of the copies that torch makes on the way to latents and back, beside what products and attention keep."""
    wider = max(net.nope, net.value)
    return layout.latent_nbytes(heads=spec.heads, rank=net.rank, other=wider, item_size=ITEM_SIZE[machinery.dtype])


def _moments(spec: ModelSpec, layers: Sequence[Loaded], head: Loaded, machinery: Machinery, token: int) -> tuple[Moment, ...]:
    """Those of the reference, and what is as with torch's operators.

    Of these the delta rule, and an activation that takes memory, beside what is there then: their large blocks are given back.
    ``token``: bytes of a token at the widest point of a layer, in whose place that is.
    """
    if machinery.ops == "cpu":
        size, found = ITEM_SIZE[machinery.dtype], []
        if _given_back(spec):
            found.append((delta_workspace(spec, machinery), delta_size(spec, layers)))
        if wide := activated(spec):
            found.append((wide, spec.mlp_size))
        return tuple(Moment(fixed, (2 * spec.hidden + beside) * size - token) for fixed, beside in found)
    if machinery.ops != "reference":
        return ()
    alike = torch_activations(spec, layers, machinery) - spec.hidden * ITEM_SIZE[machinery.dtype]
    copies = 0 if spec.latent is None else latent_copies(spec, spec.latent, machinery)
    beside = attention_workspace(spec, machinery) + activated(spec) + copies
    return (Moment(beside, alike), *moments(spec, layers, head, machinery, logit_rows=LOGIT_ROWS))
