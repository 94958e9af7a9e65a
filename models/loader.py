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
from kernels.layout import embedding_bits, head_bits, shares_table
from kernels.ops import MLP, Beside, Clamp, Layer, Linear, Mixture, Ops, Weight
from kernels.states import DeltaRule
from models.decoder import Decoder
from models.delta import DeltaNet
from models.heap import prompt_release, release_memory
from models.kv_scales import read_largest
from models.latent import Latent
from models.order import Part, apart, gated_queries, halves, rotated_first, select
from models.rope import cos_sin_table
from models.spec import Mixture as MixtureSpec
from models.spec import ModelSpec
from models.ungated import read_activation
from quant.checkpoint import Checkpoint
from quant.errors import CheckpointError
from quant.rows import dequantize_rows, quantize_rows
from quant.tensor import QuantTensor

log = logging.getLogger("appliance.loader")

FLOATS = ("F16", "BF16", "F32")
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
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
        self.head_bits, self.embedding_bits = bits
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
            embedding, head, tied = ends.result()
            layers = []
            for part in parts:
                layers.append(part.result())
                self._tell()
        finally:
            workers.shutdown(cancel_futures=True)
            torch.set_num_threads(threads)
        norm = self._norm("model.norm", self.spec.hidden)
        spec = self.spec
        attentions = ((f"model.layers.{n}.self_attn", spec.heads_of(n)) for n in range(spec.layers) if not spec.is_linear(n))
        kv_largest = tuple(read_largest(self.checkpoint, name, heads.count) for name, heads in attentions)
        ahead, rest = _apart(self.checkpoint.leftover(), self.spec.ahead)
        if rest:
            shown = ", ".join(rest[:5]) + (", ..." if len(rest) > 5 else "")
            raise CheckpointError(
                f"{self.checkpoint.index.directory}: {len(rest)} tensors have no place in a {self.spec.architecture}: {shown}"
            )
        if ahead:
            log.info("%d tensors that guess tokens ahead (%s, ...) are not read", len(ahead), ahead[0])
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
            local_cos_sin=None if local is None else cos_sin_table(local, max_len).to(self.ops.device),
            kv_largest=kv_largest,
        )

    def _tell(self) -> None:
        tensors, consumed = self.checkpoint.index.tensors, self.checkpoint.consumed.copy()  # other threads go on reading
        self.progress(sum(tensors[name].nbytes for name in consumed), self.checkpoint.index.total_bytes)

    def _ends(self) -> tuple[Tensor | Weight, Weight, bool]:
        """(embedding, head, whether they are one). A tied model may store the one table under either name."""
        if not self.spec.tie_embeddings:  # one after the other: the first table is gone before the second is read
            return self._embedding(self._table(EMBEDDING)), self._head(self._table(HEAD)), False
        stored = self._stored(EMBEDDING)
        if not (stored and self._stored(HEAD)):
            return self._shared(self._table(EMBEDDING if stored else HEAD))
        table, head = self._table(EMBEDDING), self._table(HEAD)
        if isinstance(head, Tensor) and isinstance(table, Tensor):
            if torch.equal(head.to(self.dtype), table.to(self.dtype)):
                return self._shared(table)
            log.warning(
                "config.json says that the head is tied to the embedding, but the checkpoint has both and they differ: using both"
            )
        return self._embedding(table), self._head(head), False

    def _stored(self, module: str) -> bool:
        return any(name.startswith(f"{module}.") for name in self.checkpoint.index.tensors)

    def _table(self, name: str) -> QuantTensor | Tensor:
        return self._finite(name, self.checkpoint.weight(name, expect=(self.spec.vocab, self.spec.hidden)))

    def _shared(self, table: QuantTensor | Tensor) -> tuple[Tensor | Weight, Weight, bool]:
        """Embedding and head of one table: one copy where the operators can look up rows of what they multiply with."""
        bits = table.bits if isinstance(table, QuantTensor) else self.head_bits
        shared = shares_table(self.ops.name, bits)
        if isinstance(table, Tensor) and shared and bits is None:
            dense = table.to(self.ops.device, self.dtype)
            return dense, self._pack((dense, None)), True
        if isinstance(table, Tensor) and shared and bits is not None:
            table = quantize_rows(table, bits)  # the table is gone before the packed copy is made
        if isinstance(table, QuantTensor) and shared and has_rows(table):
            packed = self._pack((table, None))
            return packed, packed, True
        embedding = self._embedding(table)
        if isinstance(embedding, Tensor) and bits is not None:
            log.info("the head is stored in int%d; the embedding it is tied to stays beside it in %s", bits, self.dtype)
        return embedding, self._head(table), False

    def _embedding(self, table: QuantTensor | Tensor) -> Tensor | Weight:
        """An embedding by itself, quantized where that is wanted and the checkpoint has not done it."""
        if isinstance(table, Tensor):
            if self.embedding_bits is None:
                return table.to(self.ops.device, self.dtype)
            table = quantize_rows(table, self.embedding_bits)
        if not has_rows(table):
            return dequantize_rows(table, self.dtype).to(self.ops.device)
        return (self.ops.pack_table or self.ops.pack)(table, dtype=self.dtype, activation=self.activation)

    def _head(self, head: QuantTensor | Tensor) -> Weight:
        """Packed, and quantized before where that is wanted and the checkpoint has not done it."""
        if isinstance(head, Tensor) and self.head_bits is not None:
            head = quantize_rows(head, self.head_bits)
        return self._pack((head, None))

    def _layer(self, number: int) -> Layer:
        spec, prefix = self.spec, f"model.layers.{number}"
        mixture = spec.mixture_of(number)
        mlp = self._mlp(prefix) if mixture is None or mixture.beside else self._mixture(prefix, mixture)
        if spec.delta is None or not spec.is_linear(number):
            norms = self._attention(prefix, number)
        else:
            norms = self._delta(prefix, spec.delta)
        if mixture is not None and mixture.beside:
            small = (self._norm(f"{prefix}.{name}", spec.hidden) for name in mixture.beside)
            norms["beside"] = Beside(self._mixture(prefix, mixture), *small)
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
        parts: tuple[str, ...] = ("qkv",) if spec.fused_qkv else ("q", "k") if heads.keys_only else ("q", "k", "v")
        qkv = [self._read(prefix, f"self_attn.{part}_proj") for part in parts]
        if spec.interleaved:  # scores stay the same where queries and keys change their order together
            qkv = [
                select(part, halves(spec, count)) for part, count in zip(qkv, (spec.heads, spec.kv_heads), strict=False)
            ] + qkv[2:]
        if spec.output_gate:
            queries, gates = gated_queries(spec.heads, spec.head_dim)
            qkv = [select(qkv[0], queries), *qkv[1:], select(qkv[0], gates)]
        found: dict[str, Any] = {"qkv": self._fuse(qkv), "o": self._pack(self._read(prefix, "self_attn.o_proj"))}
        if spec.qk_norm:
            q_norm, k_norm = (self._norm(f"{prefix}.self_attn.{name}", size) for name, size in spec.qk_norms(number))
            if spec.late_qk_norm:  # see Layer
                q_norm, k_norm = q_norm * k_norm, torch.ones_like(k_norm)
            found |= {"q_norm": q_norm, "k_norm": k_norm}
        if spec.v_norm:
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

    def _mlp(self, prefix: str) -> MLP:
        if self.spec.ungated:
            return self._gated([self._read(prefix, "mlp.up_proj")], self._read(prefix, "mlp.down_proj"), gated=False)
        if self.spec.fused_gate_up:
            return self._gated(self._halves(self._read(prefix, "mlp.gate_up_proj")), self._read(prefix, "mlp.down_proj"))
        gate, up, down = (self._read(prefix, f"mlp.{part}_proj") for part in ("gate", "up", "down"))
        return self._gated([gate, up], down)

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

    def _gated(self, gate_up: list[Part], down: Part, *, gated: bool = True) -> MLP:
        weight, bias = down
        if isinstance(weight, QuantTensor) and weight.perm is not None:
            # The inputs of down are the outputs of gate and up: put those in down's order once, and no step needs a gather.
            gate_up = [select(part, weight.perm) for part in gate_up]
            weight = weight.without_perm()
        return MLP(self._fuse(gate_up, gated=gated), self._pack((weight, bias)))

    def _read(self, prefix: str, module: str) -> Part:
        shape = self.shapes[self.spec.kind(int(prefix.rpartition(".")[2]))][module]
        name = f"{prefix}.{module}"
        weight = self._finite(name, self.checkpoint.weight(name, expect=(shape.N, shape.K)))
        return weight, self._vector(f"{name}.bias", shape.N) if shape.bias else None

    def _finite(self, name: str, weight: QuantTensor | Tensor) -> QuantTensor | Tensor:
        # Readers of 4-bit floats have looked at their scales: there are many, which would take four times as much for a moment.
        if isinstance(weight, QuantTensor) and weight.kind != "fp4" and not bool(torch.isfinite(weight.scales.float()).all()):
            raise CheckpointError(f"{name}: some of its scales are not finite numbers: the checkpoint is damaged")
        return weight

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


def has_rows(table: QuantTensor) -> bool:
    """Whether operators can look up rows of it. Of others (FP8, inputs in another order) a dense embedding is made."""
    return table.kind == "int" and table.perm is None
