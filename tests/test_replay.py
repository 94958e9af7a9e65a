"""The replay of traces: its readers, clock, cost model, rivals and measurements, against answers known by hand."""

from __future__ import annotations

import importlib
import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from appliance.core.blocks import BlockPool
from appliance.core.request import Request
from appliance.core.scheduler import Scheduler

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
trace, cost_module, rivals, sim, predict = (
    importlib.import_module(name) for name in ("replay_trace", "replay_cost", "replay_rivals", "replay_sim", "gpu_predict")
)
Job, Replay, Reserved = trace.Job, sim.Replay, rivals.Reserved


class Seconds:
    """A step takes a second, whatever it does."""

    def step(self, rows: int, sampled: int, cached: int, pairs: int, context: int) -> float:
        return 1.0

    def cross(self, tokens: int) -> float:
        return 0.0

    def copy(self, tokens: int) -> float:
        return 0.0


class Rows(Seconds):
    """A millisecond a token: what is computed twice shows."""

    def step(self, rows: int, sampled: int, cached: int, pairs: int, context: int) -> float:
        return rows / 1e3


def paged(blocks: int, size: int, *, budget: int = 64, seqs: int = 8) -> Scheduler:
    return Scheduler(BlockPool(blocks, size), max_num_batched_tokens=budget, max_num_seqs=seqs)


def reserved(capacity: int, room: int | None, *, budget: int = 64, seqs: int = 8, whole: bool = False) -> Any:
    def size(request: Request) -> int:
        return room or request.max_total

    return Reserved(capacity, size, max_num_batched_tokens=budget, max_num_seqs=seqs, whole_batches=whole)


def jobs_of(*lengths: tuple[int, int], arrivals: Sequence[float] | None = None) -> list[Any]:
    times = arrivals or [0.0] * len(lengths)
    return [Job(i, time, *pair) for i, (time, pair) in enumerate(zip(times, lengths, strict=True))]


def random_jobs(rng: random.Random, count: int, longest: int) -> list[Any]:
    pairs = [(rng.randint(1, longest - 8), rng.randint(1, 8)) for _ in range(count)]
    return jobs_of(*pairs, arrivals=sorted(rng.uniform(0, 2 * count) for _ in pairs))


def test_the_ideal_of_a_trace_by_hand() -> None:
    jobs = [
        Job(0, 0.0, 1100, 1, (1, 2, 3)),
        Job(1, 0.0, 1100, 1, (1, 2, 3)),  # all of it: 1100
        Job(2, 1.0, 1500, 1, (1, 2, 4)),  # two blocks: 1024
        Job(3, 1.0, 1024, 1, (5, 2)),  # 2 is known, but not behind 5
        Job(4, 1.0, 600, 1, (1, 6)),  # 512
    ]
    assert trace.ideal_hits(jobs) == 1100 + 1024 + 512
    assert trace.ideal_hits(jobs, capacity=0) == 0
    assert trace.ideal_hits(jobs, capacity=1100) == 1100 + 1024, "1 and 2 outlive the tail 3; then 5 and 2 push out 1"


def test_equal_ids_are_equal_tokens_and_others_have_none_in_common() -> None:
    one, two, alone = Job(0, 0.0, 1100, 1, (7, 8, 9)), Job(1, 0.0, 1100, 1, (7, 8, 10)), Job(2, 0.0, 3, 2)
    assert len(one.tokens()) == 1100 and one.tokens()[:1024] == two.tokens()[:1024]
    assert len({*one.tokens(), *two.tokens(), *alone.tokens(), one.token, two.token, alone.token}) == 3 + 1 + 1 + 3


def test_readers(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    path.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03.9799600,4808,10\n2023-11-16 18:17:04.2319600,3180,8"
    )
    first, second = trace.azure(path)
    assert (first, second.prompt, second.answer, second.shared) == (Job(0, 0.0, 4808, 10), 3180, 8, ())
    assert second.arrival == pytest.approx(0.252)
    assert trace.lasting([first, second], 5.0)[1].arrival == 5.0 and trace.at_once([second])[0].arrival == 0.0
    line = {"timestamp": 1500, "input_length": 513, "output_length": 2, "hash_ids": [4, 5]}
    path.write_text("\n".join([json.dumps(line)] * 2 + [json.dumps({**line, "timestamp": 4500})]))
    assert trace.mooncake(path) == [Job(i, time, 513, 2, (4, 5)) for i, time in enumerate((1.5, 3.0, 4.5))], "over the tick"
    path.write_text(json.dumps({**line, "input_length": 512}))
    with pytest.raises(ValueError, match="line 1 has not one id"):
        trace.mooncake(path)
    path.write_text(json.dumps([{"prompt_tokens": 5, "response_tokens": 6}, {"prompt_tokens": 7, "response_tokens": 8}]))
    found = trace.sharegpt(path)
    assert len(found) == 2 * trace.SHAREGPT_ROUNDS and {(j.prompt, j.answer) for j in found[:2]} == {(5, 6), (7, 8)}


def test_the_real_traces(shared_data: Path) -> None:
    """What their publishers say of them, and the share that repeats in Mooncake's."""
    folder = shared_data / "traces"
    conv, code = (trace.azure(folder / f"AzureLLMInferenceTrace_{name}.csv") for name in ("conv", "code"))
    assert (len(conv), len(code)) == (19366, 8819) and conv[-1].arrival == pytest.approx(3501.7, abs=0.1)
    jobs = trace.mooncake(folder / "mooncake_conversation.jsonl")
    assert len(jobs) == 12031 and trace.ideal_hits(jobs) / sum(j.prompt for j in jobs) == pytest.approx(0.3736, abs=1e-4)


