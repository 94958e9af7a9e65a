"""What a card says, held against the plan: pure arithmetic."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from appliance.memory.devices import DeviceInfo
from appliance.memory.fit import fit
from appliance.memory.measure import Reading, measured
from appliance.memory.plan import SHORTEST_AUTO, MemoryPlan, PlanError
from tests.memory.test_plan import DEFAULTS, LLAMA_8B

GIB = 1 << 30
CARD = DeviceInfo("cuda", "card", 24 * GIB, 23 * GIB, capability=89)
WIDE = replace(DEFAULTS, utilization=0.92, graphs=True, block_size=64, max_seqs=32)


def plan_of(**changes: object) -> MemoryPlan:
    return fit(LLAMA_8B, replace(WIDE, **changes), CARD)  # type: ignore[arg-type]


def reading(plan: MemoryPlan, more: int = 0) -> Reading:
    """Of a process that holds what was planned before the cache, and ``more``."""
    held = plan.weight_bytes + plan.workspace + plan.runtime + more
    return Reading(free=plan.device.available - held, reserved=held // 2, peak=held // 2)


@given(
    length=st.none() | st.integers(2, 131072),
    share=st.floats(0.35, 1.0),
    graphs=st.booleans(),
    free=st.integers(0, 24 * GIB),
    reserved=st.integers(0, 20 * GIB),
    more=st.integers(0, GIB),
)
@settings(max_examples=300, deadline=None)
def test_a_measurement_only_takes_away(
    length: int | None, share: float, graphs: bool, free: int, reserved: int, more: int
) -> None:
    """Never more blocks nor a longer context than planned, never more than the budget, and one sequence always fits."""
    try:
        plan = fit(LLAMA_8B, replace(WIDE, max_len=length, utilization=share, graphs=graphs), CARD)
    except PlanError:
        assume(False)
    said = Reading(free, reserved, reserved + more)
    try:
        found = measured(plan, said, auto_length=length is None)
    except PlanError as error:
        least = length or min(SHORTEST_AUTO, plan.max_model_len)
        room = plan.budget - plan.graph_bytes - said.held(CARD.available)
        assert room < plan.kv.blocks(least) * plan.kv.block_bytes
        check_remedies(plan, said, error, least)
        return
    assert found.num_blocks <= plan.num_blocks and found.max_model_len <= plan.max_model_len
    assert found.sequences(found.max_model_len) >= 1
    assert length is None or found.max_model_len == plan.max_model_len
    assert said.held(CARD.available) + found.graph_bytes + found.kv_bytes <= plan.budget or found.num_blocks == 0
    assert found.total <= plan.total and json.loads(json.dumps(found.to_dict()))["measured"]["planned_blocks"] == plan.num_blocks
    worse = replace(said, free=said.free // 2)
    try:
        assert measured(plan, worse, auto_length=length is None).num_blocks <= found.num_blocks
    except PlanError:
        pass


def check_remedies(plan: MemoryPlan, said: Reading, error: PlanError, length: int) -> None:
    """Each remedy by itself, on a card that says the same."""
    held = said.held(CARD.available)
    for remedy in (one.flags for one in error.remedies):
        changed, want = plan, length
        if remedy == "--enforce-eager":
            changed = replace(plan, graphs={})
        elif match := re.fullmatch(r"--max-model-len (\d+)", remedy):
            want = int(match[1])
        else:
            share = float(remedy.removeprefix("--gpu-memory-utilization "))
            changed = replace(plan, budget=min(int(share * CARD.total), plan.free))
        assert changed.budget - changed.graph_bytes - held >= plan.kv.blocks(want) * plan.kv.block_bytes


def test_what_was_planned_is_what_is_taken() -> None:
    plan = plan_of(max_len=8192)
    found = measured(plan, reading(plan), auto_length=False)
    assert (found.num_blocks, found.max_model_len) == (plan.num_blocks, plan.max_model_len)
    assert found.measured is not None and found.measured.held == found.measured.planned
    assert measured(plan, reading(plan, more=-GIB), auto_length=False).num_blocks == plan.num_blocks


def test_what_is_missing_comes_from_the_cache() -> None:
    plan = plan_of(max_len=65536)
    block = plan.kv.block_bytes
    found = measured(plan, reading(plan, more=10 * block), auto_length=False)
    assert plan.num_blocks - found.num_blocks in (9, 10)
    text = found.table()
    assert f"{found.num_blocks:,} of {plan.num_blocks:,} planned blocks" in text and "held before the KV cache" in text
    assert "measured" not in plan.table() and plan.to_dict()["measured"] is None
    assert found.measured is not None
    recorded = replace(found, measured=replace(found.measured, graphs=123 << 20))
    assert "123.00 MiB taken by CUDA graphs" in recorded.table() and recorded.to_dict()["measured"]["graphs"] == 123 << 20  # type: ignore[index]


def test_memory_that_was_given_back_will_be_wanted_again() -> None:
    assert Reading(free=10, reserved=60, peak=75).held(available=100) == 90 + 15
    assert Reading(free=90, reserved=60, peak=60).held(available=100) == 60  # another program has left since


def test_auto_becomes_shorter_where_a_given_length_is_refused() -> None:
    plan = fit(LLAMA_8B, replace(WIDE, max_len=None, utilization=0.5), CARD)
    assert plan.num_blocks == plan.kv.blocks(plan.max_model_len)
    said = reading(plan, more=5 * plan.kv.block_bytes)
    found = measured(plan, said, auto_length=True)
    assert found.max_model_len == found.tokens and plan.max_model_len - found.max_model_len in (4 * 64, 5 * 64, 6 * 64)
    assert f"{found.max_model_len:,} of {plan.max_model_len:,} planned tokens a sequence fit" in found.table()
    with pytest.raises(PlanError, match=r"room for \d+ KV blocks is left; one sequence of \d+ tokens needs \d+ ") as error:
        measured(plan, said, auto_length=False)
    assert re.fullmatch(r"--gpu-memory-utilization 0\.5\d", error.value.remedies[0].flags)
    assert error.value.remedies[1].flags == "--enforce-eager"
    assert error.value.remedies[2].flags == f"--max-model-len {found.max_model_len}"
    assert error.value.remedies[2].max_model_len == found.max_model_len


def test_nothing_left_at_all() -> None:
    plan = plan_of(max_len=8192)
    with pytest.raises(PlanError, match="A smaller --max-num-batched-tokens takes less") as error:
        measured(plan, Reading(free=0, reserved=GIB, peak=GIB), auto_length=True)
    assert error.value.remedies == () and "tokens computed, CUDA graphs will need" in str(error.value)
