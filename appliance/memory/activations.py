"""Bytes of a token of a step at the widest point of a decoder layer, by operators. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from appliance.memory.modules import NATIVE, Loaded, Machinery
from appliance.memory.reference import FLOAT
from appliance.memory.settings import ITEM_SIZE
from kernels import layout
from models.spec import Latent, Mixture, ModelSpec

NORMED = {2: 12, 4: 8}
"""Bytes a number while torch's operators normalize, with the result, by the bytes that it has: the same in float32 (where it was
not), divided, and times the weight, all of which are there at once in aten's rms_norm."""


def activation_bytes(spec: ModelSpec, layers: Sequence[Loaded], machinery: Machinery) -> int:
    """Bytes of activations of one token at the widest point of a decoder layer, and 24 for ids, positions and slots.

    On a card positions and slots are among the inputs (appliance/memory/inputs.py), and these are for ids as they are looked up.
    """
    size = ITEM_SIZE[machinery.dtype]
    if machinery.ops == NATIVE:
        found = _with_told(spec, _native_activations(spec, layers, size), machinery)
        # Steps whose requests have adapters are computed operator by operator, beside the memory of the one call for all others.
        return (2 if spec.adapters is not None and not spec.one_by_one else 1) * found + 24
    if machinery.ops == "reference":  # the residual stream; see appliance.memory.reference for what is beside it
        return _with_told(spec, spec.hidden * size, machinery) + 24
    found = torch_activations(spec, layers, machinery)
    if machinery.ops == "triton":
        found += _rounded(layers, machinery)
        found += 0 if _gated_in_tiles(layers, machinery) else 8 * spec.mlp_size
        if spec.post_norms:  # a product that is normalized before it is added, beside both residuals and the next norm
            found = max(found, (4 * spec.hidden + max(_q_size(spec), spec.intermediate, spec.mlp_size)) * size)
    return _with_told(spec, found, machinery) + 24


def _with_told(spec: ModelSpec, layer: int, machinery: Machinery) -> int:
    """With what layers are told of a token: it is there all the time, and is made of rows and a projection before all layers.

    Native kernels normalize it into the rows, and a card's into a third part. On torch's operators, and the reference, it takes
    12 and 19 bytes a number beside both (measured in bfloat16, with 2048 tokens of 8960).
    """
    size, width = ITEM_SIZE[machinery.dtype], 0 if spec.per_layer is None else spec.per_layer.width
    beside = {NATIVE: 0, "triton": size, "cpu": 12}.get(machinery.ops, 19)
    return max(layer + width * size, 2 * spec.hidden * size + width * (2 * size + beside)) if width else layer


def _gated_in_tiles(layers: Sequence[Loaded], machinery: Machinery) -> bool:
    """Whether Triton's kernels multiply gate and up as they sum them up; elsewhere both are float32 until they are multiplied.

    Parts of few rows are among what a product needs.
    """
    for one in layers:
        if one.slot == "gate_up":
            dense = one.module.N * one.module.K * ITEM_SIZE[machinery.dtype]
            if not one.gated or one.kind == "dense" or one.nbytes(machinery) >= dense:
                return False
    return True


