"""A whole model in one call gives what the operators give one by one, and what the reference gives; its launches are counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import reference
from kernels.ops import MLP, KVCache, Layer, Linear, Ops, PagedBatch, Weight
from models.decoder import Decoder
from models.spec import ModelSpec
from tests.kernels.paged import make_step
from tests.kernels.triton.conftest import DEVICE
from tests.kernels.triton.tensors import EXACT, held, poison  # noqa: F401
from tests.kernels.weights import random_weight

from kernels.triton import attention_decode, eight, elementwise, matmul, norm, quantize, rope, rounded, tiled  # isort: skip
from kernels.triton.ops import make_ops  # isort: skip
from kernels.tune import Launch  # isort: skip

LIMIT = {torch.float16: 1e-2, torch.bfloat16: 1e-1 if DEVICE == "cpu" else 3e-2}  # the interpreter cuts bfloat16 off
STEPS = ([(20, 1), (0, 1), (35, 1), (129, 1)], [(16, 1), (0, 5), (15, 3)])
FEW = ([(12, 1), (0, 1)], [(10, 5)])  # of Gemma: what is cut and what is not, in and beyond the window
LAYERS, VOCAB = 2, 50


@dataclass(frozen=True)
class Shape:
    """A model's sizes, and in what it differs from the plainest."""

    heads: int = 4
    kv_heads: int = 2
    size: int = 32
    hidden: int = 128
    inner: int = 256
    bits: int = 4
    group: int | None = 64
    bias: bool = False
    qk_norm: bool = False
    window: int | None = None
    act_order: bool = False
    dense: bool = False
    activation: str | None = None  # as in QuantTensor
    joined: bool = True
    cache: str | None = None  # as in KVCache.dtype; None: as the activations
    gemma: int = 0  # which of them it is


SHAPES = {
    "plain": Shape(),
    "heads of 48, normed, biased": Shape(size=48, qk_norm=True, bias=True, hidden=200, inner=130),
    "heads of 80, a window": Shape(heads=3, kv_heads=1, size=80, hidden=129, window=9),
    "act-order and bytes": Shape(act_order=True, bits=8, group=None, bias=True),
    "apart": Shape(joined=False),
    "dense": Shape(dense=True),
    "activations in int8": Shape(hidden=256, bits=8, group=None, bias=True, activation="int8-token"),
    "cache of FP8": Shape(size=48, hidden=64, inner=64, cache="fp8_e4m3"),
    "cache of int4": Shape(size=16, hidden=64, inner=64, window=9, cache="int4"),
    "gemma 2": Shape(hidden=136, inner=66, size=16, window=9, gemma=2),
    "gemma 3, apart": Shape(
        heads=2, kv_heads=1, size=64, inner=64, window=9, qk_norm=True, joined=False, act_order=True, gemma=3
    ),
}


