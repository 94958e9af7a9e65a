"""What happens before an engine says that it is ready, with a device that only says what its memory would be."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from appliance.config import EngineConfig
from appliance.memory.devices import DeviceInfo
from appliance.memory.learned import FILE, LAYERS
from appliance.memory.measure import Reading
from appliance.memory.planner import MemoryPlan, PlanError, make_plan
from appliance.runtime import engine as engine_module
from appliance.runtime import runner, startup, warmup
from appliance.runtime.engine import Engine
from appliance.runtime.options import choose_device
from appliance.runtime.startup import Kernels, Stopwatch, Timeline, Tools
from kernels.configs import Table
from kernels.tune import choose
from quant.errors import InputError
from tests.runtime.conftest import answers, submit
from tests.runtime.fake_lane import FakeLane
from tests.runtime.test_graphs import FakeRecorder

Load = Callable[..., Engine]
MIB = 1 << 20


@dataclass
class FakeGauge:
    """A card on which this process holds ``held`` bytes, and ``step`` more each time it is read."""

    available: int = 0
    held: int = 0
    step: int = 0
    begun: int = 0
    readings: list[Reading] = field(default_factory=list)

    def begin(self) -> None:
        self.begun += 1

    def read(self) -> Reading:
        held = self.held + self.step * len(self.readings)
        self.readings.append(Reading(free=self.available - held, reserved=held, peak=held))
        return self.readings[-1]


class CostlyRecorder(FakeRecorder):
    """What it has recorded takes ``cost`` bytes of a card each, as long as somebody has it."""

    def __init__(self, gauge: FakeGauge, cost: int) -> None:
        super().__init__()
        self.gauge, self.cost, self.pools, self.live = gauge, cost, 0, 0

    def begin(self) -> None:
        assert not self.live, "what was recorded before is still there"
        self.pools += 1

    def record(self, work: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
        run, result = super().record(work)
        self._count(1)
        weakref.finalize(run, self._count, -1)
        return run, result

    def _count(self, more: int) -> None:
        self.live += more
        self.gauge.held += more * self.cost


@pytest.fixture
def on_card(monkeypatch: pytest.MonkeyPatch) -> FakeGauge:
    """Engines load as on a card, with operators of the CPU; a card with plenty of memory until a test says otherwise."""
    gauge = FakeGauge()
    tools = Tools(FakeLane(), gauge, FakeRecorder())
    monkeypatch.setattr(Tools, "of", classmethod(lambda cls, *args: tools))

    def planned(directory: Path, config: EngineConfig) -> MemoryPlan:
        made = make_plan(directory, config, DeviceInfo("cpu", "fake card", 1 << 34, 1 << 33))
        plan = replace(made, grammars={})  # beside a card they are the host's
        gauge.available = plan.device.available
        gauge.held = gauge.held or plan.total - plan.kv_bytes
        return replace(plan, graphs={"pool": 0})

    monkeypatch.setattr(engine_module, "make_plan", planned)
    return gauge


def test_cards_are_counted_as_the_plan_counts_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA reads how when it is asked for the first time; by itself its first card is the fastest, not nvidia-smi's first."""
    orders: list[str | None] = []

    def is_available() -> bool:
        orders.append(os.environ.get("CUDA_DEVICE_ORDER"))
        return len(orders) < 3

    monkeypatch.setattr(torch.cuda, "is_available", is_available)
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "FASTEST_FIRST")  # whoever says so
    assert choose_device("cuda") == torch.device("cuda")
    monkeypatch.delenv("CUDA_DEVICE_ORDER")
    assert choose_device("cuda") == torch.device("cuda") and orders == ["FASTEST_FIRST", "PCI_BUS_ID"]
    with pytest.raises(InputError, match=r"no NVIDIA card that it can use, .*doctor` says\); use --device cpu"):
        choose_device("cuda")


UNMEASURED = DeviceInfo("cuda", "a card without a table", 1 << 34, 1 << 34)


