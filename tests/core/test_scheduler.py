from __future__ import annotations

import csv
import random
from pathlib import Path

import pytest

from appliance.core.blocks import BlockPool
from appliance.core.params import RequestError
from appliance.core.scheduler import Scheduler
from tests.core.fake_model import FakeRunner, alone, make_request, shape


def make(*, blocks: int = 64, block_size: int = 16, budget: int = 64, seqs: int = 8) -> tuple[Scheduler, FakeRunner]:
    scheduler = Scheduler(BlockPool(blocks, block_size), max_num_batched_tokens=budget, max_num_seqs=seqs)
    return scheduler, FakeRunner(scheduler)


def test_a_long_prompt_is_cut_by_the_budget_and_decodes_go_first() -> None:
    scheduler, runner = make(budget=10)
    scheduler.add(make_request("a", range(4), 5))
    scheduler.add(make_request("b", range(20), 5))
    scheduler.add(make_request("c", range(3), 5))
    plans = [shape(runner.step()[0]) for _ in range(4)]
    assert plans == [
        [("a", 0, 4, True), ("b", 0, 6, False)],
        [("a", 4, 1, True), ("b", 6, 9, False)],
        [("a", 5, 1, True), ("b", 15, 5, True), ("c", 0, 3, True)],
        [("a", 6, 1, True), ("b", 20, 1, True), ("c", 3, 1, True)],
    ]


def test_no_more_than_max_num_seqs_run() -> None:
    scheduler, runner = make(seqs=2)
    for name in "abc":
        scheduler.add(make_request(name, range(4), 2))
    assert [c[0] for c in shape(runner.step()[0])] == ["a", "b"]
    assert [c[0] for c in shape(runner.step()[0])] == ["a", "b"]
    assert [c[0] for c in shape(runner.step()[0])] == ["c"]


def test_more_sequences_than_tokens_in_a_step() -> None:
    """max_num_seqs above the token budget: as many run as a step can decode, and all end."""
    scheduler, runner = make(budget=3, seqs=100)
    requests = [make_request(str(i), range(5), 4) for i in range(10)]
    for request in requests:
        scheduler.add(request)
    runner.finish(limit=200)
    assert scheduler.max_num_seqs == 3
    assert [r.tokens for r in requests] == [alone(range(5), 4)] * 10


def test_the_youngest_is_preempted_first_and_comes_back_first() -> None:
    scheduler, runner = make(blocks=6, block_size=4)
    requests = {name: make_request(name, range(7), 17) for name in "abc"}
    for request in requests.values():
        scheduler.add(request)
    order = []
    while scheduler.has_work:
        plan, finished = runner.step()
        scheduler.check()
        order += [("preempted", r.request_id) for r in plan.preempted] + [("finished", r.request_id) for r in finished]
        if plan.preempted:
            assert not {c.request for c in plan.chunks} & set(plan.preempted)
            assert all(r.computed == 0 and not r.blocks for r in plan.preempted)
    assert order[:2] == [("preempted", "c"), ("preempted", "b")]
    assert [name for what, name in order if what == "finished"] == ["a", "b", "c"]
    assert requests["a"].preemptions == 0 and requests["b"].preemptions >= 1
    assert scheduler.num_preemptions == sum(r.preemptions for r in requests.values())
    assert all(r.tokens == alone(range(7), 17) for r in requests.values())


def test_nothing_is_admitted_in_a_step_that_preempts() -> None:
    scheduler, runner = make(blocks=4, block_size=4)
    scheduler.add(make_request("a", range(8), 8))
    scheduler.add(make_request("b", range(7), 8))
    scheduler.add(make_request("tiny", range(1), 1))
    runner.step()
    scheduler.abort("tiny")
    scheduler.add(make_request("late", range(1), 1))
    plan = runner.step()[0]  # a needs its third block, b holds the last one
    assert [r.request_id for r in plan.preempted] == ["b"]
    assert [c[0] for c in shape(plan)] == ["a"], "b's blocks are free now, yet b and late must wait for the next step"