def test_a_step_costs_what_the_predictions_say() -> None:
    model = cost_module.Llama("Llama-3.1-8B")
    cost = cost_module.Roofline(model)
    for sequences in (1, 8, 16, 32):
        asked = cost.step(sequences, sequences, sequences * 2048, 0, 0)
        assert asked == pytest.approx(model.decode_s(sequences, 2048, predict.TARGETS))
    products, attention = model.prefill_ops(2048)
    best = (products / predict.PREFILL + attention / predict.PREFILL_ATTENTION) / predict.RATE
    assert cost.step(2048, 0, 0, 2048 * 2049 // 2, 2048) == pytest.approx(best + cost.launch_s)
    assert cost.step(16, 0, 0, 16 * 10**5, 10**5) > 1e5 * model.plan.kv.token_bytes / predict.BANDWIDTH, "it reads the cache"
    assert cost.cross(1000) == 1000 * 2 * 32 * 8 * 128 * 2 / cost_module.BUS


def test_makespan_and_waste_by_hand() -> None:
    """Prompts of 4 and answers of 3 and 5: one step for both prompts, then one for each token but the first."""
    result = Replay(jobs_of((4, 3), (4, 5)), paged(8, 4), Seconds()).run()
    assert (result.span, result.steps, result.jobs, result.answer_tokens) == (5.0, 5, 2, 8)
    assert list(result.ttft) == [1.0, 1.0] and list(result.total) == [3.0, 5.0] and list(result.itl) == [1.0] * 6
    assert (result.empty, result.held) == (0 + (3 + 3) + (2 + 2) + 1 + 0, 8 + 16 + 16 + 8 + 8)
    assert result.waste == 11 / 56 and result.computed_tokens == 4 + 2 + 4 + 4
    assert result.per_token == (3 / 3 + 5 / 5) / 2


def test_the_clock_skips_what_is_idle_and_the_first_token_counts_from_arrival() -> None:
    result = Replay(jobs_of((2, 2), (2, 1), arrivals=[10.0, 20.5]), paged(8, 4), Seconds()).run()
    assert result.span == 11.5 and result.busy == 3.0 and list(result.ttft) == [1.0, 1.0]
    late = Replay(jobs_of((2, 2), (2, 1), arrivals=[10.0, 10.5]), paged(8, 4), Seconds()).run()
    assert late.span == 2.0 and list(late.ttft) == [1.0, 1.5], "it waits for the step under way"


def test_whole_batches_by_hand() -> None:
    """Answers of 2, 6, 2, 2 two at a time: 6 steps for the first two, 2 for the others; one by one as they end, 6 in all."""
    jobs = jobs_of((2, 2), (2, 6), (2, 2), (2, 2))
    batches = Replay(jobs, reserved(16, 8, whole=True), Seconds()).run()
    assert batches.span == 8.0 and list(batches.ttft) == [1.0, 1.0, 7.0, 7.0]
    assert Replay(jobs, reserved(16, 8), Seconds()).run().span == 6.0
    assert Replay(jobs, reserved(16, None, whole=True), Seconds()).run().span == 8.0, "8 for the longer is 8 for both"
    padded = reserved(15, None, whole=True)
    assert Replay(jobs, padded, Seconds()).run().span == 2 + 6 + 2, "the second alone: beside it the first would be as large"


def test_room_at_the_longest_is_one_block_of_that_length() -> None:
    """The rival against the real scheduler, whose pool can be that too."""
    rng = random.Random(5)
    for _ in range(20):
        jobs = random_jobs(rng, 30, 40)
        one, other = (Replay(jobs, s, Rows()).run() for s in (reserved(120, 40, budget=16), paged(3, 40, budget=16)))
        assert one.span == pytest.approx(other.span) and list(one.ttft) == pytest.approx(list(other.ttft))
        assert one.empty == pytest.approx(other.empty) and one.held == pytest.approx(other.held)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("room", [None, 40])
def test_rivals_never_take_more_than_there_is(whole: bool, room: int | None) -> None:
    jobs, scheduler = random_jobs(random.Random(6), 60, 40), reserved(130, room, budget=16, whole=whole)
    replay, most = Replay(jobs, scheduler, Seconds()), 0
    while replay._arrive() or scheduler.has_work:
        if not scheduler.has_work:
            replay.now = jobs[replay._next].arrival
            continue
        replay.step()
        empty, held = sim.room(scheduler)
        assert 0 <= empty <= held <= 130
        most = max(most, held)
    assert most > 80 and scheduler.held == 0 and replay.result.jobs == 60


def test_no_token_is_lost_or_made_twice() -> None:
    """A token goes through the model once, or more often where requests give way; run() raises where a length is wrong."""
    jobs = random_jobs(random.Random(7), 100, 40)
    once = sum(j.total - 1 for j in jobs)
    wide = Replay(jobs, paged(100, 4), Rows()).run()
    assert (wide.computed_tokens, wide.preemptions, wide.jobs) == (once, 0, 100)
    assert wide.answer_tokens == sum(j.answer for j in jobs) == len(wide.ttft) + len(wide.itl)
    tight = Replay(trace.at_once(jobs), paged(12, 4), Rows()).run()
    assert tight.preemptions > 0 and tight.computed_tokens > once and tight.answer_tokens == wide.answer_tokens
    assert tight.span == pytest.approx(tight.computed_tokens / 1e3), "the clock has every token's millisecond"


def test_what_can_never_fit_is_refused_and_counted() -> None:
    for scheduler in (paged(2, 4), reserved(9, None), reserved(9, None, whole=True)):
        result = Replay(jobs_of((4, 2), (30, 2), (4, 2)), scheduler, Seconds()).run()
        assert (result.refused, result.jobs, result.prompt_tokens) == (1, 2, 8)
