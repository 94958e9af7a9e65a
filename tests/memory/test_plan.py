"""The arithmetic of the planner, on random models and machines: pure integers, no files."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from appliance.memory.advice import advise
from appliance.memory.demand import LOGIT_ROWS, Demand
from appliance.memory.devices import DeviceInfo
from appliance.memory.fit import FAIR_TOKENS, MARGIN, MOST_SEQUENCES, fit
from appliance.memory.graphs import LAYER_BYTES, POOL_BYTES
from appliance.memory.loading import Loading, Transient
from appliance.memory.plan import RUNTIME, SHORTEST_AUTO, KVSpec, MemoryPlan, PlanError
from appliance.memory.settings import Settings, cache_dtype
from quant.errors import InputError

GIB = 1 << 30

Case = tuple[Demand, Settings, DeviceInfo]
transients = st.builds(Transient, st.integers(0, 4 * GIB), st.just(0), st.integers(0, GIB))


@st.composite
def cases(draw: st.DrawFn, *, fits: bool, explicit: bool = False) -> Case:
    """A model, settings and a machine that has between nothing and plenty more (or less) than the model needs."""
    head_dim = draw(st.sampled_from([16, 64, 128]))
    demand = Demand(
        model="m",
        architecture="LlamaForCausalLM",
        quantization="awq",
        dtype=draw(st.sampled_from(["bfloat16", "float32"])),
        layers=draw(st.integers(1, 80)),
        kv_heads=draw(st.integers(1, 16)),
        head_dim=head_dim,
        max_len=draw(st.integers(2, 200_000)),
        weights={"attention": draw(st.integers(0, 4 * GIB)), "mlp": draw(st.integers(0, 8 * GIB))},
        slab=draw(st.integers(0, GIB)),
        layer_slab=draw(st.integers(0, GIB)),
        token_bytes=draw(st.integers(1, 300_000)),
        hidden_bytes=draw(st.integers(1, 20_000)),
        logits_row_bytes=draw(st.integers(1, 1_000_000)),
        position_bytes=4 * draw(st.sampled_from([head_dim, head_dim // 2])),
        loading=Loading(draw(transients), draw(transients)) if draw(st.booleans()) else Loading(),
        threads=draw(st.integers(1, 8)),
    )
    sizes = [demand.weights[part] // demand.layers for part in ("attention", "mlp")]
    if draw(st.booleans()):
        streamed = ({"attention": sizes[0], "mlp": sizes[1], "padding": 0},) * demand.layers
        demand = replace(demand, streamed=streamed)
    lengths = st.integers(2, demand.max_len)
    chosen = Settings(
        utilization=draw(st.floats(0.01, 1.0)),
        kv_bytes=None if explicit else draw(st.none() | st.integers(1, 16 * GIB)),
        block_size=draw(st.sampled_from([8, 16, 64, 256])),
        max_tokens=draw(st.integers(1, 20_000)),
        max_seqs=draw(st.integers(1, 600) if explicit else st.none() | st.integers(1, 600)),
        max_len=draw(lengths if explicit else st.none() | lengths),
        kv_dtype=draw(st.sampled_from([None, "int8", "int4"])),
        reserve=draw(st.just(0) | st.integers(0, GIB)),
        swap_bytes=draw(st.just(0) | st.integers(0, GIB)),
    )
    kind = draw(st.sampled_from(["cpu", "cuda"]))
    if kind == "cuda":
        out = draw(st.sampled_from([0.0, 0.5, 3.0])) if demand.streamed else 0.0
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
    fixed += plan.swap_bytes if device.kind == "cpu" else 0
    assert plan.total == fixed + plan.num_blocks * plan.kv.block_bytes
    assert 0 <= chosen.swap_bytes - plan.swap_bytes < plan.kv.block_bytes
    assert (plan.graph_bytes > 0) == chosen.graphs and (plan.scratch["inputs"] > 0) == (device.kind == "cuda")
    assert plan.sequences(plan.max_model_len) >= 1
    assert plan.num_blocks <= plan.max_num_seqs * plan.kv.blocks(plan.max_model_len)
    assert plan.max_num_seqs == chosen.max_seqs or (chosen.max_seqs is None and 1 <= plan.max_num_seqs <= MOST_SEQUENCES)
    assert plan.tokens == plan.num_blocks * chosen.block_size
    if chosen.kv_bytes is not None:
        assert plan.kv_bytes <= chosen.kv_bytes
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
    """More of what helps never gives fewer blocks or a shorter context, and never turns a fit into a refusal."""
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
    more = data.draw(st.sampled_from(kinds), label="what becomes better")
    if more == "utilization":
        chosen = replace(chosen, utilization=data.draw(st.floats(chosen.utilization, 1.0)))
    elif more == "available":
        available = data.draw(st.integers(device.available, device.available + 20 * GIB))
        device = replace(device, available=available, total=max(device.total, available))
    elif more == "max_tokens":
        chosen = replace(chosen, max_tokens=data.draw(st.integers(1, chosen.max_tokens)))
    elif more == "max_seqs":
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
    assert after.max_num_seqs >= before.max_num_seqs


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
    assert plan == fit(demand, replace(chosen, max_seqs=count), device) or plan.num_blocks <= max(
        (count + 1) * fair, plan.kv.blocks(chosen.max_len or 1)
    )
    if count < MOST_SEQUENCES:
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
    weights={"embedding": 1 << 30, "attention": 1 << 30, "mlp": 3 << 30, "head": 1 << 30},
    slab=100 << 20,
    layer_slab=30 << 20,
    token_bytes=120_000,
    hidden_bytes=8192,
    logits_row_bytes=128256 * 6,
    position_bytes=512,
)
DEFAULTS = Settings(utilization=0.5, kv_bytes=None, block_size=16, max_tokens=2048, max_seqs=256, max_len=None)


def cpu(gib: float) -> DeviceInfo:
    return DeviceInfo("cpu", "some CPU", int(gib * GIB) + GIB, int(gib * GIB))


def test_a_plan_worked_out_by_hand() -> None:
    plan = fit(LLAMA_8B, replace(DEFAULTS, max_len=8192), cpu(24))
    workspace = 120_000 * 2048 + 128256 * 6 * LOGIT_ROWS + (100 << 20) + 512 * 8192
    assert plan.free == 24 * GIB - MARGIN["cpu"]
    left = 12 * GIB - 6 * GIB - workspace - RUNTIME["cpu"]
    assert plan.kv == KVSpec(32, 8, 128, 16, "float16")
    assert plan.kv.token_bytes == 128 * 1024 and plan.kv.block_bytes == 2 << 20  # the worked example of Llama-3-8B
    assert plan.workspace == workspace
    assert plan.num_blocks == left // (2 << 20)
    assert plan.sequences(8192) == plan.num_blocks / 512
    assert plan.sequences(8193) == plan.num_blocks / 513


def test_auto_takes_the_whole_context_where_it_fits_and_the_longest_elsewhere() -> None:
    assert fit(LLAMA_8B, DEFAULTS, cpu(64)).max_model_len == 131072
    plan = fit(LLAMA_8B, DEFAULTS, cpu(24))
    assert 256 < plan.max_model_len < 131072 and plan.max_model_len % 16 == 0 and plan.sequences(plan.max_model_len) >= 1


def test_no_more_blocks_than_the_sequences_can_fill() -> None:
    plan = fit(LLAMA_8B, replace(DEFAULTS, max_len=100, max_seqs=3), cpu(64))
    assert plan.num_blocks == 3 * 7 and plan.total < plan.budget // 2


def test_a_card_shared_with_others_gives_what_is_free() -> None:
    card = DeviceInfo("cuda", "card", 24 * GIB, 23 * GIB)
    wide = replace(DEFAULTS, utilization=0.92)
    assert fit(LLAMA_8B, wide, card).budget == int(0.92 * 24 * GIB)
    taken = fit(LLAMA_8B, wide, replace(card, available=10 * GIB))
    assert taken.budget == 10 * GIB - MARGIN["cuda"]
    assert taken.budget_source == (
        "the 10.00 GiB that are free of 24.00 GiB, of which the driver and others hold 14.00 GiB, less a margin of 150.00 MiB"
    )
    spared = fit(LLAMA_8B, replace(wide, reserve=2 * GIB), replace(card, available=10 * GIB))
    assert spared.budget == taken.budget - 2 * GIB and spared.budget_source.endswith(" and --gpu-memory-reserve 2.00 GiB")
    assert fit(LLAMA_8B, replace(wide, reserve=GIB // 2), card).budget == int(0.92 * 24 * GIB)  # more than that stays free anyway


def test_recorded_steps_worked_out_by_hand() -> None:
    """Sizes 1, 2, 4, 8, 16, 24: a pool for the largest, each step's result and what the driver keeps, and a block for padding."""
    card, few = DeviceInfo("cuda", "card", 24 * GIB, 23 * GIB), replace(DEFAULTS, utilization=0.92, max_seqs=24, max_len=8192)
    eager, recorded = fit(LLAMA_8B, few, card), fit(LLAMA_8B, replace(few, graphs=True), card)
    expected = 24 * 120_000 + (30 << 20) + 55 * 8192 + 6 * 32 * LAYER_BYTES + POOL_BYTES + (2 << 20)
    assert eager.graph_bytes == 0 and recorded.graph_bytes == expected
    assert recorded.runtime == eager.runtime and recorded.scratch == eager.scratch
    assert (eager.num_blocks - recorded.num_blocks) in (expected // (2 << 20), expected // (2 << 20) + 1)
    assert "CUDA graphs, 6 sizes" in recorded.table() and "CUDA graphs" not in eager.table()
    assert recorded.to_dict()["graphs_bytes"] == {**recorded.graphs, "total": expected}
    assert eager.to_dict()["graphs_bytes"] == {"total": 0}
    assert fit(LLAMA_8B, replace(few, graphs=True, max_tokens=7), card).decode_sizes == (1, 2, 4, 7)


def test_inputs_are_planned_as_they_are_sent() -> None:
    card = DeviceInfo("cuda", "card", 24 * GIB, 23 * GIB)
    plan = fit(LLAMA_8B, replace(DEFAULTS, utilization=0.92, max_len=4096, block_size=64), card)
    tables, tokens, sequences = 256 * 64 * 4, 3 * 2048 * 8, 6 * 256 * 8 + 256 * 4
    assert plan.scratch["inputs"] == tables + tokens + sequences + 257 * 4 // 64 * 64 + 64  # the last one on a line of its own
    assert fit(LLAMA_8B, replace(DEFAULTS, max_len=4096), cpu(24)).scratch["inputs"] == 0


def test_refusals_of_cards_advise_fewer_sequences_or_none_recorded() -> None:
    card = DeviceInfo("cuda", "card", 8 * GIB, 8 * GIB)
    wide = replace(DEFAULTS, utilization=0.97, graphs=True, max_seqs=512, max_len=2048)
    with pytest.raises(PlanError, match=r"CUDA graphs \d+\.\d\d MiB \(512 sequences\), runtime 800\.00 MiB") as error:
        fit(LLAMA_8B, wide, card)
    advised = advise(error.value, LLAMA_8B, wide, card)
    flags = [remedy.flags for remedy in advised.remedies]
    assert "--enforce-eager" in flags and any(flag.startswith("--max-num-seqs ") for flag in flags)


def test_refusals_have_the_numbers_and_the_flags() -> None:
    with pytest.raises(PlanError) as short:
        fit(LLAMA_8B, replace(DEFAULTS, max_len=65536), cpu(24))
    numbers = (
        r"llama does not fit: one sequence of 65536 tokens needs 4096 KV blocks of 16 tokens \(8\.00 GiB\), but there is "
        r"room for 2\d\d\d \(5\.\d\d GiB\): the budget is 12\.00 GiB \(0\.5 of 24\.00 GiB available\), of which "
        r"weights 6\.00 GiB, workspace .* MiB \(2048 tokens a step\), runtime 300\.00 MiB are taken$"
    )
    assert re.match(numbers, str(short.value)), str(short.value)
    advised = advise(short.value, LLAMA_8B, replace(DEFAULTS, max_len=65536), cpu(24))
    remedies = r"What would fit: --gpu-memory-utilization 0\.6\d, or --kv-cache-dtype fp8, or --max-model-len 4\d{4}$"
    assert re.search(remedies, str(advised)), str(advised)
    assert (
        advised.remedies[1].effect
        == f"keys and values in 8 bits; room for {advised.remedies[1].tokens:,} tokens, 65,536 in one sequence"
    )

    with pytest.raises(PlanError, match=r"weights 6\.00 GiB, .* make 6\.\d\d GiB, but the budget is 4\.00 GiB"):
        fit(LLAMA_8B, DEFAULTS, cpu(8))
    with pytest.raises(PlanError, match=r"and a KV cache of 30\.00 GiB make 36\..* but the budget is 23\.94 GiB \(all that is"):
        fit(LLAMA_8B, replace(DEFAULTS, kv_bytes=30 * GIB), cpu(24))
    with pytest.raises(InputError, match=r"--max-model-len is 131073, but the model was made for at most 131072 tokens") as long:
        fit(LLAMA_8B, replace(DEFAULTS, max_len=131073), cpu(240))
    assert not isinstance(long.value, PlanError)


def test_one_set_of_flags_where_no_single_one_helps() -> None:
    tight = replace(DEFAULTS, utilization=0.1, max_tokens=8192, max_len=100_000)
    with pytest.raises(PlanError) as error:
        fit(LLAMA_8B, tight, cpu(7))
    advised = advise(error.value, LLAMA_8B, tight, cpu(7))
    assert len(advised.remedies) == 1
    flags = r"--gpu-memory-utilization 1 --kv-cache-dtype fp8 --max-num-batched-tokens \d{3,4} --max-model-len \d+"
    assert re.fullmatch(flags, advised.remedies[0].flags)
    less = replace(tight, **(parse(advised.remedies[0].flags) | {"utilization": 0.99}))
    assert plan_or_none(LLAMA_8B, less, cpu(7)) is None
    given = replace(tight, kv_bytes=16 * GIB)
    with pytest.raises(PlanError) as error:
        fit(LLAMA_8B, given, cpu(7.2))
    assert re.fullmatch(
        r"--kv-cache-dtype fp8 --max-num-batched-tokens \d{3,4} --max-model-len \d+ --kv-cache-memory-bytes \d+",
        advise(error.value, LLAMA_8B, given, cpu(7.2)).remedies[0].flags,
    )
    hopeless = advise(error.value, LLAMA_8B, tight, cpu(2))
    assert hopeless.remedies == () and "needs one with more memory, or a smaller model" in str(hopeless)


def test_the_table_says_it_all() -> None:
    plan = fit(LLAMA_8B, replace(DEFAULTS, max_len=8192), cpu(24))
    table = plan.table()
    assert f"Maximum concurrency for 8,192 tokens per request: {plan.sequences(8192):.2f}x" in table
    assert f"KV cache: {plan.tokens:,} tokens in blocks of 16 (2.00 MiB a block, 128.00 KiB a token)" in table
    for part in ("weights", "  mlp", "workspace", "  logits", "runtime", "total", "left of the budget"):
        assert re.search(rf"^  {part} +\d+\.\d\d [GMK]iB +\d+\.\d%", table, re.M), part
    for length in ("512", "1,024", "4,096", "8,192"):
        assert re.search(rf"^ +{length} +[\d,]+\.\d$", table, re.M), length
    assert max(map(len, table.splitlines())) <= 100
    assert "16,384" not in table
    full = re.search(r"^  total .*?(█+)[▏▎▍▌▋▊▉]?$", table, re.M)[1]
    assert len(full) == round(plan.total / plan.budget * 240) // 8  # in eighths