def test_the_head_of_the_queue_is_not_overtaken() -> None:
    """First come first served: a small request waits behind a large one that does not fit yet."""
    scheduler, runner = make(blocks=4, block_size=4)
    scheduler.add(make_request("a", range(8), 4))
    scheduler.add(make_request("large", range(12), 4))
    scheduler.add(make_request("small", range(1), 1))
    started: dict[str, int] = {}
    for step in range(100):
        started |= {c.request.request_id: step for c in runner.step()[0].chunks if c.start == 0}
    assert started["a"] < started["large"] <= started["small"]


def test_admission_needs_room_for_all_known_tokens_and_the_next() -> None:
    for prompt_len, admitted in ((7, True), (8, False)):  # 3 blocks of 4 are in use, 2 are free
        scheduler, runner = make(blocks=5, block_size=4)
        scheduler.add(make_request("a", range(10), 8))
        runner.step()
        scheduler.add(make_request("b", range(prompt_len), 8))
        assert (len(runner.step()[0].chunks) == 2) is admitted


@pytest.mark.parametrize("block_size", [1, 8, 16])
@pytest.mark.parametrize("off", [-1, 0, 1])
def test_block_boundaries(block_size: int, off: int) -> None:
    prompt_len = max(1, 2 * block_size + off)
    scheduler, runner = make(block_size=block_size, budget=200)
    request = make_request("a", range(prompt_len), block_size + 2)
    scheduler.add(request)
    while scheduler.has_work:
        known = len(request.tokens)
        plan = scheduler.schedule()
        scheduler.check()
        assert len(request.blocks) == -(-known // block_size)
        scheduler.commit(plan, runner.run(plan))
        scheduler.check()
    assert request.tokens == alone(range(prompt_len), block_size + 2)


def test_a_pool_of_one_block() -> None:
    """The last token is sampled, never stored: 16 slots serve 17 tokens."""
    scheduler, runner = make(blocks=1, block_size=16)
    requests = [make_request(str(i), range(n), 17 - n) for i, n in enumerate((1, 15, 16, 8))]
    for request in requests:
        scheduler.add(request)
    runner.finish(limit=100)
    assert [r.tokens for r in requests] == [alone(range(n), 17 - n) for n in (1, 15, 16, 8)]
    numbers = r"may reach 18 tokens \(2 KV blocks of 16\).*holds 16 \(1 blocks\).*at most 17 tokens"
    with pytest.raises(RequestError, match=numbers):
        scheduler.add(make_request("big", range(16), 2))
    assert not scheduler.has_work


def test_an_id_in_use_is_refused() -> None:
    scheduler, runner = make()
    scheduler.add(make_request("a", range(4), 1))
    scheduler.add(make_request("a", range(4), 1, index=1))
    with pytest.raises(RequestError, match="'a' is in use"):
        scheduler.add(make_request("a", range(4), 1))
    runner.finish(limit=10)
    scheduler.add(make_request("a", range(4), 1))


def test_abort_in_every_state() -> None:
    scheduler, runner = make(budget=8, seqs=2)
    for name in ("decoding", "half", "waiting"):
        scheduler.add(make_request(name, range(7), 9))
    runner.step()
    assert [r.request_id for r in scheduler.running] == ["decoding", "half"]
    for name in ("waiting", "half", "decoding"):
        assert [(r.request_id, r.finish_reason, len(r.blocks)) for r in scheduler.abort(name)] == [(name, "abort", 0)]
        scheduler.check()
    assert scheduler.abort("decoding") == [] and not scheduler.has_work and scheduler.pool.used == 0


def test_abort_of_one_completion_leaves_the_others() -> None:
    scheduler, runner = make()
    requests = [make_request("a", range(4), 3, index=i) for i in range(3)]
    for request in requests:
        scheduler.add(request)
    runner.step()
    assert scheduler.abort("a", 1) == [requests[1]]
    assert runner.finish(limit=10) == [requests[0], requests[2]]


def test_a_reused_id_is_not_taken_for_the_aborted_request() -> None:
    scheduler, runner = make()
    scheduler.add(make_request("a", range(4), 3))
    plan = scheduler.schedule()
    sampled = runner.run(plan)
    scheduler.abort("a")
    new = make_request("a", range(9), 3)
    scheduler.add(new)
    assert scheduler.commit(plan, sampled) == [] and new.computed == 0 and len(new.tokens) == 9


def test_steps_ahead_of_what_is_known() -> None:
    """A step goes on from a token that is being sampled; whoever's last one that is does not run again; an end is seen late."""
    scheduler, runner = make()
    stop = alone(range(5), 3)[-1]
    long, short, stopped = (
        make_request("l", range(4), 5),
        make_request("s", range(3), 1),
        make_request("e", range(5), 9, eos={stop}),
    )
    for request in (long, short, stopped):
        scheduler.add(request)
    plans = [scheduler.schedule()]
    results = [runner.run(plans[0])]
    ran = []
    while scheduler.has_work:
        plans.append(scheduler.schedule())
        results.append(runner.run(plans[-1]))
        ran.append([c.request.request_id for c in plans[-1].chunks])
        scheduler.check()
        scheduler.commit(plans.pop(0), results.pop(0))
        scheduler.check()
    assert ran == [["l", "e"], ["l", "e"], ["l", "e"], ["l"], []], "e's third token ended it when its fourth was under way"
    assert (
        long.tokens == alone(range(4), 5) and short.tokens == alone(range(3), 1) and stopped.tokens == alone(range(5), 9, {stop})
    )
    assert scheduler.commit(plans[0], results[0]) == [] and scheduler.pool.used == 0


def test_a_request_whose_end_was_set_elsewhere_never_runs() -> None:
    scheduler, runner = make()
    running, waiting = make_request("r", range(4), 3), make_request("w", range(4), 3)
    scheduler.add(running)
    runner.step()
    scheduler.add(waiting)
    running.finish_reason = waiting.finish_reason = "error"
    assert scheduler.schedule().chunks == ()
    assert not scheduler.has_work and scheduler.pool.used == 0


def test_commit_refuses_what_does_not_match_the_plan() -> None:
    scheduler, _ = make()
    scheduler.add(make_request("a", range(4), 3))
    plan = scheduler.schedule()
    with pytest.raises(ValueError, match="1 chunks, but 0 sampled"):
        scheduler.commit(plan, [])
    with pytest.raises(ValueError, match="nothing was sampled"):
        scheduler.commit(plan, [None])


def test_bad_limits_are_refused() -> None:
    for limits in ({"max_num_batched_tokens": 0, "max_num_seqs": 1}, {"max_num_batched_tokens": 1, "max_num_seqs": 0}):
        with pytest.raises(ValueError, match="must be >= 1"):
            Scheduler(BlockPool(1, 16), **limits)


@pytest.mark.realdata
@pytest.mark.parametrize("blocks", [40, 400])
def test_real_traffic_in_a_tight_and_in_a_wide_pool(shared_data: Path, blocks: int) -> None:
    """200 requests of a real service (lengths / 8), arriving while others run: all end right, the oldest never stalls."""
    with open(shared_data / "traces" / "AzureLLMInferenceTrace_conv.csv") as file:
        rows = [(int(r["ContextTokens"]), int(r["GeneratedTokens"])) for _, r in zip(range(200), csv.DictReader(file))]
    rng = random.Random(0)
    scheduler, runner = make(blocks=blocks, block_size=16, budget=128, seqs=64)
    queue = []
    for i, (context, generated) in enumerate(rows):
        prompt_len = min(max(1, context // 8), 500)
        queue.append(make_request(str(i), [rng.randrange(1000) for _ in range(prompt_len)], min(max(1, generated // 8), 100)))
    requests, expected = list(queue), [alone(r.tokens, r.max_total - r.prompt_len) for r in queue]
    while queue or scheduler.has_work:
        for _ in range(min(rng.randrange(3), len(queue))):
            scheduler.add(queue.pop(0))
        decodes = [r for r in scheduler.running if r.pending == 1]
        oldest = next(iter([*scheduler.running, *scheduler.waiting]), None)
        plan, _ = runner.step()
        scheduler.check()
        planned = {c.request for c in plan.chunks}
        assert oldest is None or oldest in planned
        assert all(r in planned or r in plan.preempted for r in decodes)
    assert [r.tokens for r in requests] == expected
    assert scheduler.pool.used == 0
    assert (scheduler.num_preemptions > 0) == (blocks == 40)
