"""Tensor parallel: what one of several cards holds of a model. Planned only: this version serves on one card.

As in vLLM and Megatron-LM: q, k, v, gate and up are split by outputs, o and down by inputs, embedding and head by tokens of the
vocabulary; norms are on every card; a key-value head is on several cards where there are fewer heads than cards.
"""

from __future__ import annotations

from dataclasses import replace

from appliance.memory.demand import Demand
from appliance.memory.devices import MIB
from models.spec import ModelSpec
from quant.errors import InputError
from quant.scheme import QuantScheme

VOCAB_STEP = 64  # a card's share of the vocabulary is filled up to a multiple, as in vLLM
EXCHANGE_BYTES = 256 * MIB
"""What cards take to add up each other's sums: NCCL's buffers of 4 MiB (NCCL_BUFFSIZE), for 32 channels in two algorithms. An
estimate: nothing here was measured on several cards."""


def shard(spec: ModelSpec, ranks: int) -> ModelSpec:
    """The part of the model on one of ``ranks`` cards. Raises InputError where its heads or its MLP do not divide."""
    if ranks > 1 and spec.wide is not None:
        raise InputError(f"{spec.architecture}, whose layers have different heads, is not divided among cards: plan it for one")
    if spec.latent is not None and ranks > 1:
        raise InputError(f"{spec.architecture}, whose attention is over latents, is not divided among cards: plan it for one")
    shared = spec.kv_heads < ranks and ranks % spec.kv_heads == 0
    counts = [
        ("attention heads", spec.heads),
        ("key-value heads", ranks if shared else spec.kv_heads),
        *(("features of the MLP", count) for count in _features(spec)),
    ]
    for what, count in counts:
        if count % ranks:
            able = [n for n in range(2, 65) if _divides(spec, n)]
            hint = f"; {', '.join(map(str, able))} would do" if able else "; no number of cards would do"
            raise InputError(f"tensor parallel over {ranks} cards: {count} {what} are no multiple of {ranks}{hint}")
    vocab = -(-spec.vocab // ranks) if ranks > 1 else spec.vocab
    mixture = spec.mixture
    if mixture is not None:
        mixture = replace(mixture, shared=mixture.shared // ranks, dense=mixture.dense // ranks)
    return replace(
        spec,
        heads=spec.heads // ranks,
        kv_heads=1 if shared else spec.kv_heads // ranks,
        intermediate=spec.intermediate // ranks,
        mixture=mixture,
        vocab=-(-vocab // VOCAB_STEP) * VOCAB_STEP if ranks > 1 else vocab,
    )


def _divides(spec: ModelSpec, ranks: int) -> bool:
    kv = spec.kv_heads % ranks == 0 or ranks % spec.kv_heads == 0
    return spec.heads % ranks == 0 and kv and not any(count % ranks for count in _features(spec))


def _features(spec: ModelSpec) -> tuple[int, ...]:
    """Of an expert or the MLP, of what stands beside experts, and of layers without such."""
    return spec.intermediate, 0 if spec.mixture is None else spec.mixture.shared, spec.mlp_size


def check_layout(spec: ModelSpec, part: ModelSpec, scheme: QuantScheme, ranks: int) -> None:
    """Raises InputError where a weight's groups, blocks or order do not let it be split; ``part`` is shard(spec, ranks)."""
    if ranks == 1:
        return
    pairs = ((n, *both) for n in spec.unlike for both in zip(part.layer_modules(n), spec.layer_modules(n), strict=True))
    for number, module, whole in pairs:
        name = f"model.layers.{number}.{module.name}"
        stored = scheme.for_module(name)
        if not stored.quantized:
            continue
        by_inputs = module.K != whole.K
        reason = None
        if by_inputs and stored.act_order:
            reason = "its inputs have an order of their own (desc_act)"
        elif by_inputs and stored.group_size > 0 and module.K % stored.group_size:
            reason = f"{module.K} inputs a card are no whole groups of {stored.group_size}"
        elif stored.block is not None and (module.K % stored.block[1] or module.N % stored.block[0]):
            reason = f"{module.N} x {module.K} a card are no whole blocks of {stored.block[0]} x {stored.block[1]}"
        if reason is not None:
            raise InputError(f"tensor parallel over {ranks} cards: {name} cannot be split: {reason}")


def with_exchange(demand: Demand, spec: ModelSpec, ranks: int) -> Demand:
    """What one of several cards asks of its memory: with buffers for exchange, and logits of the whole ``spec``'s vocabulary."""
    if ranks == 1:
        return demand
    return replace(demand, vocab=spec.vocab, exchange=EXCHANGE_BYTES, logits_row_bytes=demand.logits_row_bytes + 4 * spec.vocab)
