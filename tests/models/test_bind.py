"""All layers in one native call give, to the last bit, what the operators give one after another."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from kernels import reference
from kernels.batch import moved_up
from kernels.ops import MLP, Clamp, KVCache, Layer, Mixture, Ops, Weight
from kernels.scores import Scores
from models.decoder import Decoder
from models.loader import load_model
from models.spec import ModelSpec
from quant.checkpoint import Checkpoint
from tests.kernels.native import instruction_sets, native_ops
from tests.kernels.paged import make_step, wanting
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
        "ungated",
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


GEMMA4 = {
    "hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "global_head_dim": 40, "num_global_key_value_heads": 1, "attention_k_eq_v": True, "vocab_size": VOCAB,
    "vocab_size_per_layer_input": VOCAB, "hidden_size_per_layer_input": 0, "max_position_embeddings": 128, "sliding_window": 7,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}  # fmt: skip
KINDS = {
    "experts": {"enable_moe_block": True, "num_experts": 5, "top_k_experts": 2, "moe_intermediate_size": 40},
    "told": {
        "attention_k_eq_v": False, "hidden_size_per_layer_input": 20, "num_kv_shared_layers": 2, "use_double_wide_mlp": True,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def gemma4(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints of random models whose layers have heads of two kinds."""
    found = {}
    for kind, more in KINDS.items():
        folder = found[kind] = tmp_path_factory.mktemp(kind)
        config = {**GEMMA4, **more, "architectures": ["Gemma4ForCausalLM"]}
        spec, rng = ModelSpec.from_config(config), torch.Generator().manual_seed(3)
        tensors = {f"{m.name}.weight": 0.2 * torch.randn(m.N, m.K, generator=rng) for m in spec.modules()}
        tensors |= {name: 1 + 0.3 * torch.randn(size, generator=rng) for name, size in spec.small_tensors()}
        save_file(tensors, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(config))
    return found


@pytest.mark.parametrize("isa", instruction_sets())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cached", ["auto", "int8"])
def test_layers_with_other_heads(gemma4: dict[str, Path], isa: str, dtype: torch.dtype, kind: str, cached: str) -> None:
    """Values that are normalized, or keys; experts beside MLPs; layers that are told of tokens, and that store nothing."""
    with Checkpoint.open(gemma4[kind], "int8") as checkpoint:
        decoder = load_model(checkpoint, ModelSpec.from_config(checkpoint.config), make_ops(isa), dtype=dtype, max_len=128)
    shapes = [(heads.count, heads.size) for heads in decoder.spec.by_layer if not heads.shared]
    for sequences in ([(0, 1)], [(20, 1), (0, 33), (15, 1), (16, 2)]):
        batch, cache = make_step(sequences, kv_heads=1, head_dim=16)
        ids = torch.randint(VOCAB, (len(batch.positions),))
        place = {"dtype": str(dtype).removeprefix("torch.") if cached == "auto" else cached, "device": torch.device("cpu")}
        one, other = ([KVCache.zeros(*cache.k.shape[:2], *shape, **place) for shape in shapes] for _ in range(2))
        forward = decoder.bind(one, max_tokens=64)
        assert not isinstance(forward, partial)
        found, expected = forward(ids, batch), decoder.forward(ids, batch, other)
        assert torch.equal(found, expected) and bool(found.isfinite().all()) and bool(found.any())
        for mine, theirs in zip(one, other, strict=True):
            assert all(torch.equal(*pair) for pair in zip(mine.tensors, theirs.tensors, strict=True))


SOME = [
    ([(20, 1), (0, 33), (15, 1), (16, 2)], [1, 1, 1, 1]), ([(0, 40)], [1]), ([(3, 1), (9, 5), (0, 40)], [1, 3, 0]),
    ([(0, 20), (0, 40)], [1, 39]), ([(5, 1), (0, 40)], [1, 0]), ([(17, 40)], [0]),
]  # fmt: skip


@pytest.mark.parametrize("isa", instruction_sets())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", ["int8", "int4"])
def test_rows_that_are_wanted(gemma4: dict[str, Path], isa: str, dtype: torch.dtype, bits: str) -> None:
    """Layers that store nothing compute these alone: as operators do, as if all were wanted, and all is stored."""
    with Checkpoint.open(gemma4["told"], bits) as checkpoint:
        decoder = load_model(checkpoint, ModelSpec.from_config(checkpoint.config), make_ops(isa), dtype=dtype, max_len=128)
    shapes = [(heads.count, heads.size) for heads in decoder.spec.by_layer if not heads.shared]
    near = 1e-4 if dtype == torch.float32 else 0.05  # other shapes of the same sums
    for sequences, counts in SOME:
        batch, cache = make_step(sequences, kv_heads=1, head_dim=16)
        ids, few = torch.randint(VOCAB, (len(batch.positions),)), wanting(batch, counts)
        place = {"dtype": str(dtype).removeprefix("torch."), "device": torch.device("cpu")}
        one, other, whole = ([KVCache.zeros(*cache.k.shape[:2], *shape, **place) for shape in shapes] for _ in range(3))
        found, expected = decoder.bind(one, max_tokens=64)(ids, few), decoder.forward(ids, few, other)
        assert torch.equal(found, expected) and found.shape == (sum(counts), HIDDEN)
        assert few.wanted is not None
        every = decoder.forward(ids, batch, whole)[few.wanted.rows]
        assert bool(((found - every).abs() <= near).all())
        for mine, theirs, all_of_it in zip(one, other, whole, strict=True):
            assert all(torch.equal(*pair) for pair in zip(mine.tensors, theirs.tensors, strict=True))
            assert all(torch.equal(*pair) for pair in zip(mine.tensors, all_of_it.tensors, strict=True))


def test_rows_move_up_in_their_own_memory() -> None:
    for seed, (rows, kept) in enumerate([(1, 1), (600, 1), (600, 599), (1000, 700), (1000, 1000)]):
        chosen = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))[:kept].sort().values
        x = torch.randn(rows, 3, 2)
        expected = x[chosen]
        found = moved_up(x[:, 1:], chosen)
        assert torch.equal(found, expected[:, 1:]) and found.data_ptr() == x[:, 1:].data_ptr()
    assert moved_up(torch.ones(9, 2), torch.tensor([], dtype=torch.int64)).shape == (0, 2)


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