@dataclass(frozen=True)
class Lengths:
    """What a warm-up asks of a plan."""

    max_num_batched_tokens: int
    max_num_seqs: int
    max_model_len: int
    device: DeviceInfo = UNMEASURED


def requests() -> list:
    return [submit(f"r{i}", range(3, 20 + i), max_tokens=10, temperature=0.7 * (i % 2), seed=i) for i in range(9)]


def test_an_engine_that_has_warmed_up_answers_as_one_that_has_not(
    load: Load, on_card: FakeGauge, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    on_card.step = MIB
    with caplog.at_level(logging.INFO, logger="appliance"):
        engine = load(max_num_seqs=6, max_num_batched_tokens=64)
    measured = engine.info.plan["measured"]
    assert measured["graphs"] == MIB and measured["held"] == measured["planned"]
    assert engine.info.plan["kv_cache"]["num_blocks"] == measured["planned_blocks"] == engine.scheduler.pool.num_blocks
    assert list(engine.info.startup) == ["plan", "load", "pack", "warm-up", "cache", "graphs", "ready"]
    parts = sum(seconds for name, seconds in engine.info.startup.items() if name != "ready")
    assert parts <= engine.info.startup["ready"] == engine.info.ready_s
    assert "ready in" in caplog.text and "4 sizes of decode steps recorded" in caplog.text  # 1, 2, 4, 6
    assert "held before the KV cache" in caplog.text
    ours = answers(engine, requests())
    monkeypatch.undo()
    assert ours == answers(load(max_num_seqs=6, max_num_batched_tokens=64), requests())


def test_what_the_card_holds_beyond_the_plan_comes_from_the_cache(load: Load, on_card: FakeGauge) -> None:
    whole = load(max_num_seqs=6).info.plan
    block, blocks = whole["kv_cache"]["block_bytes"], whole["kv_cache"]["num_blocks"]
    on_card.held = whole["budget_bytes"] - 40 * block - block // 2
    engine = load(max_num_seqs=6)
    assert engine.info.plan["kv_cache"]["num_blocks"] == engine.scheduler.pool.num_blocks == 40 < blocks
    assert engine.runner.caches[0].k.shape[0] == 41  # and the one for padding
    assert engine.stats().blocks_total == 40 and engine.info.max_model_len == 256
    answers(engine, requests())


def test_recorded_steps_that_take_more_than_planned_stay_within_the_budget(
    load: Load, on_card: FakeGauge, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """They and a smaller cache are made again, with the first ones gone; and what they took is kept for the next plan."""
    monkeypatch.setenv("APPLIANCE_CACHE_DIR", str(tmp_path))
    whole = load(max_num_seqs=6, max_num_batched_tokens=64)
    plan = whole.info.plan
    block, budget = plan["kv_cache"]["block_bytes"], plan["budget_bytes"]
    expected = answers(whole, requests())
    base = budget - 40 * block - block // 2

    def fresh(cost: int) -> tuple[Engine, CostlyRecorder]:
        on_card.held = base
        recorder = CostlyRecorder(on_card, cost)
        tools = Tools(FakeLane(), on_card, recorder)
        monkeypatch.setattr(Tools, "of", classmethod(lambda cls, *args: tools))
        return load(max_num_seqs=6, max_num_batched_tokens=64), recorder

    engine, recorder = fresh(2 * block)  # 4 sizes
    assert (recorder.recorded, recorder.pools, recorder.live) == (8, 2, 4)
    found = engine.info.plan
    assert found["kv_cache"]["num_blocks"] == engine.scheduler.pool.num_blocks == 32
    assert found["measured"]["graphs"] == found["graphs_bytes"]["total"] == 8 * block
    assert found["measured"]["held"] + found["measured"]["graphs"] + found["kv_cache"]["bytes"] <= budget
    assert "took" in caplog.text and "a smaller cache are made once more" in caplog.text
    kept = json.loads((tmp_path / FILE).read_text())[LAYERS]
    layers = found["kv_cache"]["layers"]
    assert [max(starts) for starts in kept.values()] == [-(-8 * block // (4 * layers))]
    assert answers(engine, requests()) == expected
    caplog.clear()
    engine, recorder = fresh(block // 8)  # within what is left
    assert (recorder.recorded, recorder.pools, engine.scheduler.pool.num_blocks) == (4, 1, 40) and "took" not in caplog.text
    with pytest.raises(PlanError, match=r"CUDA graphs will need .* room for 0 KV blocks is left"):
        fresh(11 * block)


def test_what_steps_left_is_given_back_before_a_cache_is_made(
    load: Load, on_card: FakeGauge, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch's allocator puts a cache into what is free of larger pieces, which then are not given back: also of the cache before,
    where one is made once more since it has to be smaller.
    """
    order: list[object] = []
    allocate, budget = runner.allocate_caches, load(max_num_seqs=6).info.plan["budget_bytes"]

    def allocated(plan: MemoryPlan, blocks: int, **options: object) -> list:
        order.append(blocks)
        return allocate(plan, blocks, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(runner, "allocate_caches", allocated)
    monkeypatch.setattr(on_card, "begin", lambda: order.append("given back"))
    block = load(max_num_seqs=6).info.plan["kv_cache"]["block_bytes"]
    order.clear()
    on_card.held = budget - 40 * block
    tools = Tools(FakeLane(), on_card, CostlyRecorder(on_card, 2 * block))
    monkeypatch.setattr(Tools, "of", classmethod(lambda cls, *args: tools))
    smaller = load(max_num_seqs=6).scheduler.pool.num_blocks
    assert smaller < 40
    # For one block; for the cache and what is recorded over it; for both once more. A block more fills recorded steps up.
    assert order == ["given back", 1, *("given back", 41, "given back"), *("given back", smaller + 1, "given back")]


@pytest.mark.parametrize(("dtype", "pieces"), [("auto", 2), ("int8", 4)])
def test_a_cache_is_few_pieces_of_memory(tiny: Path, dtype: str, pieces: int) -> None:
    """Each may take 2 MiB more of a card than was planned."""
    config = EngineConfig(model=str(tiny), kv_cache_dtype=dtype, kv_cache_memory_bytes=1 << 20, threads=1)
    plan = make_plan(tiny, config)
    given = [(0.5, 2.0) if dtype == "int8" else None] * plan.kv.layers
    caches = runner.allocate_caches(plan, plan.num_blocks, device=torch.device("cpu"), given=given)
    tensors = [tensor for cache in caches for tensor in cache.tensors]
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == pieces
    assert sum(tensor.nbytes for tensor in tensors) == plan.kv_bytes and [cache.given for cache in caches] == given
    for number, tensor in enumerate(tensors):  # and no two layers share any of them
        assert tensor.shape[0] == plan.num_blocks and not tensor.view(torch.uint8).any()
        tensor.view(torch.uint8).fill_(number + 1)
    assert all((tensor.view(torch.uint8) == number + 1).all() for number, tensor in enumerate(tensors))


def test_a_longest_context_that_was_not_asked_for_becomes_shorter(load: Load, on_card: FakeGauge) -> None:
    whole = load(max_model_len="auto", max_num_seqs=6).info
    block = whole.plan["kv_cache"]["block_bytes"]
    on_card.held = whole.plan["budget_bytes"] - 17 * block
    engine = load(max_model_len="auto", max_num_seqs=6)
    assert engine.info.max_model_len == 17 * 16 < whole.max_model_len
    answers(engine, [submit("long", range(3, 203), max_tokens=70)])
    on_card.held = whole.plan["budget_bytes"] - 15 * block
    with pytest.raises(PlanError, match=r"room for 15 KV blocks is left; one sequence of 256 tokens needs 16"):
        load(max_model_len="auto", max_num_seqs=6)
    with pytest.raises(PlanError, match=r"What would fit: --max-model-len 240"):
        load(max_model_len=256, max_num_seqs=6)


def test_a_card_that_runs_out_of_memory_is_a_plan_that_was_wrong(
    load: Load, on_card: FakeGauge, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(error: Exception) -> Callable[..., None]:
        def fail(*args: object, **options: object) -> None:
            raise error

        return fail

    ours = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore words.")
    triton = RuntimeError("Triton Error [CUDA]: out of memory")
    for error, place, name in ((ours, warmup, "run"), (triton, FakeRecorder, "record"), (ours, startup, "load_model")):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, failing(error))
            with pytest.raises(PlanError, match=r"fake card ran out of memory before it was ready: try a smaller --kv-cache-"):
                load()
    with monkeypatch.context() as patch:
        patch.setattr(warmup, "run", failing(RuntimeError("illegal memory access")))
        with pytest.raises(RuntimeError, match=r"^illegal memory access"):
            load()


def test_what_triton_lacks_is_told_in_a_line(load: Load, on_card: FakeGauge, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its launchers are compiled in C; its own errors are no RuntimeErrors."""
    errors = pytest.importorskip("triton.runtime.errors")
    compiler = "needs a C compiler and Python's headers .* apt install gcc python3-dev"
    for error, words in (
        (
            subprocess.CalledProcessError(1, ["/usr/bin/gcc", "main.c"]),
            r"Python's headers .*, and /usr/bin/gcc fails: apt install",
        ),
        (RuntimeError("Failed to find C compiler. Please specify via CC environment variable."), compiler),
        (errors.OutOfResources(300000, 232448, "shared memory"), r"\(OutOfResources: out of resource: shared memory, .*\)"),
        (errors.PTXASError("`ptxas` failed\nmore"), r"\(PTXASError: PTXAS error: `ptxas` failed\); --device cpu serves"),
    ):
        monkeypatch.setattr(warmup, "run", Mock(side_effect=error))
        with pytest.raises(InputError, match=words):
            load()
    monkeypatch.setattr(warmup, "run", Mock(side_effect=KeyError("our own fault")))
    with pytest.raises(KeyError):
        load()


def test_a_cpu_has_the_same_timeline_without_warm_up(load: Load, tiny: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="appliance"):
        info = load().info
    assert list(info.startup) == ["plan", "load", "pack", "cache", "ready"] and info.plan["measured"] is None
    assert "warmed up" not in caplog.text and "ready in" in caplog.text
    config = EngineConfig(model=str(tiny), dtype="float32", max_model_len=64, kv_cache_memory_bytes=4 << 20)
    told = Engine.load(config, import_s=1.5).info
    assert told.startup["import"] == 1.5 and told.startup["ready"] == 1.5 + told.ready_s


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA card")
@pytest.mark.parametrize("eager", [False, True])
def test_on_a_card_nothing_is_compiled_once_it_is_ready(tiny: Path, eager: bool) -> None:
    """Prompts and answers of many lengths, drawn in every way; and what the process holds stays within the budget."""
    config = EngineConfig(
        model=str(tiny), device="cuda", dtype="float16", max_model_len=256, enforce_eager=eager, max_num_seqs=40
    )
    engine = Engine.load(config)
    plan = engine.info.plan
    assert plan["measured"]["held"] > 0 and (plan["measured"]["graphs"] is None) == eager
    ways = [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_p": 0.9}, {"logprobs": 2}, {"repetition_penalty": 1.1}]
    many = [submit(f"r{n}", range(3, 4 + n), max_tokens=60, **ways[n % len(ways)]) for n in range(1, 190, 3)]
    with Kernels("triton") as kernels:
        answers(engine, many)
    assert (kernels.compiled, kernels.cached) == (0, 0)
    assert torch.cuda.max_memory_reserved() + plan["runtime_bytes"] // 2 <= plan["budget_bytes"]


@given(
    tokens=st.integers(1, 5000),
    sequences=st.integers(1, 600),
    longest=st.integers(2, 40_000),
)
@settings(max_examples=60, deadline=None)
def test_every_step_of_the_warm_up_could_be_a_real_one(tokens: int, sequences: int, longest: int) -> None:
    plan = Lengths(tokens, sequences, longest)
    steps = [*warmup.trials(plan), *warmup.rehearsal(plan)]  # type: ignore[arg-type]
    for step in steps:
        assert 1 <= len(step.chunks) <= min(sequences, tokens) and 1 <= step.tokens <= tokens
        assert all(start + length <= longest and length >= 1 for start, length in step.chunks)
        lengths = [length for _, length in step.chunks]
        assert lengths == sorted(lengths, key=lambda n: n > 1), "single tokens come first"
    assert steps[0].tokens == min(tokens, sequences * longest) == max(step.tokens for step in steps)
    assert max(len(step.chunks) for step in steps) == min(sequences, tokens)
    assert max(start + length for step in steps for start, length in step.chunks) == longest


@pytest.mark.parametrize("capability", [75, 80, 89, 90, 120])
def test_a_warm_up_takes_every_launch_that_some_number_of_rows_takes(capability: int) -> None:
    for outputs, inputs, processors in ((4096, 4096, 132), (28672, 4096, 128), (1024, 14336, 40), (128, 128, 188)):
        shape = {"outputs": outputs, "inputs": inputs, "multiprocessors": processors, "capability": capability}
        tried = {choose(rows=rows, **shape) for rows in warmup.edges(2048)}
        assert tried == {choose(rows=rows, **shape) for rows in range(1, 2049)}


def test_a_warm_up_takes_every_launch_of_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    launch = choose(rows=1, outputs=4096, inputs=4096)
    sizes = tuple((most, launch) for most in (1, 7, 100, 300, 9000))
    monkeypatch.setattr(warmup, "table", lambda card: Table(card, 89, {("w4 fp16", 4096, 4096): sizes}))
    steps = warmup.trials(Lengths(2048, 16, 4096))  # type: ignore[arg-type]
    assert {7, 8, 100, 101, 300, 301} <= {step.tokens for step in steps if len(step.chunks) == 1}


def test_seconds_of_calls_that_overlap_count_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that moves while four calls are under way, and while none is."""
    now = [10.0]
    monkeypatch.setattr(startup, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    together = threading.Barrier(4, lambda: now.append(now.pop() + 2.5), timeout=60)
    watch = Stopwatch(together.wait)
    threads = [threading.Thread(target=watch) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert watch.seconds == 2.5
    now[0] += 100.0
    together.abort()
    with pytest.raises(threading.BrokenBarrierError):
        watch()
    assert watch.seconds == 2.5 and watch._running == 0


def test_a_timeline_takes_parts_out_of_parts() -> None:
    timeline = Timeline(2.0)
    with timeline.part("load"):
        pass
    timeline.seconds["load"] = 3.0
    timeline.move("pack", 1.25, "load")
    assert timeline.seconds == {"import": 2.0, "load": 1.75, "pack": 1.25}
    assert str(timeline) == "import 2.0 s, load 1.8 s, pack 1.2 s"


def test_kernels_are_counted_by_where_they_came_from(caplog: pytest.LogCaptureFixture) -> None:
    knobs = pytest.importorskip("triton").knobs
    heard: list[bool] = []
    before = knobs.compilation.listener
    knobs.compilation.listener = lambda *, cache_hit, **facts: heard.append(cache_hit)
    try:
        with caplog.at_level(logging.INFO, logger="appliance"), Kernels("triton") as kernels:
            for hit in (True, False, True, False):
                knobs.compilation.listener(src=None, metadata={}, metadata_group={}, times=None, cache_hit=hit)
        knobs.compilation.listener(cache_hit=True)
    finally:
        knobs.compilation.listener = before
    assert (kernels.compiled, kernels.cached) == (2, 2) and heard == [True, False, True, False, True]
    assert str(kernels) == f"2 kernels compiled, 2 from {knobs.cache.dir}"
    assert caplog.text.count("compiling kernels") == 1
    with Kernels("reference") as none:
        assert str(none) == "no kernels to compile"
