"""From a checkpoint to a Decoder, module by module: read, join, lay out, drop. Strict: nothing missing, nothing left over."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from typing import Any

import torch
from torch import Tensor

from kernels.latent import Latents
from kernels.layout import embedding_bits, head_bits
from kernels.ops import MLP, Beside, Clamp, Layer, Linear, Mixture, Ops, Told, Weight
from kernels.states import DeltaRule
from models.conv import ShortConv
from models.decoder import Decoder
from models.delta import DeltaNet
from models.heap import prompt_release, release_memory
from models.kv_scales import read_largest
from models.latent import Latent
from models.order import Part, apart, ordered, rotated_first, select, turning_first
from models.per_layer import ADDED, GATE, LAYER_NORM
from models.rope import cos_sin_table
from models.spec import Mixture as MixtureSpec
from models.spec import ModelSpec
from models.tables import FLOATS, Tables, TokenInputs, finite
from models.ungated import read_activation
from quant.checkpoint import Checkpoint
from quant.errors import CheckpointError
from quant.rows import dequantize_rows
from quant.tensor import QuantTensor

log = logging.getLogger("appliance.loader")

WORKERS = 4  # modules converted at a time: each needs a few times its own size


def load_model(
    checkpoint: Checkpoint,
    spec: ModelSpec,
    ops: Ops,
    *,
    dtype: torch.dtype,
    max_len: int,
    lm_head_dtype: str = "auto",
    embedding_dtype: str = "auto",
    activation: str = "auto",
    progress: Callable[[int, int], None] | None = None,
    take: Callable[[int, Layer], Layer] | None = None,
    workers: int | None = None,
    ends_first: bool = False,
) -> Decoder:
    """Load every weight for activations of ``dtype`` and positions below ``max_len``.

    ``lm_head_dtype`` (see kernels.layout.head_bits) is what an unquantized head is stored as, ``embedding_dtype`` the same of an
    embedding that is not one with the head; ``activation`` is for Ops.pack.
    ``progress`` is called with (bytes read, bytes in the files), ``take`` with the number of a layer and the layer as soon as it
    is there, from several threads: what it returns takes its place. ``workers`` layers are loaded at a time, by default one a
    thread and at most WORKERS; embedding and head beside them or, which takes less memory, before them (``ends_first``). Raises
    CheckpointError naming the tensors where some are missing, left over, of another shape than config.json says, or have scales
    that are not finite.
    """
    bits = head_bits(lm_head_dtype, ops=ops.name, dtype=str(dtype).removeprefix("torch."))
    ends = bits, embedding_bits(embedding_dtype)
    loader = _Loader(checkpoint, spec, ops, dtype, activation, ends, progress or (lambda done, total: None), take)
    with prompt_release():
        return loader.load(max_len, workers or min(torch.get_num_threads(), WORKERS), ends_first)


class _Loader:
    def __init__(
        self,
        checkpoint: Checkpoint,
        spec: ModelSpec,
        ops: Ops,
        dtype: torch.dtype,
        activation: str,
        bits: tuple[int | None, int | None],
        progress: Callable[[int, int], None],
        take: Callable[[int, Layer], Layer] | None,
    ) -> None:
        self.checkpoint, self.spec, self.ops, self.dtype, self.progress = checkpoint, spec, ops, dtype, progress
        self.activation, self.take = activation, take
        self.tables = Tables(checkpoint, spec, ops, dtype, activation, *bits)
        self.shapes = {spec.kind(number): {m.name: m for m in spec.layer_modules(number)} for number in spec.unlike}

    def load(self, max_len: int, count: int, ends_first: bool) -> Decoder:
        self._tell()
        threads = torch.get_num_threads()
        # Each module by one thread: torch's own threads would meet at every small operation, and on a busy machine wait there.
        workers = ThreadPoolExecutor(count, "load", initializer=torch.set_num_threads, initargs=(1,))
        try:
            ends = workers.submit(self._ends)
            if ends_first:
                ends.result()
            parts = [workers.submit(self._layer, number) for number in range(self.spec.layers)]
            (embedding, head, tied), inputs = ends.result()
            layers = []
            for part in parts:
                layers.append(part.result())
                self._tell()
        finally:
            workers.shutdown(cancel_futures=True)
            torch.set_num_threads(threads)
        norm = self._norm("model.norm", self.spec.hidden)
        spec = self.spec
        attentions = ((f"model.layers.{n}.self_attn", spec.heads_of(n)) for n in range(spec.layers) if spec.has_cache(n))
        kv_largest = tuple(read_largest(self.checkpoint, name, heads.count) for name, heads in attentions)
        unread, rest = _apart(self.checkpoint.leftover(), _unread(spec))
        ahead, rest = _apart(rest, spec.ahead)
        if rest:
            shown = ", ".join(rest[:5]) + (", ..." if len(rest) > 5 else "")
            raise CheckpointError(
                f"{self.checkpoint.index.directory}: {len(rest)} tensors have no place in a {self.spec.architecture}: {shown}"
            )
        if ahead:
            log.info("%d tensors that guess tokens ahead (%s, ...) are not read", len(ahead), ahead[0])
        if unread:
            log.info("%d tensors of keys and values (%s, ...) are not read: their layers share another's", len(unread), unread[0])
        if beside := self.checkpoint.index.beside_text:
            log.info("%d tensors of the vision tower and its projector are not read: this serves text alone", beside)
        total = self.checkpoint.index.total_bytes
        self.progress(total, total)
        release_memory()
        local = self.spec.local_rope
        return Decoder(
            spec=self.spec,
            ops=self.ops,
            embedding=embedding,
            layers=tuple(layers),
            norm=norm,
            head=head,
            cos_sin=cos_sin_table(self.spec.rope, max_len).to(self.ops.device),
            tied=tied,
            inputs=inputs,
            local_cos_sin=None if local is None else cos_sin_table(local, max_len).to(self.ops.device),
            kv_largest=kv_largest,
        )

    def _tell(self) -> None:
        tensors, consumed = self.checkpoint.index.tensors, self.checkpoint.consumed.copy()  # other threads go on reading
        self.progress(sum(tensors[name].nbytes for name in consumed), self.checkpoint.index.total_bytes)

    def _ends(self) -> tuple[tuple[Tensor | Weight, Weight, bool], TokenInputs | None]:
        """Embedding and head as Tables.ends has them, and then what layers are told of tokens."""
        net = self.spec.per_layer
        return self.tables.ends(), None if net is None else self.tables.inputs(net)

    def _layer(self, number: int) -> Layer:
        spec, prefix = self.spec, f"model.layers.{number}"
        mixture = spec.mixture_of(number)
        mlp = self._mlp(prefix) if mixture is None or mixture.beside else self._mixture(prefix, mixture)
        if spec.delta is not None and spec.is_linear(number):
            norms = self._delta(prefix, spec.delta)
        elif spec.conv is not None and spec.is_linear(number):
            norms = self._conv(prefix, spec.conv)
        else:
            norms = self._attention(prefix, number)
        if mixture is not None and mixture.beside:
            small = (self._norm(f"{prefix}.{name}", spec.hidden) for name in mixture.beside)
            norms["beside"] = Beside(self._mixture(prefix, mixture), *small)
        if spec.per_layer is not None:
            gate, down = (self._pack(self._read(prefix, name)) for name in (GATE, ADDED))
            norms["told"] = Told(gate, down, self._norm(f"{prefix}.{LAYER_NORM}", spec.hidden))
        if spec.layer_scalar:
            norms["scalar"] = self._vector(f"{prefix}.layer_scalar", 1)
        if spec.post_norms:
            norms["attention_norm"] = self._norm(f"{prefix}.{spec.norms[0]}", spec.hidden)
            norms["mlp_norm"] = self._norm(f"{prefix}.{spec.norms[2]}", spec.hidden)
        layer = Layer(
            input_norm=self._norm(f"{prefix}.{spec.input_norm}", spec.hidden) if spec.pre_norm else None,
            post_norm=self._norm(f"{prefix}.{spec.norms[1]}", spec.hidden) if spec.pre_norm else None,
            mlp=mlp,
            window=spec.windows[number],
            local=spec.rope_of(number) is spec.local_rope,
            act=read_activation(self.checkpoint, spec.ungated, prefix),
            **norms,
        )
        return layer if self.take is None else self.take(number, layer)

    def _attention(self, prefix: str, number: int) -> dict[str, Any]:
        """What a Layer has of it."""
        spec, heads = self.spec, self.spec.heads_of(number)
        if spec.latent is not None:
            return self._latent(prefix, spec.latent)
        parts: tuple[str, ...] = ("qkv",) if spec.fused_qkv else ("q", "k", "v")
        parts = parts[: 1 if heads.shared else 2 if heads.keys_only else 3]
        qkv = [self._read(prefix, f"self_attn.{part}_proj") for part in parts]
        rope = spec.rope_of(number)
        output = self._pack(self._read(prefix, "self_attn.o_proj"))
        found: dict[str, Any] = {"qkv": self._fuse(ordered(spec, number, qkv)), "o": output}
        if spec.qk_norm:
            both = [self._norm(f"{prefix}.self_attn.{name}", size) for name, size in spec.qk_norms(number)]
            if rope.spread:
                both = [one[turning_first(1, heads.size, rope.rotary_dim)] for one in both]
            if spec.late_qk_norm:  # see Layer
                both = [both[0] * both[1], torch.ones_like(both[1])]
            found |= dict(zip(("q_norm", "k_norm"), both, strict=False))
        if heads.keys_only:
            found["moved"] = rope.rotary_dim // 2 if rope.spread else 0
        if heads.shared:
            found["shared"] = True
        elif spec.v_norm:
            found["v_norm"] = torch.ones(heads.size, dtype=self.dtype, device=self.ops.device)
        if spec.sinks:
            found["sinks"] = self._vector(f"{prefix}.self_attn.sinks", spec.heads)
        return found

    def _latent(self, prefix: str, net: Latent) -> dict[str, Any]:
        """The same where attention is over latents: what rotates comes first, in halves, of each head and of the key."""
        queries = rotated_first(self.spec.heads, net.nope, net.rope, interleaved=net.interleaved)
        cached = rotated_first(1, net.rank, net.rope, interleaved=net.interleaved)
        name = "self_attn.q_a_proj" if net.query_rank else "self_attn.q_proj"
        first, kv = self._read(prefix, name), self._read(prefix, "self_attn.kv_a_proj_with_mqa")
        found = {"qkv": self._fuse([first if net.query_rank else select(first, queries), select(kv, cached)])}
        query = self._pack(select(self._read(prefix, "self_attn.q_b_proj"), queries)) if net.query_rank else None
        up, _ = self._read(prefix, "self_attn.kv_b_proj")
        dense = dequantize_rows(up, self.dtype) if isinstance(up, QuantTensor) else up.to(self.dtype)
        latents = Latents.of(
            dense.to(self.ops.device).view(self.spec.heads, net.nope + net.value, net.rank),
            net.nope,
            norm=self._norm(f"{prefix}.self_attn.kv_a_layernorm", net.rank),
            query_norm=self._norm(f"{prefix}.self_attn.q_a_layernorm", net.query_rank) if net.query_rank else None,
            query=query,
        )
        return {**found, "o": self._pack(self._read(prefix, "self_attn.o_proj")), "latents": latents}

    def _delta(self, prefix: str, net: DeltaNet) -> dict[str, Any]:
        """The same of a delta layer: one weight of queries, keys, values and z, and one of b and a, where that is possible."""
        parts = [self._read(prefix, name) for name, _ in net.inputs]
        if net.fused:
            parts = [select(part, order) for part, order in zip(parts, apart(net), strict=True)]
        half = len(parts) // 2
        small = {name: self._small(f"{prefix}.{name}", shape) for name, shape in net.small_tensors}
        conv, A_log, dt_bias, norm = small.values()
        rule = DeltaRule(net.key_heads, conv.squeeze(1).t().contiguous(), A_log.exp(), dt_bias, norm, self.spec.eps)
        output = self._pack(self._read(prefix, net.output))
        return {"qkv": self._fuse(parts[:half]) + self._fuse(parts[half:]), "o": output, "delta": rule}

    def _conv(self, prefix: str, net: ShortConv) -> dict[str, Any]:
        """The same of a layer of a short convolution."""
        ((name, shape),) = net.small_tensors
        taps = self._small(f"{prefix}.{name}", shape).squeeze(1).t().contiguous()
        parts = [self._pack(self._read(prefix, name)) for name in (net.inputs[0][0], net.output)]
        return {"qkv": (parts[0],), "o": parts[1], "conv": taps}

    def _mlp(self, prefix: str) -> MLP:
        names = ("up",) if self.spec.ungated else ("gate", "up")
        if self.spec.fused_gate_up:
            parts = self._halves(self._read(prefix, "mlp.gate_up_proj"))
        else:
            parts = [self._read(prefix, f"mlp.{name}_proj") for name in names]
        down, ordered = self._read(prefix, "mlp.down_proj"), self.spec.adapters is not None
        return self._gated(parts, down, gated=not self.spec.ungated, ordered=ordered)

    def _mixture(self, prefix: str, mixture: MixtureSpec) -> Mixture:
        """Expert by expert: one is laid out (and in its place among the others, if they are joined) before the next is read."""
        router = self._pack(self._read(prefix, f"{mixture.prefix}{mixture.router}"))
        names, join = (f"{mixture.prefix}experts.{number}" for number in range(mixture.experts)), self.ops.join_experts
        if join is None:
            experts = tuple(self._expert(prefix, name, mixture.expert) for name in names)
        else:
            exact = copy(self)
            exact.activation = "bf16"
            experts = join((exact._expert(prefix, name, mixture.expert) for name in names), mixture.experts)
        name = f"{mixture.name}.{mixture.shared_name}"
        return Mixture(
            router,
            experts,
            mixture.active,
            mixture.normalized,
            mixture.scores,
            self._correction(f"{prefix}.{mixture.correction}", mixture.experts) if mixture.correction else None,
            norm=self._router_norm(f"{prefix}.{mixture.router_norm}") if mixture.router_norm else None,
            gains=self._small(f"{prefix}.{mixture.gains}", (mixture.experts,)) if mixture.gains else None,
            gelu=self.spec.gelu,
            shared=self._expert(prefix, name, mixture.expert) if mixture.shared else None,
            shared_gate=self._pack(self._read(prefix, f"{mixture.name}.{mixture.shared_gate}")) if mixture.shared_gate else None,
        )

    def _expert(self, prefix: str, name: str, parts: Sequence[str]) -> MLP:
        *gate_up, down = (self._read(prefix, f"{name}.{part}") for part in parts)
        if len(gate_up) == 1:  # of both in turns
            gate_up = [select(gate_up[0], torch.arange(2 * self.spec.intermediate).view(-1, 2).t().flatten())]
        return self._gated(gate_up, down)

    def _gated(self, gate_up: list[Part], down: Part, *, gated: bool = True, ordered: bool = False) -> MLP:
        """``ordered``: what is between both stays in the order in which it is published, as what is added to either knows it."""
        weight, bias = down
        if isinstance(weight, QuantTensor) and weight.perm is not None and not ordered:
            # The inputs of down are the outputs of gate and up: put those in down's order once, and no step needs a gather.
            gate_up = [select(part, weight.perm) for part in gate_up]
            weight = weight.without_perm()
        return MLP(self._fuse(gate_up, gated=gated), self._pack((weight, bias)))

    def _read(self, prefix: str, module: str) -> Part:
        shape = self.shapes[self.spec.kind(int(prefix.rpartition(".")[2]))][module]
        name = f"{prefix}.{module}"
        weight = finite(name, self.checkpoint.weight(name, expect=(shape.N, shape.K)))
        return weight, self._vector(f"{name}.bias", shape.N) if shape.bias else None

    def _norm(self, name: str, size: int) -> Tensor:
        return self._vector(f"{name}.weight", size)

    def _vector(self, name: str, size: int) -> Tensor:
        vector = self.checkpoint.take(name, dtypes=FLOATS, shape=(size,))
        return vector.to(self.ops.device, self.dtype)

    def _router_norm(self, name: str) -> Tensor:
        """With the factor of what it normalizes."""
        size = self.spec.hidden
        vector = self.checkpoint.take(name, dtypes=FLOATS, shape=(size,)).float() * size**-0.5
        return vector.to(self.ops.device, self.dtype)

    def _correction(self, name: str, size: int) -> Tensor:
        """Float32 [size]; some have it in one row, [1, size]."""
        info = self.checkpoint.info(name)
        shape = (1, size) if info is not None and len(info.shape) == 2 else (size,)
        return self._small(name, shape).view(size)

    def _small(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Kept in float32, whatever it was published in."""
        return self.checkpoint.take(name, dtypes=FLOATS, shape=shape).to(self.ops.device, torch.float32)

    def _halves(self, part: Part) -> list[Part]:
        weight, bias = part
        size = self.spec.intermediate
        halves = weight.split([size, size]) if isinstance(weight, QuantTensor) else list(weight.split(size))
        biases = [None, None] if bias is None else list(bias.split(size))
        return list(zip(halves, biases, strict=True))

    def _fuse(self, parts: Sequence[Part], *, gated: bool = False) -> Linear:
        """One weight where the parts allow it (``gated``: of gate and up), else one each."""
        weights, biases = [w for w, _ in parts], [b for _, b in parts]
        bias = torch.cat([b for b in biases if b is not None]) if biases[0] is not None else None
        quantized = [w for w in weights if isinstance(w, QuantTensor)]
        if len(quantized) == len(weights) and QuantTensor.can_cat(quantized):
            return (self._pack((QuantTensor.cat(quantized), bias), gated=gated),)
        if not quantized:
            dense = torch.cat([w.to(self.dtype) for w in weights])  # type: ignore[union-attr]
            return (self._pack((dense, bias), gated=gated),)
        return tuple(self._pack(part) for part in parts)

    def _pack(self, part: Part, *, gated: bool = False) -> Weight:
        gelu, mixture = gated and self.spec.gelu, self.spec.mixture
        clamp = Clamp(*mixture.clamp) if gated and mixture is not None and mixture.clamp is not None else None
        weight, bias = part
        return self.ops.pack(weight, dtype=self.dtype, bias=bias, gated=gated, gelu=gelu, clamp=clamp, activation=self.activation)


def _apart(names: list[str], beginnings: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """(those that begin so, the others)."""
    return [name for name in names if name.startswith(beginnings)], [name for name in names if not name.startswith(beginnings)]


def _unread(spec: ModelSpec) -> tuple[str, ...]:
    """How tensors begin for which layers have no use that read another's keys and values; they are published all the same."""
    shared = (number for number in range(spec.layers) if spec.is_shared(number))
    return tuple(f"model.layers.{number}.self_attn.{name}." for number in shared for name in ("k_proj", "v_proj", "k_norm"))
