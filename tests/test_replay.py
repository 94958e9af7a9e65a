"""The replay of traces: its readers, clock, cost model, rivals and measurements, against answers known by hand."""

from __future__ import annotations

import importlib
import json
import random
import re
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from appliance.core.blocks import BlockPool
from appliance.core.request import Request
from appliance.core.scheduler import Scheduler

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
trace, cost_module, rivals, sim, plots, script, predict = (
    importlib.import_module(name)
    for name in ("replay_trace", "replay_cost", "replay_rivals", "replay_sim", "replay_plots", "replay", "gpu_predict")
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
    """A millisecond a token that is computed, and a second one that crosses the bus."""

    def step(self, rows: int, sampled: int, cached: int, pairs: int, context: int) -> float:
        return rows / 1e3

    def cross(self, tokens: int) -> float:
        return tokens


def paged(blocks: int, size: int, *, budget: int = 64, seqs: int = 8, host: int = 0, caching: bool = False) -> Scheduler:
    second = BlockPool(host, size) if host else None
    return Scheduler(BlockPool(blocks, size), max_num_batched_tokens=budget, max_num_seqs=seqs, host=second, caching=caching)


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
    assert trace.ideal_hits(jobs[:2], capacity=1024) == 1024, "the tail leaves before the head"


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


def test_hits_through_the_real_scheduler_by_hand() -> None:
    """Whole blocks of 16: 1088 of the second's 1100 tokens, 1024 of the third's; nothing behind another begin."""
    jobs = [
        Job(0, 0.0, 1100, 2, (1, 2, 3)),
        Job(1, 1e4, 1100, 2, (1, 2, 3)),
        Job(2, 2e4, 1500, 2, (1, 2, 4)),
        Job(3, 3e4, 1024, 2, (5, 2)),
    ]
    warm = Replay(jobs, paged(1000, 16, caching=True), Rows()).run()
    assert warm.hit_tokens == 1088 + 1024 and warm.computed_tokens == sum(j.total - 1 for j in jobs) - warm.hit_tokens
    assert warm.hit_rate == pytest.approx(2112 / 4724)
    assert Replay(jobs, paged(1000, 16), Rows()).run().hit_tokens == 0


def test_a_shared_block_is_full_and_counted_once() -> None:
    """Two that run together on one block of 512: the second holds its own 2 blocks of 16 beside it."""
    scheduler = paged(100, 16, budget=2048, caching=True)
    replay = Replay([Job(0, 0.0, 512, 9, (1,)), Job(1, 1.5, 530, 9, (1, 2))], scheduler, Seconds())
    for _ in range(3):
        replay._arrive()
        replay.step()
    assert replay.result.hit_tokens == 512 and len(scheduler.running) == 2
    assert sim.room(scheduler) == ((32 - 18) + (16 - 2), (33 + 2) * 16)


def test_swapping_computes_nothing_again_and_takes_its_time_on_the_bus() -> None:
    jobs = trace.at_once(random_jobs(random.Random(8), 100, 40))
    once = sum(j.total - 1 for j in jobs)
    swapped = Replay(jobs, paged(12, 4, host=100), Rows()).run()
    assert swapped.preemptions > 0 and swapped.computed_tokens == once
    assert swapped.crossed_tokens > 0 and swapped.span == pytest.approx(once / 1e3 + swapped.crossed_tokens)


def test_the_most_load_is_found() -> None:
    known = {share: 4 * share for share in script.LOADS}
    assert 0 <= 0.75 - script.most_load(known, lambda share: 4 * share, 3.0) <= 0.2 / 2**script.HALVINGS
    assert script.most_load({0.2: 9.0}, lambda share: 9.0, 3.0) == 0.0
    assert 1.9 < script.most_load({1.0: 1.0}, lambda share: 1.0, 3.0) < 2.0, "beyond what was tried"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small traces in the real ones' formats."""
    folder, rng = tmp_path_factory.mktemp("data") / "traces", random.Random(9)
    folder.mkdir()
    for name in ("conv", "code"):
        rows = [f"2023-11-16 18:17:{i:02}.0000000,{rng.randint(50, 900)},{rng.randint(1, 40)}" for i in range(40)]
        text = "\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *rows])
        (folder / f"AzureLLMInferenceTrace_{name}.csv").write_text(text)
    lines = [
        {"timestamp": 3000 * i, "input_length": 1500, "output_length": 5, "hash_ids": [i % 4, 10 + i % 8, 100 + i]}
        for i in range(24)
    ]
    (folder / "mooncake_conversation.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (folder / "sharegpt_sample.json").write_text(json.dumps([{"prompt_tokens": 40, "response_tokens": 9}] * 2))
    return folder.parent


def test_the_whole_script(data: Path, tmp_path: Path) -> None:
    """Every part on small traces: hits as computed from the ids by hand, pictures that parse, one part renewed by itself."""
    parts = [name for name in script.PARTS if name != "host"]
    words = ["--data", str(data), "--out", str(tmp_path)]
    assert script.main([*words, "--only", *parts]) == 0
    report = json.loads((tmp_path / "replay.json").read_text())
    found = report["parts"]["hits"]["found"]
    ideal = (20 * 512 + 16 * 512) / (24 * 1500)  # all but the first of each id; the second ids hang on the first
    assert found["ideal"] == pytest.approx(ideal) and found["rows"][0]["hit_rate"] == pytest.approx(ideal, abs=0.02)
    for trace_name, systems in report["parts"]["throughput"]["found"].items():
        counts = {(one["jobs"], one["answer_tokens"], one["refused"]) for one in systems.values()}
        assert len(counts) == 1, f"{trace_name}: every system does the same work"
    text = (tmp_path / "replay.md").read_text()
    named = set(re.findall(r"\((replay-[^)]+\.svg)\)", text))
    assert named == {path.name for path in tmp_path.glob("*.svg")} and len(named) == 3 + 2 * 4
    for path in tmp_path.glob("*.svg"):
        assert ElementTree.parse(path).getroot().tag.endswith("svg")
    assert not re.search(r"[{}]", text)
    (tmp_path / "replay.md").unlink()
    assert script.main([*words, "--only"]) == 0 and (tmp_path / "replay.md").read_text() == text, "written again from the figures"
    before = dict(report["parts"])
    assert script.main([*words, "--only", "preemption", "--requests", "9"]) == 0
    after = json.loads((tmp_path / "replay.json").read_text())["parts"]
    assert after["preemption"]["found"]["requests"] == 4 and all(after[name] == before[name] for name in parts[:-1])


def test_the_scheduler_is_timed_at_the_asked_number_of_sequences(data: Path) -> None:
    setup = script.setups(data, None)[0]
    for busy in (False, True):
        times = script.host_us(setup, 64, 16, busy, steps=60)
        assert 0 < times["p50"] <= times["p99"] <= times["most"]


def test_without_traces_it_says_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert script.main(["--data", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"{tmp_path / 'traces'} is absent; --data names the folder that holds traces/\n"


def test_axes() -> None:
    even, log = plots.Scale(0, 12, 100, 700), plots.Scale(0.1, 1000, 100, 500, log=True)
    assert even(3) == 250 and even(99) == 700 and even.ticks() == [0, 5, 10]
    assert log(10) == 300 and log(0.1) == 100 and {0.1, 1, 1000} <= {round(tick, 6) for tick in log.ticks()}
    assert len(set(plots.colour_of(plots.KNOWN).values())) == len(plots.KNOWN)
    assert [plots.label(v) for v in (0.2, 5, 1500, 20000, 12e6)] == ["0.2", "5", "1.5k", "20k", "12M"]
