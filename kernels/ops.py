"""The seam between a model and the arithmetic it runs on: one frozen record of callables per device.

Shapes in this file: T tokens of one step (all sequences packed one after another), S sequences, N outputs, K inputs,
Hq query heads, Hkv key/value heads, D head size, V vocabulary, B blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from kernels.activations import Activation
from kernels.batch import PagedBatch
from kernels.kv_cache import KVCache
from kernels.latent import Latents
from kernels.layout import ops_name
from kernels.parts import MLP, Beside, Clamp, Linear, Mixture, Norm, Told, Weight
from kernels.states import Delta, DeltaRule, StateCache
from quant.tensor import QuantTensor

__all__ = [
    "MLP", "Beside", "Clamp", "KVCache", "Linear", "Mixture", "Norm", "Ops", "PagedBatch", "StateCache", "Told", "Weight",
    "get_ops",
]  # fmt: skip


@dataclass(frozen=True)
class Layer:
    """Weights of one decoder layer, in the device's layout; norms [hidden] in the activations' dtype.

    Those of queries and keys are [head_dim] or, where they are of all heads at once, [heads * head_dim]. Where they come after
    rotation, both are multiplied into the queries: rotation leaves a vector's length as it is, and scores have products of both.
    So queries and keys are normalized with k_norm, which is all 1 then, before they rotate; q_norm is that product.
    """

    input_norm: Tensor | None  # before attention
    qkv: Linear
    o: Weight
    post_norm: Tensor | None  # before the MLP; without the one there is not the other
    mlp: MLP | Mixture
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    v_norm: Tensor | None = None  # ones
    moved: int = (
        0  # where values are keys: these have so many pairs of features that turn before the rest of a head (models/order.py)
    )
    shared: bool = False  # qkv is of queries alone: keys and values are in the cache of another layer
    attention_norm: Tensor | None = None  # of what attention adds
    mlp_norm: Tensor | None = None  # of what the MLP adds
    beside: Beside | None = None
    told: Told | None = None
    sinks: Tensor | None = None  # [heads]
    scalar: Tensor | None = None  # [1]: what the layer gives is multiplied by it
    window: int | None = None
    local: bool = False  # it rotates by the second table
    present: Callable[[], AbstractContextManager[object]] = nullcontext
    """Within it the weights can be read: those of some layers are streamed in for each step (kernels/triton/stream.py)."""
    streamed: int = 0  # bytes of these, which have no place of their own on the device
    act: Activation | None = None  # the MLP has no gate: down(act(up(x))), and gate_up is up
    delta: DeltaRule | None = None  # in place of attention: qkv is of what ``Ops.delta`` reads, o reads what it gives
    conv: Tensor | None = None  # the same of ``kernels.conv.short_conv``: its weights, float32 [kernel, channels]
    latents: Latents | None = None  # of attention over these: qkv gives queries, or their latents, and what is cached

    @property
    def only_mlp(self) -> MLP:
        """TypeError where there is a mixture."""
        if not isinstance(self.mlp, MLP):
            raise TypeError("these operators have no mixture of experts")
        return self.mlp

    @property
    def weights(self) -> tuple[Weight, ...]:
        beside = () if self.beside is None else self.beside.mixture.weights
        told = () if self.told is None else self.told.weights
        return (*self.qkv, self.o, *self.mlp.weights, *beside, *told)

    @property
    def nbytes(self) -> int:
        small = (self.input_norm, self.post_norm, self.q_norm, self.k_norm, self.v_norm, self.attention_norm, self.mlp_norm)
        weights = (*self.qkv, self.o, self.mlp)
        rest = (*small, self.sinks, self.scalar, self.delta, self.conv, self.beside, self.told, self.latents)
        return sum(one.nbytes for one in weights) + sum(one.nbytes for one in rest if one is not None)


class Pack(Protocol):
    def __call__(
        self,
        weight: QuantTensor | Tensor,
        *,
        dtype: torch.dtype,
        bias: Tensor | None = None,
        gated: bool = False,
        gelu: bool = False,
        clamp: Clamp | None = None,
        activation: str = "auto",
    ) -> Weight:
        """Lay out a canonical weight (QuantTensor, or dense [N, K]) for ``matmul`` with activations of ``dtype``.

        gated: the outputs are [gate; up] (N even), and the product is silu(gate) * up with N / 2 outputs; ``gelu``, in the
        approximation by tanh, takes the place of silu, and ``clamp`` that of all this. A bias is added before. activation: what
        activations may be rounded to for the product: "int8", "bf16" (they stay as they are), or "auto" (native kernels: int8 for
        integers and 4-bit floats unless dtype is float32). Operators without such a product leave activations alone, whatever is
        said. The int8 that a checkpoint itself asks for (QuantTensor.activation) is done by all.
        """


class Ungated(Protocol):
    def __call__(self, weight: Weight) -> Weight:
        """The same storage of a gated weight with a product of its own, gate and up [T, 2 * outputs], gate first.

        That is in the type in which the gated product multiplies both: what they make is then rounded to x's dtype, and rows to
        which nothing was added are what they are in the gated product. ``matmul`` takes it without ``residual`` and ``out``.
        """


class MatMul(Protocol):
    def __call__(
        self,
        x: Tensor,
        weight: Weight,
        *,
        norm: Norm | None = None,
        residual: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """x [T, K] @ weight.T + bias -> [T, outputs]; x is gathered first where the weight carries a permutation.

        norm: x is normalized first, as ``rms_norm`` does. A gated weight gives the gated product. residual [T, outputs] in x's
        dtype is added at last; it may be overwritten, and the result may be its storage: use the result only. out
        [T, outputs], contiguous: where the result is written, in its dtype; in x's dtype by default. Into float32 goes a product
        that was not rounded to x's dtype where the device can.
        """


class Embedding(Protocol):
    def __call__(self, ids: Tensor, table: Tensor | Weight, dtype: torch.dtype) -> Tensor:
        """Rows of table [V, hidden] for int64 ids [T] -> [T, hidden] in ``dtype``.

        A packed table (the head's, shared) is dequantized row by row: (q - zero) * scale, rounded once. TypeError where the
        operators cannot look up rows of a packed weight.
        """


class RMSNorm(Protocol):
    def __call__(self, x: Tensor, weight: Tensor, *, eps: float, offset: float = 0.0, residual: Tensor | None = None) -> Tensor:
        """x * (weight + offset) / sqrt(mean(x^2) + eps) over the last dimension, the mean in float32.

        With an offset, products and sum are in float32 too. residual, of x's shape and dtype, is added at last; as in ``matmul``
        it may be overwritten.
        """


class RopeStore(Protocol):
    def __call__(
        self,
        qkv: Tensor,
        heads: int,
        cache: KVCache,
        batch: PagedBatch,
        cos_sin: Tensor,
        *,
        q_norm: Norm | None = None,
        k_norm: Norm | None = None,
    ) -> Tensor:
        """Take qkv [T, (Hq + 2 Hkv) * D] apart, store keys and values in the cache at batch.slots, return q [T, Hq, D].

        ``heads`` is Hq; Hkv and D are the cache's. Where its values are its keys, qkv is [T, (Hq + Hkv) * D], queries and these
        alone; and [T, Hq * D] are queries of a layer that stores nothing, and reads what another one has. q and k are normalized
        per head where norms are given, and rotated by batch.positions: the first ``rotary`` features, in halves, not interleaved.
        cos_sin is float32 [max positions, rotary]: the cosines of ``rotary / 2`` frequencies, then their sines. qkv may be
        overwritten, and q be a view of it.
        """


class GateMul(Protocol):
    def __call__(self, gate_up: Tensor) -> Tensor:
        """silu(gate) * up, or gelu(gate) * up as in ``pack``, for gate_up [T, 2 * I] (gate first) -> [T, I]."""


class SigmoidMul(Protocol):
    def __call__(self, x: Tensor, gate: Tensor) -> Tensor:
        """x * sigmoid(gate), [T, N] each, of one dtype; x may be overwritten, and rows of the gate be anywhere."""


def sigmoid_mul(x: Tensor, gate: Tensor) -> Tensor:
    """As SigmoidMul, on any device."""
    return x * torch.sigmoid(gate)


class Mix(Protocol):
    def __call__(self, x: Tensor, mixture: Mixture, *, norm: Norm, alone: bool = False) -> Tensor:
        """x [T, hidden] + the weighted sum of the experts' products of x normalized; ``alone``: this sum.

        A token's experts are those of the router's largest scores, of equal ones the first; scores are the softmax over all
        experts, or what the mixture says, in float32, and a score is an expert's share. Sums are made in float32, expert after
        expert, and rounded once; what a shared MLP gives comes last, to the sum or (native kernels) to what that was rounded to.
        Only experts that some token has chosen are read.
        """


class JoinExperts(Protocol):
    def __call__(self, experts: Iterable[MLP], count: int) -> tuple[MLP, ...]:
        """``count`` experts, packed with activation "bf16", as ``mix`` wants them: each is dropped before the next is asked for.

        TypeError for what cannot be joined, which the memory plan refuses before.
        """


class Attention(Protocol):
    def __call__(
        self,
        q: Tensor,
        cache: KVCache,
        batch: PagedBatch,
        *,
        scale: float,
        window: int | None = None,
        cap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Causal attention of q [T, Hq, D] over the paged cache -> [T, Hq, D].

        A token at position p sees positions max(0, p - window + 1) .. p. Hq is a multiple of Hkv; query head h reads
        key/value head h // (Hq // Hkv). Scores are products times ``scale``; with a ``cap`` cap * tanh(score / cap).
        sinks [Hq], in q's dtype: one more score of each head in the softmax, as it is, of which there is no value.
        """


class ArgMax(Protocol):
    def __call__(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """(values float32 [R], ids int64 [R]) of the largest of each row of logits, float32 [R, V].

        Of equal ones the first; a NaN counts as the largest.
        """


class KthLargest(Protocol):
    def __call__(self, row: Tensor, k: int) -> float:
        """The k-th largest of row, float32 [n] without NaN, 1 <= k <= n; equal ones count one by one."""


class Sample(Protocol):
    def __call__(
        self,
        logits: Tensor,
        temperature: Tensor,
        top_k: Tensor | None,
        top_p: Tensor | None,
        min_p: Tensor | None,
        uniform: Tensor,
    ) -> Tensor:
        """One token a row of logits, float32 [R, V] -> ids int64 [R]; nobody waits for the device. All else is [R], on it too.

        temperature: float; 0 takes the largest logit, of equal ones the first. top_k: integers; what is not in 1 .. V cuts
        nothing, and ties at the k-th stay in. min_p: float, a share of the largest weight; top_p: float, a share of what these
        leave, whose ties enter by id; 1 cuts nothing. None: no row asks for this cut. The token is the first, by id, at which
        the running sum of the weights that are left exceeds ``uniform`` (float64 in [0, 1)) of their total. A row whose largest
        logit is not finite gives -1.
        """


@dataclass(frozen=True)
class Stack:
    """All of a model between token ids and the head."""

    embedding: Tensor | Weight  # [V, hidden]
    layers: tuple[Layer, ...]
    norm: Norm  # the last one; its eps and offset are those of all norms
    cos_sin: Tensor  # as in ``rope_store``
    heads: int
    scale: float  # of scores, as in ``attention``
    cap: float | None = None
    local_cos_sin: Tensor | None = None  # of layers that rotate otherwise
    embedding_scale: float = 1.0  # as the activations' dtype holds it
    gelu: bool = False  # where gate and up are weights of their own
    told: Callable[[Tensor, Tensor], Tensor] | None = None
    """What layers are told of tokens, [T, layers, features], by ids and hidden states before all layers; a row is contiguous."""

    @property
    def storing(self) -> int:
        """Layers up to the last one that stores something for later tokens: those behind it are there for wanted rows alone."""
        return max((number + 1 for number, layer in enumerate(self.layers) if not layer.shared), default=0)

    def rotation(self, layer: Layer) -> Tensor:
        """The table of a layer."""
        return self.cos_sin if self.local_cos_sin is None or not layer.local else self.local_cos_sin


Forward = Callable[[Tensor, PagedBatch], Tensor]
"""Token ids int64 [T] to hidden states [T, hidden] after the last norm. The next call may overwrite them.

Of a batch that says which rows are ``wanted`` (for a stack whose last layers store nothing), to those of these: [R, hidden].
"""


class Bind(Protocol):
    def __call__(
        self, stack: Stack, caches: Sequence[KVCache], *, states: Sequence[StateCache] = (), max_tokens: int
    ) -> Forward | None:
        """A model over these, for at most ``max_tokens`` tokens at once: what the operators would do one by one.

        A cache for each layer of attention (some may be one), and states for each of the others, in order.

        None where this model needs the operators.
        """


@dataclass(frozen=True)
class Ops:
    """Everything a model may ask of a device."""

    name: str  # "reference"; "cpu": torch's operators; "cpu-native": the kernels of kernels/cpu/native; "triton": a card's
    device: torch.device
    pack: Pack
    matmul: MatMul
    embedding: Embedding
    rms_norm: RMSNorm
    rope_store: RopeStore
    attention: Attention
    silu_mul: GateMul
    mix: Mix
    argmax: ArgMax
    kth_largest: KthLargest
    delta: Delta
    ungated: Ungated
    adapts: Callable[[Stack], bool] | None = None  # whether what ``bind`` makes of a model takes steps with adapters, too
    gelu_mul: GateMul | None = None
    join_experts: JoinExperts | None = None  # None: each expert stays a weight of its own
    bind: Bind | None = None
    sample: Sample | None = None  # None: tokens are drawn on the host
    sigmoid_mul: SigmoidMul = sigmoid_mul
    pack_table: Pack | None = None  # for an embedding alone; None: rows can be looked up in what ``pack`` makes of integers


def get_ops(device: str = "cpu", *, reference: bool = False, threads: int | None = None) -> Ops:
    """The fastest Ops for a device, or the plain-torch reference, which always works.

    threads: of native kernels (default: the physical cores); torch's operators take torch's own number. InputError where
    APPLIANCE_CPU_ISA asks for what this processor cannot run.
    """
    place = torch.device(device)
    name = ops_name(place.type, reference=reference)
    if name == "cpu-native":
        from kernels.cpu import native_ops

        return native_ops.make_ops(place, threads)
    if name == "cpu":
        from kernels.cpu import torch_ops

        return torch_ops.make_ops(place)
    if name == "triton":
        from kernels.triton import ops

        return ops.make_ops(place)
    from kernels import reference as plain

    return plain.make_ops(place)
