"""Several models on one device: what they share adds up, nobody gets less than is of use, and the sets that fit are right."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from appliance.config import GIB, EngineConfig
from appliance.memory.devices import DeviceInfo
from appliance.memory.plan import PlanError
from appliance.memory.planner import make_plan
from appliance.memory.together import LEAST, Seats, Wish, seats, settled
from quant.errors import InputError
from tests.memory.test_planner import awq_checkpoint
from tests.memory.test_shard import LLAMA_8B

MIB = 2**20
CARD = DeviceInfo("cuda", "a card", 24 * GIB, 24 * GIB - 400 * MIB, 89)
SMALL = {**LLAMA_8B, "num_hidden_layers": 8, "hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 8}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return [awq_checkpoint(tmp_path_factory.mktemp("model"), shape) for shape in (LLAMA_8B, SMALL)]


def wishes(folders: list[Path], numbers: list[int], **options: object) -> list[Wish]:
    return [Wish(f"m{k}", folders[n], EngineConfig(model=str(folders[n]), **options)) for k, n in enumerate(numbers)]  # type: ignore[arg-type]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    numbers=st.lists(st.integers(0, 1), min_size=1, max_size=4),
    total=st.integers(6, 80),
    share=st.sampled_from([None, 0.5, 0.92, 1.0]),
    kind=st.sampled_from(["cpu", "cuda"]),
    length=st.sampled_from(["auto", 1000, 8192]),
)
def test_what_is_shared_out(
    folders: list[Path], numbers: list[int], total: int, share: float | None, kind: str, length: int | str
) -> None:
    device = replace(CARD, kind=kind, total=total * GIB, available=total * GIB - 400 * MIB)
    base = EngineConfig(gpu_memory_utilization=share, max_model_len=length)
    try:
        found = seats(wishes(folders, numbers, gpu_memory_utilization=share, max_model_len=length), base, device)
    except PlanError:
        for wish in wishes(folders, numbers, gpu_memory_utilization=share, max_model_len=length):
            try:
                make_plan(wish.directory, wish.config, device)
            except PlanError:
                return
        raise AssertionError("each of them fits by itself") from None
    assert all(plan.total <= found.budget for plan in found.plans)
    for plan, wish in zip(found.plans, wishes(folders, numbers, gpu_memory_utilization=share, max_model_len=length), strict=True):
        alone = make_plan(wish.directory, wish.config, device).max_model_len  # on a small machine not even one has LEAST
        assert plan.max_model_len >= (min(LEAST, alone) if length == "auto" else length)
        assert plan.sequences(plan.max_model_len) >= 1
    if found.all_fit:
        assert found.groups() == [tuple(range(len(numbers)))]
        if len(set(numbers)) == 1:
            assert len({plan.num_blocks for plan in found.plans}) == 1  # equals are treated alike
    for size in range(1, len(numbers) + 1):
        for chosen in combinations(range(len(numbers)), size):
            covered = any(set(chosen) <= set(group) for group in found.groups())
            assert covered == (sum(found.plans[k].total for k in chosen) <= found.budget)


def test_one_model_gets_what_it_gets_alone(folders: list[Path]) -> None:
    (wish,) = wishes(folders, [0])
    assert seats([wish], EngineConfig(), CARD).plans[0].num_blocks >= make_plan(folders[0], wish.config, CARD).num_blocks - 1


def test_more_memory_never_parts_models(folders: list[Path]) -> None:
    together = [
        seats(wishes(folders, [0, 0, 1]), EngineConfig(), replace(CARD, total=n * GIB, available=n * GIB)).all_fit
        for n in range(8, 40, 4)
    ]
    assert together == sorted(together) and set(together) == {False, True}


def test_an_engine_started_later_gets_what_was_planned(folders: list[Path]) -> None:
    """Beside others there is less to see of the device than when the plans were made."""
    found = seats(wishes(folders, [0, 1]), EngineConfig(), CARD)
    for wish, plan, other in zip(wishes(folders, [0, 1]), found.plans, reversed(found.plans)):
        later = make_plan(wish.directory, settled(wish.config, plan), replace(CARD, available=CARD.available - other.total))
        assert (later.num_blocks, later.max_model_len, later.max_num_seqs) == (
            plan.num_blocks,
            plan.max_model_len,
            plan.max_num_seqs,
        )
        assert later.total == plan.total


def test_sizes_that_are_said_are_kept(folders: list[Path]) -> None:
    wish = wishes(folders, [0, 1, 1])
    wish[1:] = [replace(one, config=replace(one.config, gpu_memory_utilization=0.4)) for one in wish[1:]]
    found = seats(wish, EngineConfig(), CARD)
    assert found.plans[1].total <= 0.4 * CARD.total < found.plans[0].total
    assert found.groups() == [(1, 2), (0,)] and not found.all_fit
    assert "Together fit: m1 + m2; m0" in found.text()
    assert found.to_dict()["fit_together"] == [["m1", "m2"], ["m0"]]


def test_refusals(folders: list[Path]) -> None:
    with pytest.raises(PlanError, match=r"m0: .*does not fit"):
        seats(wishes(folders, [0, 1]), EngineConfig(), replace(CARD, total=4 * GIB, available=4 * GIB))
    for length in ("16M", "x"):  # longer than it was made for, and none
        long = wishes(folders, [0, 1])
        long[1] = replace(long[1], config=replace(long[1].config, max_model_len=length))
        with pytest.raises(InputError, match=r"^m1: --max-model-len is "):
            seats(long, EngineConfig(), CARD)
    mixed = wishes(folders, [0, 1])
    mixed[0] = replace(mixed[0], config=replace(mixed[0].config, device="cuda"))
    with pytest.raises(InputError, match="one device, but device is cpu and cuda"):
        seats(mixed, EngineConfig())


class Plan:
    """As far as sets are concerned."""

    host_budget = None
    host: dict[str, int] = {}  # noqa: RUF012

    def __init__(self, total: int) -> None:
        self.total = total


@pytest.mark.parametrize("count", [10, 40])
def test_the_sets_of_many_are_found_quickly(count: int) -> None:
    found = Seats(tuple(map(str, range(count))), tuple(Plan(k) for k in range(1, count + 1)), 15, "")  # type: ignore[arg-type]
    groups = found.groups()
    assert (0, 1, 2, 3, 4) in groups and all(found.fits(group) for group in groups if len(group) > 1)
    assert {k for group in groups for k in group} >= set(range(15 if count > 15 else count))


def test_the_hosts_memory_counts_too() -> None:
    plans = [Plan(1), Plan(1)]
    for plan in plans:
        plan.host_budget, plan.host = 10, {"swap space": 6}  # type: ignore[assignment]
    found = Seats(("a", "b"), tuple(plans), 15, "")  # type: ignore[arg-type]
    assert found.fits([0]) and not found.all_fit and found.groups() == [(0,), (1,)]
