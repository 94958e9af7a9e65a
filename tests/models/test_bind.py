"""All layers in one native call give, to the last bit, what the operators give one after another."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kernels import reference
from kernels.ops import MLP, Clamp, KVCache, Layer, Mixture, Ops, Weight
from kernels.scores import Scores
from models.decoder import Decoder
from models.spec import ModelSpec
from tests.kernels.native import instruction_sets, native_ops
from tests.kernels.paged import make_step
from tests.kernels.weights import random_weight

HIDDEN, HEADS, KV_HEADS, SIZE, INNER, VOCAB = 96, 6, 2, 16, 80, 50
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": 3,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": SIZE,
    "vocab_size": VOCAB,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
GEMMA = {
    **CONFIG,
    "architectures": ["Gemma3ForCausalLM"],
    "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
    "sliding_window": 7,
    "query_pre_attn_scalar": 20,
    "final_logit_softcapping": 3.0,
}
SHAPES = {"qkv": ((HEADS + 2 * KV_HEADS) * SIZE, HIDDEN), "o": (HIDDEN, HEADS * SIZE), "down": (HIDDEN, INNER)}


def make_ops(isa: str, threads: int = 2) -> Ops:
    native = native_ops(isa, threads)
    names = (
        "pack",
        "matmul",
        "embedding",
        "rms_norm",
        "rope_store",
        "attention",
        "silu_mul",
        "argmax",
        "kth_largest",
        "mix",
        "delta",
        "gelu_mul",
        "sigmoid_mul",
        "bind",
    )
    return Ops(name="cpu-native", device=torch.device("cpu"), **{name: getattr(native, name) for name in names})


def make_decoder(ops: Ops, dtype: torch.dtype, *, split: bool = False, mixture: bool = False, gemma: bool = False) -> Decoder:
    spec = replace(ModelSpec.from_config(GEMMA), cap=4.0) if gemma else ModelSpec.from_config(CONFIG)

    def linear(N: int, K: int, bias: bool = True, **options: object) -> Weight:
        return ops.pack(random_weight(N, K, group_size=32), dtype=dtype, bias=torch.randn(N) if bias else None, **options)  # type: ignore[arg-type]

    def norm(n: int) -> Tensor:
        return (1 + 0.1 * torch.randn(n)).to(dtype)

    def layer(i: int) -> Layer:
        gated = linear(2 * INNER, HIDDEN, gated=True, gelu=gemma)
        gate_up = tuple(linear(INNER, HIDDEN) for _ in range(2)) if split and i == 1 else (gated,)
        qkv, o, down = (linear(*SHAPES[name]) for name in ("qkv", "o", "down"))
        mlp: MLP | Mixture = MLP(gate_up, down)
        if mixture and i > 0:
            gpt_oss = i == 2  # biases, and gates that are clamped
            clamp = Clamp(1.0, 1.7) if gpt_oss else None
            gates = [linear(2 * INNER, HIDDEN, bias=gpt_oss, gated=True, clamp=clamp) for _ in range(7)]
            experts = [MLP((gate,), linear(*SHAPES["down"], bias=gpt_oss)) for gate in gates]
            mlp = Mixture(ops.pack(torch.randn(7, HIDDEN), dtype=dtype), tuple(experts), 3, i == 1)
            if i == 1:
                own = MLP((linear(2 * 40, HIDDEN, gated=True),), ops.pack(torch.randn(HIDDEN, 40), dtype=dtype))
                mlp = replace(mlp, shared=own, shared_gate=ops.pack(torch.randn(1, HIDDEN), dtype=dtype))
                mlp = replace(mlp, scores=Scores(sigmoid=True), correction=torch.randn(7) / 4)
        extra = {"q_norm": norm(SIZE), "k_norm": norm(SIZE)} if i == 1 else {"window": 7} if i == 2 else {}
        if mixture and i > 0:
            extra["sinks"] = torch.randn(HEADS).to(dtype)
        if gemma:
            extra |= {"attention_norm": norm(HIDDEN), "mlp_norm": norm(HIDDEN), "window": 7 if i else None, "local": i > 0}
        return Layer(norm(HIDDEN), (qkv,), o, norm(HIDDEN), mlp, **extra)  # type: ignore[arg-type]

    return Decoder(
        spec=spec,
        ops=ops,
        embedding=torch.randn(VOCAB, HIDDEN).to(dtype),
        layers=tuple(layer(i) for i in range(3)),
        norm=norm(HIDDEN),
        head=linear(VOCAB, HIDDEN),
        cos_sin=torch.rand(128, SIZE) * 2 - 1,
        tied=False,
        local_cos_sin=torch.rand(128, SIZE) * 2 - 1 if gemma else None,
    )


@pytest.mark.parametrize("isa", instruction_sets())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["plain", "mixture", "gemma", "normalized-after-alone"])
def test_one_call_is_the_operators_one_by_one(isa: str, dtype: torch.dtype, kind: str) -> None:
    after = kind == "normalized-after-alone"
    decoder = make_decoder(make_ops(isa), dtype, mixture=kind == "mixture", gemma=kind == "gemma" or after)
    if after:
        decoder = replace(decoder, layers=tuple(replace(one, input_norm=None, post_norm=None) for one in decoder.layers))
    for sequences in ([(0, 1)], [(20, 1), (0, 33), (15, 1), (16, 2)], [(63, 1)] * 9):
        batch, cache = make_step(sequences, kv_heads=KV_HEADS, head_dim=SIZE, dtype=dtype)
        ids = torch.randint(VOCAB, (len(batch.positions),))
        one, other = ([KVCache(cache.k.clone(), cache.v.clone()) for _ in range(3)] for _ in range(2))
        found, expected = decoder.bind(one, max_tokens=64)(ids, batch), decoder.forward(ids, batch, other)
        assert found.dtype == dtype and torch.equal(found, expected) and bool(found.isfinite().all())
        for mine, theirs in zip(one, other, strict=True):
            assert torch.equal(mine.k.nan_to_num(7), theirs.k.nan_to_num(7))
            assert torch.equal(mine.v.nan_to_num(7), theirs.v.nan_to_num(7))


@pytest.mark.parametrize(("split", "gemma"), [(False, False), (True, False), (True, True)])
def test_layers_that_need_the_operators_one_by_one(split: bool, gemma: bool) -> None:
    """Projections in parts, and operators without such a call."""
    ops = make_ops(instruction_sets()[0]) if split else reference.make_ops(torch.device("cpu"))
    decoder = make_decoder(ops, torch.float32, split=split, gemma=gemma)
    batch, cache = make_step([(5, 1), (0, 4)], kv_heads=KV_HEADS, head_dim=SIZE)
    ids = torch.randint(VOCAB, (5,))
    one, other = ([KVCache(cache.k.clone(), cache.v.clone()) for _ in range(3)] for _ in range(2))
    assert torch.equal(decoder.bind(one, max_tokens=64)(ids, batch), decoder.forward(ids, batch, other))


def test_more_tokens_than_were_said_are_refused() -> None:
    decoder = make_decoder(make_ops(instruction_sets()[0]), torch.float32)
    batch, cache = make_step([(0, 4)], kv_heads=KV_HEADS, head_dim=SIZE)
    with pytest.raises(ValueError, match="at most 3"):
        decoder.bind([cache] * 3, max_tokens=3)(torch.zeros(4, dtype=torch.int64), batch)
