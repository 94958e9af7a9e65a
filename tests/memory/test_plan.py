"""The arithmetic of the planner, on random models and machines: pure integers, no files."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from appliance.memory.advice import advise
from appliance.memory.demand import LOGIT_ROWS, Demand
from appliance.memory.devices import DeviceInfo
from appliance.memory.fit import FAIR_TOKENS, KEPT_CONTEXTS, MARGIN, MOST_SEQUENCES, fit
from appliance.memory.loading import Loading, Transient
from appliance.memory.plan import RUNTIME, SHORTEST_AUTO, MemoryPlan, PlanError
from appliance.memory.settings import Settings, cache_dtype
from quant.errors import InputError

GIB = 1 << 30

Case = tuple[Demand, Settings, DeviceInfo]
# What is drawn for every case is made once: to make it, and to look whether it is sound, takes longer than to draw it.
transients = st.builds(Transient, st.integers(0, 4 * GIB), st.just(0), st.integers(0, GIB))
maybe_cache = st.none() | st.integers(1, 16 * GIB)
maybe_sequences = st.none() | st.integers(1, 600)
none_or_up_to_a_gib = st.just(0) | st.integers(0, GIB)
utilizations, none = st.floats(0.01, 1.0), st.none()
one_of = cache(st.sampled_from)


@st.composite
def cases(draw: st.DrawFn, *, fits: bool, explicit: bool = False) -> Case:
    """A model, settings and a machine that has between nothing and plenty more (or less) than the model needs."""
    head_dim = draw(one_of((16, 64, 128)))
    demand = Demand(
        model="m",
        architecture="LlamaForCausalLM",
        quantization="awq",
        dtype=draw(one_of(("bfloat16", "float32"))),
        layers=draw(st.integers(1, 80)),
        kv_heads=draw(st.integers(1, 16)),
        head_dim=head_dim,
        max_len=draw(st.integers(2, 200_000)),
        vocab=draw(st.integers(1, 300_000)),
        weights={"attention": draw(st.integers(0, 4 * GIB)), "mlp": draw(st.integers(0, 8 * GIB))},
        slab=draw(st.integers(0, GIB)),
        layer_slab=draw(st.integers(0, GIB)),
        token_bytes=draw(st.integers(1, 300_000)),
        hidden_bytes=draw(st.integers(1, 20_000)),
        logits_row_bytes=draw(st.integers(1, 1_000_000)),
        position_bytes=4 * draw(one_of((head_dim, head_dim // 2))),
        loading=Loading(draw(transients), draw(transients)) if draw(st.booleans()) else Loading(),
        threads=draw(st.integers(1, 8)),
    )
    sizes = [demand.weights[part] // demand.layers for part in ("attention", "mlp")]
    if draw(st.booleans()):
        streamed = ({"attention": sizes[0], "mlp": sizes[1], "padding": 0},) * demand.layers
        demand = replace(demand, streamed=streamed)
    lengths = st.integers(2, demand.max_len)
    chosen = Settings(
        utilization=draw(utilizations),
        kv_bytes=None if explicit else draw(maybe_cache),
        block_size=draw(one_of((8, 16, 64, 256))),
        max_tokens=draw(st.integers(1, 20_000)),
        max_seqs=draw(st.integers(1, 600) if explicit else maybe_sequences),
        max_len=draw(lengths if explicit else none | lengths),
        kv_dtype=draw(one_of((None, "int8", "int4"))),
        reserve=draw(none_or_up_to_a_gib),
        swap_bytes=draw(none_or_up_to_a_gib),
        prefixes=draw(st.booleans()),
    )
    kind = draw(one_of(("cpu", "cuda")))
    if kind == "cuda":
        out = draw(one_of((0.0, 0.5, 3.0))) if demand.streamed else 0.0
        chosen = replace(chosen, graphs=not out and draw(st.booleans()), offload_gb=out)
    fixed = sum(demand.weights.values()) + demand.slab + demand.token_bytes * chosen.max_tokens + RUNTIME[kind]
    cache = demand.layers * demand.kv_heads * head_dim * 8 * ((chosen.max_len or 512) + 256)
    need = int((fixed + cache + chosen.swap_bytes + demand.logits_row_bytes * LOGIT_ROWS) / chosen.utilization)
    need += chosen.reserve + MARGIN[kind]
    available = draw(st.integers(need, 4 * need) if fits else st.integers(0, need))
    return demand, chosen, DeviceInfo(kind, "d", available + draw(st.integers(0, GIB)), available)


def plan_or_none(demand: Demand, chosen: Settings, device: DeviceInfo) -> MemoryPlan | None:
    try:
        return fit(demand, chosen, device)
    except PlanError:
        return None


@given(case=cases(fits=True))
@settings(max_examples=300, deadline=None)
def test_a_plan_holds_what_it_promises(case: Case) -> None:
    demand, chosen, device = case
    plan = plan_or_none(demand, chosen, device)
    assume(plan is not None)
    assert plan.total <= plan.budget <= plan.free == device.available - MARGIN[device.kind] - chosen.reserve
    if chosen.kv_bytes is None:
        assert plan.budget <= chosen.utilization * (device.available if device.kind == "cpu" else device.total)
    fixed = plan.weight_bytes + plan.workspace + plan.graph_bytes + plan.runtime
    ghosts = 20 * 16 * -(-min(8 * plan.swap_blocks, 65536) // 16)  # a checksum and two clocks each, in rows of 16
    assert plan.ghost_bytes == ghosts
    fixed += plan.swap_bytes + ghosts + plan.grammar_bytes if device.kind == "cpu" else 0
    assert plan.total == fixed + plan.num_blocks * plan.kv.block_bytes
    assert 0 <= chosen.swap_bytes - plan.swap_bytes < plan.kv.block_bytes
    assert (plan.graph_bytes > 0) == chosen.graphs and (plan.scratch["inputs"] > 0) == (device.kind == "cuda")
    assert plan.sequences(plan.max_model_len) >= 1
    most = chosen.max_seqs or MOST_SEQUENCES
    assert 1 <= plan.max_num_seqs <= min(most, chosen.max_tokens)
    assert chosen.max_seqs is None or plan.max_num_seqs == min(most, chosen.max_tokens)
    if chosen.kv_bytes is None:
        contexts = max(2 * most, KEPT_CONTEXTS) if chosen.prefixes else most
        left = (plan.budget - fixed) // plan.kv.block_bytes
        assert plan.num_blocks <= min(left, contexts * plan.kv.blocks(plan.max_model_len))
        assert bool(plan.limited) == (plan.num_blocks < left)
    else:
        assert not plan.limited and 0 <= chosen.kv_bytes - plan.kv_bytes < plan.kv.block_bytes, "given, but not all of it"
    assert plan.tokens == plan.num_blocks * chosen.block_size
    if chosen.max_len is not None:
        assert plan.max_model_len == chosen.max_len
    else:
        assert min(SHORTEST_AUTO, demand.max_len) <= plan.max_model_len <= demand.max_len
        longer = min(plan.max_model_len + chosen.block_size, demand.max_len)
        if longer > plan.max_model_len and chosen.max_seqs is not None:
            assert plan_or_none(demand, replace(chosen, max_len=longer), device) is None, "auto is not the longest"
    assert json.loads(json.dumps(plan.to_dict()))["total_bytes"] == plan.total


@given(case=cases(fits=True), data=st.data())
@settings(max_examples=500, deadline=None)
def test_the_plan_is_monotone(case: Case, data: st.DataObject) -> None:
    """More of what helps never gives fewer blocks or a shorter context, and never turns a fit into a refusal.

    Nor fewer sequences, but for a step that has fewer tokens than that: each that runs takes one of every step.
    """
    demand, chosen, device = case
    before = plan_or_none(demand, chosen, device)
    assume(before is not None)
    kinds = ["utilization", "available", "max_tokens", "slab", "reserve"]
    kinds += [] if chosen.offload_gb else ["weights"]
    # Memory that more sequences of a card take is missing elsewhere; there, launching one by one always leaves more.
    kinds += [] if device.kind == "cuda" or chosen.max_seqs is None else ["max_seqs"]
    kinds += ["eager", "kv_dtype"] if device.kind == "cuda" else ["swap"]
    kinds += ["offload"] if chosen.offload_gb and chosen.max_seqs is not None else []
    kinds += [] if chosen.kv_bytes is None else ["kv_bytes"]
    more = data.draw(one_of(tuple(kinds)), label="what becomes better")
    if more == "utilization":
        chosen = replace(chosen, utilization=data.draw(st.floats(chosen.utilization, 1.0)))
    elif more == "available":
        available = data.draw(st.integers(device.available, device.available + 20 * GIB))
        device = replace(device, available=available, total=max(device.total, available))
    elif more == "max_tokens":
        chosen = replace(chosen, max_tokens=data.draw(st.integers(1, chosen.max_tokens)))
    elif more == "max_seqs":
        # Each has a place in a grammar set aside, which is missing elsewhere, too: without those.
        chosen = replace(chosen, grammars=False)
        before = plan_or_none(demand, chosen, device)
        assert before is not None
        chosen = replace(chosen, max_seqs=data.draw(st.integers(chosen.max_seqs, 1000)))
    elif more == "eager":
        chosen = replace(chosen, graphs=False)
    elif more == "offload":
        chosen = replace(chosen, offload_gb=chosen.offload_gb + data.draw(st.sampled_from([0.25, 1.0, 9.0])))
    elif more == "reserve":
        chosen = replace(chosen, reserve=data.draw(st.integers(0, chosen.reserve)))
    elif more == "swap":
        chosen = replace(chosen, swap_bytes=data.draw(st.integers(0, chosen.swap_bytes)))
    elif more == "kv_dtype":
        chosen = replace(chosen, kv_dtype="int4" if chosen.kv_dtype else "int8")
    elif more == "kv_bytes":
        chosen = replace(chosen, kv_bytes=data.draw(st.integers(chosen.kv_bytes, 20 * GIB)))
    elif more == "weights":
        demand = replace(demand, weights={"mlp": data.draw(st.integers(0, sum(demand.weights.values())))})
    else:
        demand = replace(demand, slab=data.draw(st.integers(0, demand.slab)))
    after = plan_or_none(demand, chosen, device)
    larger = more in ("max_seqs", "kv_dtype", "kv_bytes") and chosen.kv_bytes is not None
    assume(not larger or after is not None)  # a larger given cache may exceed the device
    assert after is not None
    assert after.num_blocks >= before.num_blocks
    assert after.max_model_len >= before.max_model_len
    assert after.max_num_seqs >= min(before.max_num_seqs, chosen.max_tokens)


@given(case=cases(fits=True))
@settings(max_examples=200, deadline=None)
def test_auto_sequences_have_room_and_no_more_would(case: Case) -> None:
    demand, chosen, device = case
    chosen = replace(chosen, max_seqs=None)
    plan = plan_or_none(demand, chosen, device)
    assume(plan is not None)
    longest = chosen.max_len or demand.max_len
    fair = -(-max(1, min(FAIR_TOKENS, longest // 8)) // chosen.block_size)
    count = plan.max_num_seqs
    assert count == 1 or plan.num_blocks >= count * fair
    if plan.num_blocks > max((count + 1) * fair, plan.kv.blocks(chosen.max_len or 1)):
        same = fit(demand, replace(chosen, max_seqs=count), device)  # but that auto's contexts are those of the most sequences
        assert replace(plan, num_blocks=same.num_blocks, limit=same.limit) == same and plan.num_blocks >= same.num_blocks
    if count < min(MOST_SEQUENCES, chosen.max_tokens):
        context = chosen.max_len or min(longest, (count + 2) * fair * chosen.block_size)
        more = plan_or_none(demand, replace(chosen, max_seqs=count + 1, max_len=context), device)
        assert more is None or more.num_blocks < (count + 1) * fair


@given(case=cases(fits=True, explicit=True), data=st.data())
@settings(max_examples=200, deadline=None)
def test_a_shorter_context_never_fits_fewer_sequences(case: Case, data: st.DataObject) -> None:
    demand, chosen, device = case
    before = plan_or_none(demand, chosen, device)
    assume(before is not None)
    shorter = data.draw(st.integers(2, chosen.max_len))
    after = plan_or_none(demand, replace(chosen, max_len=shorter), device)
    assert after is not None
    assert after.sequences(shorter) >= before.sequences(chosen.max_len)


@given(case=cases(fits=False), gib=st.none() | st.floats(1, 40))
@settings(max_examples=200, deadline=None)
def test_every_advised_flag_makes_it_fit(case: Case, gib: float | None) -> None:
    demand, chosen, device = case
    host = None if gib is None else cpu(gib)
    assume(plan_or_none(demand, chosen, device) is None)
    with pytest.raises(PlanError) as error:
        fit(demand, chosen, device, host)
    advised = advise(error.value, demand, chosen, device, host=host)
    assert str(advised).startswith(str(error.value))
    for remedy in advised.remedies:
        assert remedy.flags in str(advised)
        found = fit(demand, replace(chosen, **parse(remedy.flags)), device, host)
        assert (found.tokens, found.max_model_len) == (remedy.tokens, remedy.max_model_len)
        assert json.loads(json.dumps(remedy.to_dict()))["flags"] == remedy.flags
    if not advised.remedies:
        assert "No setting makes it fit" in str(advised)
        most = replace(chosen, utilization=1.0, kv_bytes=None, graphs=False, reserve=0, swap_bytes=0)
        with pytest.raises(PlanError):
            fit(demand, most, device, host)


def parse(remedy: str) -> dict[str, float | int | str | bool]:
    """An advised set of flags, as the command line would read it."""
    found: dict[str, float | int | str | bool] = {}
    words = remedy.split()
    while words:
        name = words.pop(0).removeprefix("--")
        field, read = FLAGS[name]
        found[field] = False if name == "enforce-eager" else read(words.pop(0))
        if found.get("offload_gb"):
            found["graphs"] = False  # no steps are recorded then
    return found


FLAGS: dict[str, tuple[str, Callable[[str], float | int | str]]] = {
    "max-model-len": ("max_len", int),
    "gpu-memory-utilization": ("utilization", float),
    "gpu-memory-reserve": ("reserve", int),
    "swap-space": ("swap_bytes", lambda text: int(float(text) * GIB)),
    "max-num-batched-tokens": ("max_tokens", int),
    "kv-cache-memory-bytes": ("kv_bytes", int),
    "kv-cache-dtype": ("kv_dtype", cache_dtype),
    "max-num-seqs": ("max_seqs", int),
    "cpu-offload-gb": ("offload_gb", float),
    "enforce-eager": ("graphs", bool),
}


LLAMA_8B = Demand(
    model="llama",
    architecture="LlamaForCausalLM",
    quantization="awq",
    dtype="float16",
    layers=32,
    kv_heads=8,
    head_dim=128,
    max_len=131072,
    vocab=128256,
    weights={"embedding": 1 << 30, "attention": 1 << 30, "mlp": 3 << 30, "head": 1 << 30},
    slab=100 << 20,
    layer_slab=30 << 20,
    token_bytes=120_000,
    hidden_bytes=8192,
    logits_row_bytes=128256 * 6,
    position_bytes=512,
    embedding="float16",
)
DEFAULTS = Settings(utilization=0.5, kv_bytes=None, block_size=16, max_tokens=2048, max_seqs=256, max_len=None)


def cpu(gib: float) -> DeviceInfo:
    return DeviceInfo("cpu", "some CPU", int(gib * GIB) + GIB, int(gib * GIB))


@pytest.mark.parametrize(
    ("kind", "cache", "head_dim", "rotary", "message"),
    [
        ("cpu", "int4", 15, 15, "heads of 15 are no multiple of 2"),
        ("cpu", "int8", 15, 15, None),
        ("cuda", "fp8_e4m3", 15, 14, "heads of 15 are no multiple of 2"),
        ("cuda", "int4", 18, 16, "heads of 18 are no multiple of 4"),
        ("cuda", "int4", 20, 10, "rotated features of heads of 10 are no multiple of 4"),
        ("cuda", "int4", 20, 12, None),
        ("cuda", None, 15, 15, None),
    ],
)
def test_heads_that_a_cache_cannot_hold(kind: str, cache: str | None, head_dim: int, rotary: int, message: str | None) -> None:
    demand = replace(LLAMA_8B, head_dim=head_dim, position_bytes=4 * rotary)
    chosen = replace(DEFAULTS, kv_dtype=cache, max_len=128)
    device = DeviceInfo(kind, "d", 64 * GIB, 64 * GIB)
    if message is None:
        assert fit(demand, chosen, device).kv.dtype == (cache or demand.dtype)
    else:
        with pytest.raises(InputError, match=f"--kv-cache-dtype is {cache}, but {message}"):
            fit(demand, chosen, device)
