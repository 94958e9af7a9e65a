"""The one decoder: attention and gated MLP (or a mixture of such) behind norms, driven by a ModelSpec, calling Ops only."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor

from kernels.adapters import Additions
from kernels.batch import moved_up
from kernels.conv import short_conv
from kernels.kv_cache import LARGEST
from kernels.latent import Latents
from kernels.layout import ADAPTED_AT_ONCE, SCALED_CACHES
from kernels.mixture import gated
from kernels.ops import MLP, Forward, GateMul, KVCache, Layer, Linear, Mixture, Norm, Ops, PagedBatch, Stack, Told, Weight
from kernels.states import DeltaRule, StateCache
from models.latent import EPS
from models.order import as_published
from models.plain import embedding_scale
from models.rope import query_scales
from models.spec import ModelSpec
from models.tables import TokenInputs

log = logging.getLogger("appliance.loader")


@dataclass(frozen=True)
class Decoder:
    """A loaded model. ``embedding`` [V, hidden] is also the head's storage where it is ``tied``."""

    spec: ModelSpec
    ops: Ops
    embedding: Tensor | Weight
    layers: tuple[Layer, ...]
    norm: Tensor
    head: Weight
    cos_sin: Tensor  # float32 [max_len, rotary_dim]
    tied: bool
    local_cos_sin: Tensor | None = None  # the same of layers that rotate otherwise
    inputs: TokenInputs | None = None  # what layers are told of tokens beside hidden states
    kv_largest: tuple[tuple[float, float] | None, ...] = ()  # of keys and values, where the checkpoint has scales

    @property
    def nbytes(self) -> int:
        """Bytes of all weights and tables, shared ones once."""
        head = (0 if self.tied else self.head.nbytes) + (0 if self.inputs is None else self.inputs.nbytes)
        return self.embedding.nbytes + sum(layer.nbytes for layer in self.layers) + self.norm.nbytes + head + self.table_bytes

    @property
    def table_bytes(self) -> int:
        """Of cosines and sines."""
        return self.cos_sin.nbytes + (0 if self.local_cos_sin is None else self.local_cos_sin.nbytes)

    @property
    def streamed(self) -> int:
        """Bytes of these that are not on the device, but come through buffers there."""
        return sum(layer.streamed for layer in self.layers)

    @property
    def dtype(self) -> torch.dtype:
        """Of activations."""
        return self.norm.dtype

    def given_scales(self, dtype: str) -> list[tuple[float, float] | None]:
        """What caches of ``dtype`` take as scales of keys and values instead of their own (KVCache.given)."""
        largest = self.kv_largest or (None,) * self.spec.kv_layers
        if dtype not in SCALED_CACHES or dtype == "int4" or self.spec.late_qk_norm:
            if any(largest):
                late = "keys are cached without the weights of their norm"
                why = late if self.spec.late_qk_norm else f"a cache in {dtype} has none such"
                log.info("the checkpoint's scales of keys and values are not used: %s", why)
            return [None] * len(largest)
        return [None if pair is None else (pair[0] / LARGEST[dtype], pair[1] / LARGEST[dtype]) for pair in largest]

    def forward(self, ids: Tensor, batch: PagedBatch, caches: Sequence[KVCache], states: Sequence[StateCache] = ()) -> Tensor:
        """Token ids int64 [T] -> hidden states [T, hidden] after the final norm, or [R, hidden] of the rows that are wanted.

        Writes keys and values into ``caches``, one for each layer that has such, and what other layers remember into ``states``,
        one for each of these.
        """
        ops, scales = self.ops, query_scales(self.spec.rope, batch.positions)
        hidden = ops.embedding(ids, self.embedding, self.dtype)
        if self.stack.embedding_scale != 1.0:
            hidden *= self.stack.embedding_scale
        told = None if self.inputs is None else self._told(self.inputs, ids, hidden)
        self._check(caches, states)
        kept, kept_states = (caches[number] for number in self.spec.caches), iter(states)
        for number, layer in enumerate(self.layers):
            if number == self.stack.storing and (wanted := batch.wanted) is not None:
                batch, hidden = wanted.batch, moved_up(hidden, wanted.rows)
                scales = None if scales is None else scales[wanted.rows]
                told = None if told is None else moved_up(told, wanted.rows)
                if not len(hidden):
                    return hidden
            more = Additions(ops.matmul, batch.adapters, number)
            with layer.present():
                x = self._over_tokens(layer, hidden, batch, kept, kept_states, scales, more)
                hidden = self._add(x, layer.o, layer.attention_norm, hidden, more, "o")
                del x  # what the MLP makes may take its place
                hidden = self._mlp(layer, hidden, more)
                if layer.told is not None and told is not None:
                    hidden = self._add_told(layer.told, hidden, told[:, number])
                hidden = hidden if layer.scalar is None else hidden.mul_(layer.scalar)
        return ops.rms_norm(hidden, **self.stack.norm._asdict())

    def _over_tokens(
        self,
        layer: Layer,
        hidden: Tensor,
        batch: PagedBatch,
        caches: Iterator[KVCache],
        states: Iterator[StateCache],
        scales: Tensor | None,
        more: Additions,
    ) -> Tensor:
        """What a layer makes of tokens and those before them, before the output projection; it takes the next cache or state."""
        if layer.delta is not None:
            return self._delta(layer, layer.delta, hidden, batch, next(states))
        if layer.conv is not None:
            x = self._linear(hidden, layer.qkv, self._before(layer.input_norm))
            return short_conv(x, layer.conv, next(states), batch)
        if layer.latents is not None:
            return self._latent(layer, layer.latents, hidden, batch, next(caches))
        return self._attention(layer, hidden, batch, next(caches), scales, more)

    @cached_property
    def stack(self) -> Stack:
        """All that comes before the head."""
        spec = self.spec
        return Stack(
            self.embedding,
            self.layers,
            self._norm(self.norm),
            self.cos_sin,
            spec.heads,
            spec.scale,
            spec.cap,
            self.local_cos_sin,
            embedding_scale(spec, self.dtype),
            spec.gelu,
            None if self.inputs is None else partial(self._told, self.inputs),
        )

    def bind(self, caches: Sequence[KVCache], *, states: Sequence[StateCache] = (), max_tokens: int) -> Forward:
        """``forward`` over these, for at most ``max_tokens`` tokens; in one call where the operators can do that."""
        # Queries that are scaled by their position need the operators, where a position may be beyond that where it begins.
        scaled = self.spec.rope.query_beta != 0 and self.spec.rope.query_span < len(self.cos_sin)
        bind = None if scaled or self.spec.one_by_one else self.ops.bind
        self._check(caches, states)
        each = [caches[number] for number in self.spec.caches]
        bound = None if bind is None else bind(self.stack, each, states=states, max_tokens=max_tokens)
        one_by_one = partial(self.forward, caches=caches, states=states)
        adapts = self.spec.adapters is None or (self.ops.adapts is not None and self.ops.adapts(self.stack))
        if bound is None or adapts:
            return bound or one_by_one
        return lambda ids, batch: (one_by_one if batch.adapters else bound)(ids, batch)

    def _check(self, caches: Sequence[KVCache], states: Sequence[StateCache]) -> None:
        if (len(caches), len(states)) != (found := (self.spec.kv_layers, sum(self.spec.linear))):
            raise ValueError(f"{len(caches)} caches and {len(states)} states, but there are layers for {found[0]} and {found[1]}")

    def _told(self, inputs: TokenInputs, ids: Tensor, hidden: Tensor) -> Tensor:
        """[T, layers, features]: what each layer is told of tokens whose embeddings are ``hidden``."""
        net, ops = self.spec.per_layer, self.ops
        assert net is not None
        rows = ops.embedding(ids, inputs.table, self.dtype).mul_(net.size**0.5)
        projected = ops.matmul(hidden, inputs.projection)
        # The model divides this by the root of the hidden size; a norm sees nothing of that but in its epsilon.
        norm = Norm(inputs.norm, self.spec.eps * self.spec.hidden)
        told = ops.rms_norm(projected.view(-1, net.size), **norm._asdict(), residual=rows.view(-1, net.size))
        return told.mul_(0.5**0.5).view(-1, net.layers, net.size)[:, net.first :]

    def _add_told(self, mine: Told, hidden: Tensor, told: Tensor) -> Tensor:
        """[T, hidden] and what a layer makes of ``told`` [T, features]."""
        assert self.ops.gelu_mul is not None  # the planner refuses such models where operators have none
        gated = self.ops.gelu_mul(torch.cat((self.ops.matmul(hidden, mine.gate), told), dim=1))
        return self._add(gated, mine.down, mine.norm, hidden)

    def logits(self, hidden: Tensor, out: Tensor) -> Tensor:
        """Logits of hidden states [R, hidden] into ``out``, float32 [R, V]."""
        logits, spec = self.ops.matmul(hidden, self.head, out=out), self.spec
        if spec.logit_divisor != 1.0:
            logits.div_(spec.logit_divisor)
        return logits if spec.logit_cap is None else logits.div_(spec.logit_cap).tanh_().mul_(spec.logit_cap)

    def _attention(
        self, layer: Layer, hidden: Tensor, batch: PagedBatch, cache: KVCache, scales: Tensor | None, more: Additions
    ) -> Tensor:
        """[T, Hq * D] before the output projection. ``scales``: of queries, float32 [T]."""
        spec, ops, cos_sin = self.spec, self.ops, self.stack.rotation(layer)
        norm, size = self._before(layer.input_norm), cache.head_dim
        qkv = more("qkv", self._linear(hidden, layer.qkv, norm), hidden, norm)
        kv_heads = 0 if layer.shared else cache.k.shape[2]
        if layer.v_norm is not None:
            qkv = self._with_values(qkv, layer.v_norm, kv_heads * size, layer.moved)
        gate = qkv[:, (spec.heads + 2 * kv_heads) * size :]  # nothing where there is none
        qkv = qkv[:, : (spec.heads + 2 * kv_heads) * size]
        q_norm, k_norm = self._before(layer.q_norm), self._before(layer.k_norm)
        if spec.whole_qk_norm and q_norm is not None and k_norm is not None:
            q, k, _ = qkv.split([spec.q_size, spec.kv_size, spec.kv_size], dim=1)
            q.copy_(ops.rms_norm(q, **q_norm._asdict()))
            k.copy_(ops.rms_norm(k, **k_norm._asdict()))
            q_norm = k_norm = None
        late = layer.q_norm if spec.late_qk_norm else None
        q = ops.rope_store(qkv, spec.heads, cache, batch, cos_sin, q_norm=q_norm if late is None else k_norm, k_norm=k_norm)
        q = q if late is None else q.mul_(late)
        q = q if scales is None else q.mul_(scales.to(q.dtype)[:, None, None])
        found = ops.attention(q, cache, batch, scale=spec.scale, window=layer.window, cap=spec.cap, sinks=layer.sinks).flatten(1)
        return ops.sigmoid_mul(found, gate) if spec.output_gate else found

    def _with_values(self, qkv: Tensor, ones: Tensor, kv: int, moved: int) -> Tensor:
        """[T, (Hq + 2 Hkv) * D]: queries, keys, and normalized the last ``kv`` features, which are values, or keys and values.

        Keys have ``moved`` pairs of features before the rest of each head, which values have in their places.
        """
        keys_end = self.spec.heads * len(ones) + kv
        values = self.ops.rms_norm(qkv[:, -kv:].reshape(-1, len(ones)), **self._norm(ones)._asdict())
        values = as_published(values, moved) if moved else values
        return torch.cat((qkv[:, :keys_end], values.view(len(qkv), kv)), dim=1)

    def _latent(self, layer: Layer, latents: Latents, hidden: Tensor, batch: PagedBatch, cache: KVCache) -> Tensor:
        """[T, heads * value] before the output projection; ``cache`` has values that are its keys."""
        spec, ops = self.spec, self.ops
        qkv = self._absorbed(layer, latents, hidden)
        q = ops.rope_store(qkv, spec.heads, cache, batch, self.stack.rotation(layer))
        del qkv
        found = ops.attention(q, cache, batch, scale=spec.scale)
        del q  # large ones, of which no more than two are there at once
        return latents.results(found)

    def _absorbed(self, layer: Layer, latents: Latents, hidden: Tensor) -> Tensor:
        """Queries and keys of a layer of latent attention, not yet rotated."""
        x, net = self._linear(hidden, layer.qkv, self._before(layer.input_norm)), self.spec.latent
        assert net is not None
        queries, rotated, latent = x.split([x.shape[1] - net.size, net.rope, net.rank], dim=1)
        if latents.query is not None and latents.query_norm is not None:
            queries = self.ops.matmul(queries, latents.query, norm=Norm(latents.query_norm, EPS))
        return latents.absorbed(queries, rotated, self.ops.rms_norm(latent, latents.norm, eps=EPS))

    def _delta(self, layer: Layer, rule: DeltaRule, hidden: Tensor, batch: PagedBatch, states: StateCache) -> Tensor:
        """[T, value heads * value_dim] before the output projection."""
        norm, parts = self._before(layer.input_norm), 1 if rule.width == layer.qkv[0].N else 2
        x, gates = (self._linear(hidden, some, norm) for some in (layer.qkv[:parts], layer.qkv[parts:]))
        return self.ops.delta(x, gates, rule, states, batch)

    def _mlp(self, layer: Layer, hidden: Tensor, more: Additions) -> Tensor:
        """[T, hidden] after the MLP, the mixture of experts, or both."""
        ops, norm = self.ops, self._before(layer.post_norm)
        if isinstance(layer.mlp, Mixture):
            assert norm is not None  # no mixture is without one
            return ops.mix(hidden, layer.mlp, norm=norm)
        if layer.act is not None:
            inner = layer.act(more("gate_up", self._linear(hidden, layer.mlp.gate_up, norm), hidden, norm))
            return self._add(inner, layer.mlp.down, layer.mlp_norm, hidden, more, "down")
        mlp, multiply = layer.mlp, ops.gelu_mul if self.spec.gelu else ops.silu_mul
        assert multiply is not None  # the planner refuses such models where operators have none
        if more:
            inner = self._gated_apart(mlp, multiply, hidden, norm, more)
        else:
            inner = gated(ops.matmul, multiply, hidden, mlp.gate_up, norm)
        if layer.beside is None or layer.mlp_norm is None:
            return self._add(inner, mlp.down, layer.mlp_norm, hidden, more, "down")
        mixed = ops.mix(hidden, layer.beside.mixture, norm=self._norm(layer.beside.norm), alone=True)
        mixed = ops.rms_norm(mixed, **self._norm(layer.beside.mixture_norm)._asdict())
        mixed = self._add(inner, mlp.down, layer.beside.mlp_norm, mixed, more, "down")
        return ops.rms_norm(mixed, **self._norm(layer.mlp_norm)._asdict(), residual=hidden)

    def _gated_apart(self, mlp: MLP, multiply: GateMul, hidden: Tensor, norm: Norm | None, more: Additions) -> Tensor:
        """What ``multiply`` makes of gate and up with what adapters add to both, [T, intermediate]: some rows at a time."""
        parts, made = mlp.gate_up, []
        if len(parts) == 1:
            parts = (self.ops.ungated(parts[0]),)
        for first in range(0, len(hidden), ADAPTED_AT_ONCE):
            x = hidden[first : first + ADAPTED_AT_ONCE]
            made.append(multiply(more("gate_up", self._linear(x, parts, norm), x, norm, first)).to(hidden.dtype))
        return made[0] if len(made) == 1 else torch.cat(made)

    def _add(
        self, x: Tensor, weight: Weight, norm: Tensor | None, hidden: Tensor, more: Additions | None = None, slot: str = ""
    ) -> Tensor:
        """hidden + x @ weight.T, [T, hidden], with what adapters add; the product is normalized where there is a norm for it."""
        product = self.ops.matmul(x, weight, residual=hidden if norm is None else None)
        product = product if more is None else more(slot, product, x)
        return product if norm is None else self.ops.rms_norm(product, **self._norm(norm)._asdict(), residual=hidden)

    def _before(self, weight: Tensor | None) -> Norm | None:
        return None if weight is None else self._norm(weight)

    def _norm(self, weight: Tensor) -> Norm:
        return Norm(weight, self.spec.eps, self.spec.norm_offset)

    def _linear(self, x: Tensor, weights: Linear, norm: Norm | None) -> Tensor:
        if len(weights) == 1:
            return self.ops.matmul(x, weights[0], norm=norm)
        return torch.cat([self.ops.matmul(x, weight, norm=norm) for weight in weights], dim=1)
