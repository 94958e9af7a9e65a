"""What loading takes: against the peak of this process while it loads, and in plans that are too small for it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.memory.devices import DeviceInfo
from appliance.memory.fit import MARGIN, fit
from appliance.memory.host import RUNTIME
from appliance.memory.loading import WORKERS, Loading, Transient, Workers
from appliance.memory.plan import PlanError
from models import loader
from tests.memory.peak import peak_of_loading
from tests.memory.published import SMALL, fill, write_published
from tests.memory.test_plan import DEFAULTS, GIB, LLAMA_8B, cpu
from tests.models.test_loader import write_dense
from tests.tiny_model import Shape, config, make_checkpoint

WIDE = Shape(hidden=1024, layers=4, heads=16, kv_heads=4, head_dim=64, mlp=4096, group=128, vocab=24000)
EXPERTS = {**SMALL, "hidden_size": 1024, "moe_intermediate_size": 512, "num_experts": 96, "vocab_size": 8000}  # 512 x 1024


@pytest.fixture(
    scope="module",
    params=["awq", "tied", "dense", "dense-int8", "dense-int4", "gptq-act-order", "ct-w8a8", "ct-fp8", "ct-nvfp4", "experts"],
)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str | None]:
    """And what it is rounded to while it is loaded."""
    folder = tmp_path_factory.mktemp(request.param)
    if request.param.startswith("dense"):
        written = write_dense(folder, hidden_size=768, intermediate_size=3072, num_hidden_layers=3, vocab_size=16000)
        return written, request.param.partition("-")[2] or None
    if request.param in ("awq", "tied"):
        return make_checkpoint(folder, shape=replace(WIDE, tied=request.param == "tied"), tokenizer=False), None
    if request.param == "experts":
        return fill(write_published(folder, EXPERTS, "awq"), "awq"), None
    return fill(write_published(folder, {**config(WIDE), "torch_dtype": "bfloat16"}, request.param), request.param), None


@pytest.fixture(scope="module")
def process() -> Iterator[ProcessPoolExecutor]:
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        yield pool


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("isa", "workers"), [("native", 1), ("native", 2), ("torch", 1)])
def test_the_peak_of_loading_is_as_planned(
    checkpoint: tuple[Path, str | None], process: ProcessPoolExecutor, isa: str, workers: int
) -> None:
    """Never more than planned (with a little for what is no weight), and not so much less that models would be refused."""
    peak = process.submit(peak_of_loading, *checkpoint, isa, workers).result()
    assert peak.measured <= peak.planned + (24 << 20), peak
    assert peak.planned <= 1.7 * peak.measured + (96 << 20), peak


@given(threads=st.integers(1, 16), weights=st.integers(0, 1 << 40), parts=st.tuples(*[st.integers(0, 1 << 34)] * 3))
def test_fewer_workers_never_take_more(threads: int, weights: int, parts: tuple[int, int, int]) -> None:
    ends, kept, layer = parts
    transient = Transient(ends, min(ends, kept), layer)
    weights += transient.ends_kept
    choices = Workers.choices(threads)
    peaks = [transient.peak(weights, one) for one in choices]
    assert peaks == sorted(peaks, reverse=True) and choices[-1] == Workers(1, True)
    assert choices[0].count == min(threads, WORKERS) and len(set(choices)) == len(choices)
    assert min(peaks) >= max(ends, weights)


def test_as_many_workers_as_there_is_room_for() -> None:
    """A head that takes 5 GiB for a while, and 4 GiB a layer, beside weights of 6 GiB."""
    assert loader.WORKERS == WORKERS
    large = replace(LLAMA_8B, loading=Loading(Transient(5 * GIB, 2 * GIB, GIB)), threads=4)
    wide = replace(DEFAULTS, utilization=1.0, max_len=1000, runtime=300 << 20)
    plans = {gib: fit(large, wide, cpu(gib)) for gib in (24, 11.5, 9.5, 8.5)}
    assert [plan.workers for plan in plans.values()] == [Workers(4), Workers(4, True), Workers(3, True), Workers(2, True)]
    assert all(plan.load_peak <= plan.budget for plan in plans.values())
    assert plans[24].load_peak == plans[24].runtime + 6 * GIB + 3 * GIB + 3 * GIB
    assert plans[8.5].to_dict()["loading"] == {"count": 2, "ends_first": True, "peak_bytes": plans[8.5].load_peak}
    with pytest.raises(PlanError, match=r"while weights are loaded one layer at a time, 7\.29 GiB are taken for a moment"):
        fit(large, wide, cpu(7.2))


def test_what_the_host_of_a_card_has_to_have() -> None:
    card, host = DeviceInfo("cuda", "card", 24 * GIB, 23 * GIB), DeviceInfo("cpu", "host", 16 * GIB, 8 * GIB)
    large = replace(LLAMA_8B, loading=Loading(Transient(), Transient(3 * GIB, 0, 7 * GIB // 4)), threads=4)
    chosen = replace(DEFAULTS, utilization=0.92, max_len=4096, swap_bytes=3 * GIB)
    plan = fit(large, chosen, card, host)
    assert plan.swap_blocks == 3 * GIB // plan.kv.block_bytes and plan.host["swap space"] == 3 * GIB == plan.swap_bytes
    assert plan.host["what left the cache"] == plan.ghost_bytes == 20 * 8 * plan.swap_blocks
    assert plan.host["runtime"] == RUNTIME and plan.host["grammars"] == plan.grammar_bytes > 0
    assert plan.host_budget == 8 * GIB - MARGIN["cpu"]
    assert plan.workers == Workers(3, True) and plan.host_peak == RUNTIME + 21 * GIB // 4
    assert plan.total == fit(large, replace(chosen, swap_bytes=0), card, host).total  # none of it is on the card
    with pytest.raises(
        PlanError, match=r"the host has 7\.94 GiB of memory available, but 8\.1\d GiB are needed there: runtime 2"
    ):
        fit(large, replace(chosen, swap_bytes=6 * GIB), card, host)


def test_swap_space_on_a_cpu_is_the_same_memory() -> None:
    plain = fit(LLAMA_8B, replace(DEFAULTS, max_len=8192), cpu(24))
    swapping = fit(LLAMA_8B, replace(DEFAULTS, max_len=8192, swap_bytes=GIB), cpu(24))
    assert swapping.swap_blocks == 512 and swapping.host == {} and swapping.host_budget is None
    assert plain.num_blocks - swapping.num_blocks in (512, 513) and swapping.total <= swapping.budget
    assert swapping.fixed - plain.fixed == GIB + 20 * 8 * 512 and swapping.to_dict()["swap"]["ghosts_bytes"] == 20 * 8 * 512  # type: ignore[index]
    assert plain.ghost_bytes == 0