def make_decoder(ops: Ops, shape: Shape, dtype: torch.dtype) -> Decoder:
    """The same model for the same seed, whatever the operators."""
    torch.manual_seed(0)
    seeds = iter(range(1000))

    def linear(N: int, K: int, **options: Any) -> Weight:
        bias = torch.randn(N) if shape.bias else None
        weight = random_weight(
            N,
            K,
            bits=shape.bits,
            group_size=shape.group,
            act_order=shape.act_order,
            activation=shape.activation,
            seed=next(seeds),
            scale_dtype=dtype,
        )
        given = replace(weight, scales=weight.scales * (30 * K**-0.5 * 2 ** (4 - shape.bits)))
        return ops.pack(given.dequantize() if shape.dense else given, dtype=dtype, bias=bias, **options)

    def gain(n: int) -> Tensor:
        return (float(not shape.gemma) + 0.1 * torch.randn(n)).to(dtype).to(ops.device)

    def table() -> Tensor:
        return (torch.rand(512, shape.size) * 2 - 1).to(ops.device)

    def joined(sizes: tuple[int, ...], **options: bool) -> Linear:
        if shape.joined:
            return (linear(sum(sizes), shape.hidden, **options),)
        return tuple(linear(size, shape.hidden) for size in sizes)

    def layer(i: int) -> Layer:
        queries, keys, window = shape.heads * shape.size, shape.kv_heads * shape.size, shape.window if i % 2 else None
        return Layer(
            gain(shape.hidden),
            joined((queries, keys, keys)),
            linear(shape.hidden, queries),
            gain(shape.hidden),
            MLP(joined((shape.inner, shape.inner), gated=True, gelu=shape.gemma > 0), linear(shape.hidden, shape.inner)),
            window=window,
            local=window is not None,
            **{name: gain(shape.size) for name in ("q_norm", "k_norm") if shape.qk_norm},
            **{name: gain(shape.hidden) for name in ("attention_norm", "mlp_norm") if shape.gemma},
        )

    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.inner,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.size,
        "vocab_size": VOCAB,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    }
    if shape.gemma:
        config |= {"architectures": [f"Gemma{shape.gemma}ForCausalLM"], "query_pre_attn_scalar": 50, "sliding_window": 9}
        config |= {"attn_logit_softcapping": 2.0} if shape.gemma == 2 else {}
    made = tuple(layer(i) for i in range(LAYERS))
    return Decoder(
        spec=ModelSpec.from_config(config),
        ops=ops,
        embedding=torch.randn(VOCAB, shape.hidden).to(dtype).to(ops.device),
        layers=made,
        norm=gain(shape.hidden),
        head=linear(VOCAB, shape.hidden),
        cos_sin=table(),
        tied=False,
        local_cos_sin=table() if shape.gemma == 3 else None,
    )


def step(
    sequences: list[tuple[int, int]], shape: Shape, dtype: torch.dtype
) -> Callable[[torch.device], tuple[Tensor, PagedBatch, list[KVCache]]]:
    """What brings the ids, the batch and fresh caches to a device."""
    batch, cache = make_step(sequences, kv_heads=shape.kv_heads, head_dim=shape.size, dtype=dtype)
    ids = torch.randint(VOCAB, (len(batch.positions),))
    kept = cache if shape.cache is None else held(cache, shape.cache)[0]

    def on(device: torch.device) -> tuple[Tensor, PagedBatch, list[KVCache]]:
        names = ("positions", "slots", "query_starts", "seq_lens", "block_tables")
        moved = replace(batch, **{name: getattr(batch, name).to(device) for name in names})
        caches = [KVCache(*(t.to(device, copy=True) for t in kept.tensors)) for _ in range(LAYERS)]
        return ids.to(device), moved, caches

    return on


def same(mine: list[KVCache], theirs: list[KVCache]) -> bool:
    pairs = [pair for a, b in zip(mine, theirs, strict=True) for pair in zip(a.tensors, b.tensors, strict=True)]
    return all(torch.equal(ours.float().nan_to_num(7), others.float().nan_to_num(7)) for ours, others in pairs)


