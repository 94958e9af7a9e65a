"""Recorded decode steps: what is sent, padded and dropped, with a recorder that runs on the CPU."""

from __future__ import annotations

import gc
import random
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from appliance.config import EngineConfig
from appliance.memory.graphs import capture_sizes
from appliance.memory.planner import make_plan
from appliance.runtime.batch import StepArrays
from appliance.runtime.engine import Engine
from appliance.runtime.graphs import CudaRecorder, DecodeGraphs
from appliance.runtime.runner import Runner
from appliance.runtime.staging import Staging
from kernels.ops import PagedBatch
from tests.runtime.conftest import answers, submit
from tests.runtime.fake_lane import FakeLane

Load = Callable[..., Engine]


class FakeRecorder:
    """Runs the work again at each replay, on what then lies in the inputs, and overwrites one and the same result."""

    def __init__(self) -> None:
        self.recorded = self.replays = 0

    def begin(self) -> None:
        pass

    def record(self, work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        result = work().clone()
        self.recorded += 1

        def replay() -> None:
            self.replays += 1
            result.fill_(float("nan"))
            result.copy_(work())

        return replay, result


def recorded(engine: Engine, recorder: FakeRecorder) -> Engine:
    """The same engine with a runner that records its decode steps."""
    config = EngineConfig(
        model=engine.info.directory,
        dtype="float32",
        reference_ops=True,
        max_model_len=engine.info.max_model_len,
        kv_cache_memory_bytes=engine.info.plan["kv_cache"]["bytes"],
        max_num_seqs=engine.scheduler.max_num_seqs,
    )
    plan = make_plan(Path(engine.info.directory), config)
    assert plan.num_blocks == engine.scheduler.pool.num_blocks
    lane = FakeLane()
    engine.runner = Runner(engine.runner.decoder, plan, device=torch.device("cpu"), lane=lane, recorder=recorder)
    return engine


@pytest.mark.parametrize("max_num_seqs", [5, 20])
def test_recorded_steps_give_the_same_answers(load: Load, max_num_seqs: int) -> None:
    """Batches shrink and grow through all sizes; prompts and decodes mix; padding never touches what somebody owns."""
    rng = random.Random(5)
    requests = [
        submit(f"r{i}", [rng.randrange(3, 256) for _ in range(rng.choice((1, 15, 16, 17, 40)))], max_tokens=rng.randrange(1, 40))
        for i in range(24)
    ]
    expected = answers(load(max_num_seqs=max_num_seqs), requests)
    recorder = FakeRecorder()
    engine = recorded(load(max_num_seqs=max_num_seqs), recorder)
    assert recorder.recorded == len(capture_sizes(max_num_seqs))
    for cache in engine.runner.caches:  # what padding may read is the spare block, and nothing that nobody has written
        cache.k[:-1].fill_(float("nan"))
        cache.v[:-1].fill_(float("nan"))
    assert answers(engine, requests) == expected
    assert answers(engine, requests) == expected  # over what the first run left in the inputs
    assert recorder.replays > 40


def test_sizes_leave_little_padding() -> None:
    assert capture_sizes(1) == (1,) and capture_sizes(3) == (1, 2, 3) and capture_sizes(20) == (1, 2, 4, 8, 16, 20)
    for most in (1, 7, 64, 130, 256, 1000):
        sizes = capture_sizes(most)
        assert sizes[-1] == most and list(sizes) == sorted(set(sizes))
        for n in range(1, most + 1):
            size = min(size for size in sizes if size >= n)
            assert size - n < 16 and size < max(2 * n, 2)


def test_inputs_are_as_said() -> None:
    """Every row beyond the step's is one token in the spare block, also after steps of other sizes and longer tables."""
    seen: list[tuple[Tensor, PagedBatch]] = []

    def forward(ids: Tensor, batch: PagedBatch) -> Tensor:
        seen.append((ids.clone(), PagedBatch(*(t.clone() for t in tensors(batch)), batch.max_query, batch.max_seq)))
        return ids.float().unsqueeze(1)

    staging = Staging(1 << 12, FakeLane(), torch.device("cpu"))
    graphs = DecodeGraphs(
        forward, sizes=(4, 8), table_width=6, spare_block=99, block_size=16, recorder=FakeRecorder(), send=staging.send
    )
    assert len(seen) == 2
    for n, width in ((3, 6), (8, 2), (1, 1), (5, 3), (4, 4), (2, 2)):
        step = StepArrays(
            ids=np.arange(n) + 7,
            positions=np.full(n, 16 * width - 1),
            slots=np.arange(n) + 100,
            starts=np.arange(n + 1, dtype=np.int32),
            ends=np.full(n, 16 * width, dtype=np.int32),
            tables=np.arange(n * width, dtype=np.int32).reshape(n, width),
            max_query=1,
        )
        prepared = graphs.prepare(step)
        assert prepared is not None
        staging.send([*prepared.arrays, np.arange(n, dtype=np.int64)])  # what comes behind moves nothing
        assert graphs.replay(prepared)[:n].tolist() == [[i + 7.0] for i in range(n)]
        ids, batch = seen[-1]
        size = 4 if n <= 4 else 8
        assert ids.shape == (size,) and batch.max_query == 1 and batch.max_seq == 96
        assert batch.query_starts.tolist() == list(range(size + 1))
        assert torch.equal(batch.slots, torch.tensor([*range(100, 100 + n), *[99 * 16] * (size - n)]))
        assert torch.equal(batch.positions, torch.tensor([16 * width - 1] * n + [0] * (size - n)))
        assert batch.seq_lens.tolist() == [16 * width] * n + [1] * (size - n)
        assert batch.block_tables[:n, :width].tolist() == step.tables.tolist()
        assert batch.block_tables[n:, 0].tolist() == [99] * (size - n)
    assert graphs.prepare(StepArrays(*[np.zeros(9)] * 6, max_query=1)) is None
    assert graphs.prepare(StepArrays(*[np.zeros(2)] * 6, max_query=2)) is None


def tensors(batch: PagedBatch) -> tuple[Tensor, ...]:
    return batch.positions, batch.slots, batch.query_starts, batch.seq_lens, batch.block_tables


class Left:
    """What refers to itself."""

    itself: Left


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_collected_while_a_step_is_recorded(fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an earlier engine has left would be given back amid a recording, which ends it. What is recorded has run once."""
    made = SimpleNamespace(runs=0)
    made.replay = lambda: setattr(made, "runs", made.runs + 1)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: made)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, pool: nullcontext())
    lives: list[bool] = []

    def work() -> Tensor:
        left = Left()
        left.itself, seen = left, weakref.ref(left)
        del left
        kept = [[i] for i in range(100_000)]  # so many that a collection is due many times over
        lives.append(seen() is not None)
        if fails and len(lives) == 2:
            raise RuntimeError
        return torch.zeros(len(kept[:1]))

    gc.collect()
    with pytest.raises(RuntimeError) if fails else nullcontext():
        CudaRecorder().record(work)
    assert lives == [False, True], "the second time is recorded"
    assert gc.isenabled() and made.runs == (not fails)