def _rounded(layers: Sequence[Loaded], machinery: Machinery) -> int:
    """A product's input in bytes, with a scale and a sum for each 128 (kernels/triton/quantize.py)."""
    by_choice = machinery.activation == "int8"
    asked = ("int8-token", "fp8-token")
    rounded = [one for one in layers if one.stored.activation in asked or (one.kind == "int" and by_choice)]
    widths = (layout.padded(one.module.K, layout.TILE) for one in rounded)
    return max((width + 8 * width // layout.TILE for width in widths), default=0)


def _native_activations(spec: ModelSpec, layers: Sequence[Loaded], size: int) -> int:
    """Always live: the residual stream. With it its last norm; or q, k and v and the result of attention; or the gated product.

    What is normalized before it is added takes the place of q, k and v, and one beside the gated product. Parts that cannot be
    one weight (differently stored, or each with an order of its own) are computed, joined, and then used. A mixture of experts
    has memory of its own (product_workspace) where its parts are whole. Queries that are normalized over all heads lie beside q,
    k and v until they take their places. Where experts stand beside an MLP, and all is one call, their sum is there, too.
    """
    delta, q = delta_size(spec, layers), _q_size(spec)
    qkv, inner = _qkv_size(spec), spec.mlp_size
    parts = _in_parts(layers)
    added = spec.hidden if spec.post_norms else 0
    attention = max((2 if parts else 1) * qkv, added) + q + (q if spec.whole_qk_norm else 0)
    if spec.latent is not None:
        attention = max(_latent_sizes(spec, spec.latent, layers))
    attention = max(attention, delta)
    gated = all((one.gated or spec.ungated) and not one.stored.act_order for one in layers if one.slot == "gate_up")
    mlp = ((inner if gated else 4 * inner) + added) * size if inner else 0
    if spec.mixture is not None and not gated:
        mlp = (4 * spec.widest_mlp + added) * size + _mixed(spec, spec.mixture, size)
    beside = _beside(spec) - (spec.mlp_size if gated and spec.mixture is not None and spec.mixture.beside else 0)
    mlp += (beside if parts or not gated else min(beside, spec.hidden)) * size
    return spec.hidden * size + max(spec.hidden * size, attention * size, mlp)


def _in_parts(layers: Sequence[Loaded]) -> bool:
    """Whether q, k and v are products of their own anywhere, which are joined."""
    return any(one.slot == "qkv" and (one.stored.act_order or one.module.name.endswith((".k_proj", ".v_proj"))) for one in layers)


def _beside(spec: ModelSpec) -> int:
    """Numbers of a token that wait for each other where layers have both an MLP and experts: its product, and three of sums."""
    return spec.mlp_size + 3 * spec.hidden if spec.mixture is not None and spec.mixture.beside else 0


def _qkv_size(spec: ModelSpec) -> int:
    """Numbers of a token's queries, keys and values, and of the gates of what attention gives, in the layer that has most."""
    queries = (2 if spec.output_gate else 1) * spec.heads
    return max((queries + 2 * heads.count) * heads.size for heads in set(spec.by_layer))


def _q_size(spec: ModelSpec) -> int:
    """The same of queries alone."""
    return spec.heads * max(heads.size for heads in set(spec.by_layer))


def _latent_sizes(spec: ModelSpec, net: Latent, layers: Sequence[Loaded]) -> tuple[int, int]:
    """Numbers of a token in latent attention: while queries are absorbed, and while attention, or what is made of it, is there.

    First what was read (twice, where it is joined then), the queries of it, and these and the key as they go to attention. Then
    queries and the key, or what becomes of the result, beside attention's result.
    """
    down, queries = net.down(spec.heads), spec.heads * spec.head_dim
    whole = {one.module.N for one in layers if one.module.name.endswith(("q_a_proj", "q_proj"))} == {down}
    read = (1 if whole else 2) * down + (spec.heads * net.query if net.query_rank else 0)
    absorbing = read + queries + spec.head_dim + 2 * net.rank
    return absorbing, queries + max(queries + spec.head_dim, spec.heads * net.value)


def delta_size(spec: ModelSpec, layers: Sequence[Loaded]) -> int:
    """Numbers of a token in a layer that has states: what is projected, and the result.

    Queries, keys, values and z are one product, and so are b and a, or else they are there twice while they are joined.
    """
    delta = spec.delta
    if spec.conv is not None:
        return 4 * spec.conv.channels
    if delta is None:
        return 0
    size = delta.value_size
    for names, whole in (
        (("in_proj_qkv", "in_proj_qkvz"), delta.channels + delta.value_size),
        (("in_proj_b", "in_proj_ba"), 2 * delta.value_heads),
    ):
        joined = {one.module.N for one in layers if one.module.name.endswith(names) and not one.stored.act_order} != {whole}
        size += (1 + joined) * whole
    return size


def _mixed(spec: ModelSpec, mixture: Mixture, size: int) -> int:
    """Where experts are computed one by one: what is normalized, its rows of an expert, two sums in float32; shares, sorted."""
    return spec.hidden * (2 * size + 12) + 24 * mixture.experts


@dataclass(frozen=True)
class Products:
    """What a product of torch's operators, or the reference's, takes of a token beside its input and its result.

    float16 is multiplied in float32 on a CPU. Where activations are rounded to int8 the input is in float32 there, and once more
    divided by its scale; then beside its codes, while sums become float32 and are multiplied: they are there twice at a time.
    The reference has float32 copies of both, and the result in int32.
    """

    size: int  # bytes of an activation
    wide: int  # bytes more of each number
    integers: bool = False

    @classmethod
    def of(cls, layers: Sequence[Loaded], machinery: Machinery) -> Products:
        size, ops = ITEM_SIZE[machinery.dtype], machinery.ops
        rounds = ops != "triton" and any(one.stored.activation == "int8-token" for one in layers)
        wide = 12 if rounds else 4 if (ops, machinery.dtype) == ("cpu", "float16") else 0
        return cls(size, wide, rounds and ops == "cpu")

    def beside(self, inputs: int, outputs: int) -> int:
        """Bytes."""
        if self.integers:
            copy = 0 if self.size == FLOAT else FLOAT
            return max((copy + FLOAT) * inputs - self.size * outputs, (copy + 1) * inputs + (2 * FLOAT - self.size) * outputs)
        return self.wide * (inputs + outputs)

    def slab(self, inputs: int, outputs: int) -> int:
        """Bytes of some outputs at a time, where a CPU expands the weight."""
        return 0 if self.integers else min(outputs, layout.slab_rows(inputs, self.size)) * self.size


def _torch_attention(spec: ModelSpec, layers: Sequence[Loaded], size: int, products: Products) -> int:
    """Bytes of a token in attention of torch's operators, beside two hidden states (what was normalized is gone when q turns).

    q, k and v as they are made, twice where parts are joined, or values normalized; and then their queries, those that were
    normalized, and what turns: halves in float32, one times its cosine, what comes of it, and the result.
    """
    qkv, q = _qkv_size(spec), _q_size(spec)
    made = (2 if spec.v_norm or _in_parts(layers) else 1) * qkv * size + products.beside(spec.hidden, qkv)
    turning = (8 if size < FLOAT else 4) + size * (2 if spec.qk_norm else 1)
    return max(made, (qkv - spec.hidden) * size + turning * q)


def _gated_mlp(hidden: int, inner: int, size: int, products: Products, *, ungated: bool = False) -> int:
    """Bytes of a token in an MLP of so many features, that reads ``hidden``.

    Gate and up as they are made, by way of a slab of them where a weight is expanded; with their product; and what is made of it.
    ``ungated``: without a gate, whose activation overwrites the one product.
    """
    both = (1 if ungated else 2) * inner
    made = both * size + products.beside(hidden, both) + products.slab(hidden, both)
    last = inner * size + products.beside(inner, hidden)
    return max(0 if ungated else 3 * inner * size, made, last) if inner else 0


def _torch_mlp(spec: ModelSpec, size: int, products: Products) -> int:
    """Bytes of a token in what comes after attention with torch's operators, beside two hidden states.

    An MLP; or a mixture, computed expert by expert, beside what the MLP of its layer made, where it has one (and what a router of
    its own norm reads); or a norm, of a product too before that is added, with what this was made of.
    """
    hidden, mixture = spec.hidden, spec.mixture
    norm = (NORMED[size] - size) * hidden
    norm += (hidden + max(_q_size(spec), spec.mlp_size)) * size if spec.post_norms else 0
    most = max(norm, _gated_mlp(hidden, spec.mlp_size, size, products, ungated=bool(spec.ungated)))
    if mixture is None:
        return most
    waiting = (spec.mlp_size + hidden) * size if mixture.beside else 0
    return max(most, _torch_mixture(spec, mixture, size, products) + 24 * mixture.experts + waiting)


def _torch_mixture(spec: ModelSpec, mixture: Mixture, size: int, products: Products) -> int:
    """The same of experts, one after another, where each has all tokens: until an expert's result is there so is the last one's.

    The sum and that in float32, and what the last one made of gate and up, beside an expert's rows, or none for the shared one,
    and its gate and up; or three in float32, and what an expert made of gate and up, beside its result as products give it.
    """
    hidden, inner = spec.hidden, spec.intermediate
    gate_up = _gated_mlp(hidden, inner, size, products)
    if mixture.clamp is not None:
        gate_up = max(gate_up, inner * (2 * size + 5 * FLOAT))  # gate and up within their limits, and what is made of them
    gate_up = max(hidden * size + gate_up, _gated_mlp(hidden, mixture.shared, size, products))
    last = max(inner, mixture.shared)
    result = hidden * (FLOAT + size) + last * size + products.beside(last, hidden)
    return 2 * FLOAT * hidden + max(inner * size + gate_up, result)


def torch_activations(spec: ModelSpec, layers: Sequence[Loaded], machinery: Machinery) -> int:
    """Always live: the residual stream and its norm (2 hidden).

    In attention: q, k and v, their norms or rotated copies (with 8 bytes a feature of q while those are made), the result. In the
    MLP: gate and up while they are made (and a slab of the outputs at a time, where a CPU expands the weight), or with their
    product. Beside that what products take. The peak measured on a CPU, with 4096 tokens, hidden size 512 and MLPs of 256 and
    4096 in each dtype, is 4 MiB below to 42 MiB above this: what the allocator keeps is in RUNTIME.
    """
    size, hidden, mixture = ITEM_SIZE[machinery.dtype], spec.hidden, spec.mixture
    products = Products.of(layers, machinery)
    qkv = _qkv_size(spec)
    q = _q_size(spec)
    gates, delta = 2 * q if spec.output_gate else 0, delta_size(spec, layers)
    attention = (2 * qkv + gates + q) * size + max(8 * q, products.beside(hidden, qkv))
    if machinery.ops == "cpu":
        attention = _torch_attention(spec, layers, size, products)
    if spec.latent is not None:
        absorbing, attending = _latent_sizes(spec, spec.latent, layers)
        queries, features = spec.heads * spec.head_dim, spec.heads * spec.latent.rope
        turning = (2 * queries + spec.head_dim) * size + 8 * features
        down, rank = spec.latent.down(spec.heads), spec.latent.query_rank
        reading = max(products.beside(hidden, down), products.beside(rank, spec.heads * spec.latent.query) if rank else 0)
        attention = max(absorbing * size + reading, attending * size, turning)
        attention -= hidden * size if machinery.ops == "cpu" else 0  # what was normalized is gone by then
    attention = max(attention, delta * size + products.beside(hidden, delta))
    inner = spec.mlp_size if machinery.ops == "triton" else spec.widest_mlp
    mlp = _gated_mlp(hidden, inner, size, products)
    if mixture is not None and mixture.clamp is not None and machinery.ops != "triton":
        mlp = max(mlp, inner * (2 * size + 5 * 4))  # gate and up within their limits, and what is made of them, are in float32
    if mixture is not None and machinery.ops == "triton":
        counts = {"experts": mixture.experts, "active": mixture.active, "shared": mixture.shared}
        mixed = layout.triton_mixture_nbytes(hidden, spec.intermediate, size, **counts)
        mlp = max(mlp, mixed + 2 * hidden * size)  # the sum, and its norm
    elif mixture is not None:
        mlp += _mixed(spec, mixture, size)
    mlp += _beside(spec) * size
    if machinery.ops == "cpu":
        mlp = _torch_mlp(spec, size, products)
    return 2 * hidden * size + max(attention, mlp)