@pytest.fixture
def split(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every product of few rows is cut in three, however small."""

    def choose(*, rows: int, **shape: Any) -> Launch:
        return Launch(16, 128, 3 if rows <= 4 else 1, 4, 2)

    monkeypatch.setattr(matmul, "choose", choose)
    monkeypatch.setattr(rounded, "choose", lambda **shape: replace(choose(**shape), group=8))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, torch.float16) for name in SHAPES), (tuple(SHAPES)[1], torch.bfloat16)],
)
@pytest.mark.usefixtures("split")
def test_one_call_is_the_operators_one_by_one(name: str, dtype: torch.dtype) -> None:
    shape, cpu = SHAPES[name], torch.device("cpu")
    ours, plain = make_decoder(make_ops(torch.device(DEVICE)), shape, dtype), make_decoder(reference.make_ops(cpu), shape, dtype)
    for sequences in FEW if shape.gemma else STEPS:
        on = step(sequences, shape, dtype)
        ids, batch, caches = on(ours.ops.device)
        found = ours.bind(caches, max_tokens=64)(ids, batch)
        other = on(ours.ops.device)[2]
        one_by_one = ours.forward(ids, batch, other)
        assert found.dtype == dtype and bool(found.isfinite().all())
        if DEVICE == "cpu" and dtype in EXACT:
            assert torch.equal(found, one_by_one) and same(caches, other)
        expected, limit = plain.forward(*on(cpu)).float(), LIMIT[dtype]
        # A number whose rounding another one on the way has turned is a whole step away: 1/127, in int4 1/15. Few are.
        most = 1 / 15 if shape.cache == "int4" else 3e-2 if shape.cache or shape.activation else limit
        for result in (found, one_by_one):
            lost = (result.float().cpu() - expected).abs().amax(1) / expected.abs().max()
            assert lost.max() < most and (shape.activation or lost.median() < limit)


def count_launches(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Of every kernel of a layer, by its name, from here on. They do nothing any more."""
    counts: Counter[str] = Counter()

    class Counted:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, grid: Any) -> Any:
            counts[self.name] += 1
            return lambda *args, **options: None

    kernels = [(tiled, "product"), (tiled, "finish"), (rope, "_rope_store"), (norm, "_rms_norm"), (elementwise, "_gate_mul")]
    kernels += [(attention_decode, "_decode"), (attention_decode, "_merge"), (eight, "product"), (quantize, "_quantize")]
    for module, name in kernels:
        monkeypatch.setattr(module, name, Counted(name))
    return counts


@pytest.mark.parametrize("name", ["plain", "activations in int8", "act-order and bytes", "gemma 3"])
@pytest.mark.usefixtures("split")
def test_launches_of_a_decode_step(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten a layer, nine where a short context is not split, and one norm before the first; thirteen one by one.

    Rounding to int8, and putting inputs in order, is part of the norms, but takes a launch before o and before down. Norms of
    what is added are part of those behind, two launches a layer one by one.
    """
    shape = SHAPES[name] if name in SHAPES else Shape(hidden=256, bits=8, group=None, activation="int8-token", gemma=3)
    rounds, more = 0 if shape.activation is None else 2, 2 if shape.gemma else 0
    ours, dtype = make_decoder(make_ops(torch.device(DEVICE)), shape, torch.float16), torch.float16
    counts = count_launches(monkeypatch)
    for length, merges in ((300, 1), (30, 0)):
        on = step([(length, 1)] * 2, shape, dtype)
        ids, batch, caches = on(ours.ops.device)
        bound = ours.bind(caches, max_tokens=64)
        counts.clear()
        bound(ids, batch)
        a_layer = {
            "product": 4,
            "finish": 1,
            "_rope_store": 1,
            "_decode": 1,
            "_rms_norm": 2,
            "_merge": merges,
            "_quantize": rounds,
        }
        assert counts - Counter(_rms_norm=1) == +Counter({name: LAYERS * n for name, n in a_layer.items()})
        counts.clear()
        ours.forward(ids, batch, caches)
        assert counts.total() - 1 == LAYERS * (12 + merges + rounds + more)


def test_what_cannot_be_bound() -> None:
    ours = make_ops(torch.device(DEVICE))
    theirs = make_decoder(reference.make_ops(torch.device("cpu")), Shape(), torch.float16)
    ids, batch, caches = step([(0, 4)], Shape(), torch.float16)(torch.device("cpu"))
    assert ours.bind is not None
    stack = replace(theirs, ops=replace(ours, bind=lambda stack, caches, *, states, max_tokens: stack)).bind(caches, max_tokens=4)
    assert ours.bind(stack, caches, max_tokens=4) is None  # type: ignore[arg-type]
    decoder = make_decoder(ours, Shape(), torch.float16)
    with pytest.raises(ValueError, match="at most 3"):
        decoder.bind(caches, max_tokens=3)(ids, batch)
    with pytest.raises(ValueError, match="1 caches"):
        decoder.bind(caches[:1], max_tokens=3)


def test_no_tokens() -> None:
    decoder = make_decoder(make_ops(torch.device(DEVICE)), Shape(), torch.float16)
    on = step([], Shape(), torch.float16)
    ids, batch, caches = on(decoder.ops.device)
    assert decoder.bind(caches, max_tokens=3)(ids, batch).shape == (0, 128)
