"""What people ask of a plan: every answer is checked against a plan made with that answer, and against the one just beyond it."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from appliance.config import EngineConfig
from appliance.memory import planner
from appliance.memory.answers import Answers
from appliance.memory.cards import CARDS, find_card
from appliance.memory.devices import MIB, DeviceInfo
from appliance.memory.plan import MemoryPlan, PlanError
from appliance.memory.planner import make_plan
from appliance.memory.roofline import CAUTION, TARGETS, Limits
from appliance.memory.shard import EXCHANGE_BYTES
from appliance.memory.study import Study, smallest
from quant.errors import InputError
from tests.memory.test_planner import awq_checkpoint
from tests.memory.test_shard import LLAMA_8B

CARD = find_card("RTX 4090").device()
CPU = DeviceInfo("cpu", "some CPU", 64 << 30, 60 << 30)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return awq_checkpoint(tmp_path_factory.mktemp("llama"), LLAMA_8B)


def study(model: Path, device: DeviceInfo = CARD, ranks: int = 1, **options: Any) -> Study:
    return Study.read(model, EngineConfig(model=str(model), **options), device, ranks=ranks)


def engines(model: Path, device: DeviceInfo, **options: Any) -> MemoryPlan:
    """The engine's plan; but for the memory of this machine, which is not the card's host."""
    return replace(make_plan(model, EngineConfig(model=str(model), **options), device), host_budget=None)


@pytest.fixture(autouse=True)
def ample_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner, "this_device", lambda kind: DeviceInfo(kind, "host", 1 << 40, 1 << 40))


@pytest.mark.parametrize(
    "options", [{}, {"cpu_offload_gb": 1.0, "swap_space": 1.0}, {"kv_cache_dtype": "fp8", "max_num_seqs": 7}]
)
@pytest.mark.parametrize("device", [CARD, CPU], ids=["card", "cpu"])
def test_a_study_s_plan_is_the_engine_s(model: Path, device: DeviceInfo, options: dict[str, Any]) -> None:
    if device.kind == "cpu":
        options = {name: value for name, value in options.items() if name != "cpu_offload_gb"}
    found = study(model, device, **options)
    assert found.plan == found.other() == engines(model, device, **options)


@pytest.mark.parametrize("count", [1, 5, 16, 64, 500])
def test_the_longest_context_of_so_many_sequences(model: Path, count: int) -> None:
    found = study(model)
    longest = found.longest(count)
    assert longest is not None
    length = longest.max_model_len
    assert engines(model, CARD, max_num_seqs=count, max_model_len=length).sequences(length) >= count
    if length < 8192:
        longer = engines(model, CARD, max_num_seqs=count, max_model_len=length + 1)
        assert longer.sequences(length + 1) < count
    given = study(model, max_num_seqs=600).longest(count)
    assert given is not None and given.max_num_seqs == 600 and given.max_model_len <= length


def test_more_sequences_than_there_are_blocks(model: Path) -> None:
    found = study(model)
    assert found.longest(100_000) is None
    answers = Answers.of(found, [CARD], 100_000, None)
    assert not answers.fits and "100,000 sequences at once: they do not fit, however short" in answers.text()
    assert answers.to_dict()["asked"] == {"sequences": 100_000, "longest_context": 0}


def test_more_sequences_than_a_step_has_tokens(model: Path) -> None:
    """They do not run at once, whatever the cache holds; a larger step is what helps, and no smaller one is named."""
    few = study(model, max_num_batched_tokens=16)
    answers = Answers.of(few, [CARD], 24, 512)
    assert not answers.fits and few.plan.sequences(512) > 24 and few.plan.max_num_seqs == 16
    assert [one.flags for one in answers.remedies] == ["--max-num-batched-tokens 24"]
    assert "prompts are computed in larger pieces; " in answers.text()
    mended = Answers.of(study(model, max_num_batched_tokens=24), [CARD], 24, 512)
    assert mended.fits and mended.longest is not None and mended.longest.max_num_seqs >= 24
    crowded = Answers.of(study(model, max_num_batched_tokens=30), [CARD], 24, 8192)
    steps = [one.options.get("max_num_batched_tokens", 24) for one in crowded.remedies]
    assert not crowded.fits and all(24 <= int(str(size)) < 30 for size in steps)


def test_sequences_of_a_context(model: Path) -> None:
    found = study(model)
    answers = Answers.of(found, [CARD], None, 4096)
    assert answers.fits and answers.long == found.plan
    assert answers.to_dict()["asked"] == {"context": 4096, "sequences_of_context": found.plan.sequences(4096)}
    short = study(model, max_model_len=512)
    longer = Answers.of(short, [CARD], None, 4096)
    assert longer.long == engines(model, CARD, max_model_len=4096)
    with pytest.raises(InputError, match="--context is 8193, but the model was made for at most 8192 tokens"):
        Answers.of(found, [CARD], None, 8193)
    with pytest.raises(InputError, match="--sequences is 0: at least 1"):
        Answers.of(found, [CARD], 0, None)


def test_so_many_of_such_a_context(model: Path) -> None:
    found = study(model)
    length = next(n for n in range(8192, 0, -1) if found.plan.sequences(n) >= 24)
    assert Answers.of(found, [CARD], 24, length - 64).fits
    answers = Answers.of(found, [CARD], 24, 8192)
    assert not answers.fits and "24 sequences of 8,192 tokens do not fit at once" in answers.text()


def test_other_caches(model: Path) -> None:
    found = study(model)
    rows = {row.choice: row.plan for row in found.caches(8192)}
    assert list(rows) == ["auto", "fp8", "int8", "int4"] and rows["auto"] == found.plan
    for choice in ("fp8", "int8", "int4"):
        assert rows[choice] == engines(model, CARD, kv_cache_dtype=choice)
    small = study(model, replace(CARD, total=7200 * MIB, available=7000 * MIB), max_model_len=8192, max_num_seqs=4)
    fits = {row.choice: row.plan is not None for row in small.caches(8192)}
    assert fits["int4"] and not fits["auto"]
    with pytest.raises(PlanError):
        _ = small.plan


def test_other_caches_are_counted_for_the_context_that_is_asked_for(model: Path) -> None:
    """Where that is longer than --max-model-len, with a plan for it; the table and the JSON say the same."""
    two = {"max_num_seqs": 2, "enable_prefix_caching": False}
    short = Answers.of(study(model, max_model_len=512, **two), [CARD], None, 4096)
    rows = short.to_dict()["cache_dtypes"]
    assert isinstance(rows, list) and len(rows) == 4
    for row in rows:
        plan = engines(model, CARD, max_model_len=4096, kv_cache_dtype=row["kv_cache_dtype"], **two)
        assert row["sequences"] == plan.sequences(4096) == 2
    assert short.to_dict()["asked"] == {"context": 4096, "sequences_of_context": 2.0}
    assert len(re.findall(r"KiB +1,024 +512 +2\.0$", short.text(), re.M)) == 4
    tight = replace(CARD, total=7200 * MIB, available=7000 * MIB)
    rows = {row.choice: row for row in Answers.of(study(model, tight), [tight], None, 8192).caches}
    assert rows["auto"].long is None and rows["auto"].sequences == 0 and rows["int4"].sequences >= 1


def test_speeds_are_the_roofline_s_for_the_plan(model: Path) -> None:
    found, card = study(model), find_card("RTX 4090")
    speeds = found.decode_speeds(1000)
    most = min(found.plan.max_num_seqs, int(found.plan.sequences(1000)))
    assert [one.sequences for one in speeds] == sorted({1, 8, 32, most}) and {one.tokens for one in speeds} == {1000}
    limits, token = Limits.of(card, found.work), found.plan.kv.token_bytes
    for one in speeds:
        assert one.high == pytest.approx(one.sequences / found.work.decode_s(limits, one.sequences, 1000, token, TARGETS))
        assert one.low < CAUTION * one.high * 1.001 and one.high < one.roof
    prompt = found.prefill_speed(1000)
    assert prompt is not None and prompt.high == pytest.approx(1000 / found.work.prefill_s(limits, 1000, 1.0))
    fewer = study(model, max_num_seqs=5)
    assert [one.sequences for one in fewer.decode_speeds()] == [1, 5]


def test_weights_in_host_memory_are_as_fast_as_the_link(model: Path) -> None:
    found, card = study(model, cpu_offload_gb=3.0), find_card("RTX 4090")
    one = found.decode_speeds()[0]
    assert one.roof == pytest.approx(card.link / found.plan.offload.step_bytes)
    assert one.high == pytest.approx(0.8 * one.roof) and one.low == pytest.approx(0.64 * one.roof)
    prompt, without = found.prefill_speed(4096), study(model).prefill_speed(4096)
    assert prompt is not None and without is not None and prompt.high <= without.high
    assert prompt.high <= 2048 * 0.8 * card.link / found.plan.offload.step_bytes + 1e-6


def test_where_no_speed_is_predicted(model: Path) -> None:
    for found, why in (
        (study(model, CPU), "bandwidth is not known without measuring"),
        (study(model, CARD, ranks=2), "several cards"),
        (study(model, replace(CARD, name="a card with 24 GiB")), "not in the table of cards"),
        (study(model, replace(CARD, total=80 << 30, available=79 << 30), dtype="float32"), "no rates for float32"),
        (study(model, CARD, reference_ops=True, max_model_len=2048), "the reference operators"),
    ):
        assert why in found.unpredictable and found.decode_speeds() == [] and found.prefill_speed() is None
        assert f"No speed is predicted: {found.unpredictable}." in Answers.of(found, [found.device], None, None).text()


def test_several_cards(model: Path) -> None:
    """Weights of each are about half, the pool is as large as the smaller card's, and what cards exchange is counted."""
    one, small = study(model), replace(CARD, name="smaller", total=12 << 30, available=12 << 30)
    pair = [study(model, device, 2) for device in (CARD, small)]
    least = smallest(pair)
    assert least.device == small and least.plan.num_blocks == min(found.plan.num_blocks for found in pair)
    assert least.plan.scratch["exchange"] == EXCHANGE_BYTES and "exchange" not in one.plan.scratch
    assert least.plan.weight_bytes == pytest.approx(one.plan.weight_bytes / 2, rel=0.01)
    assert least.plan.kv.token_bytes * 2 == one.plan.kv.token_bytes
    answers = Answers.of(least, [CARD, small], None, None)
    assert answers.to_dict()["tensor_parallel"] == {"cards": [CARD.name, "smaller"], "planned_for": "one card", "served": False}
    assert "Planned only: this version serves on one card" in answers.text()
    with pytest.raises(InputError, match="tensor parallel over 3 cards: 32 attention heads are no multiple of 3"):
        study(model, CARD, 3)
    with pytest.raises(PlanError, match="does not fit"):
        _ = study(model, replace(CARD, total=3 << 30, available=3 << 30), 2).plan


def test_the_weakest_card_decides_the_type(tmp_path: Path) -> None:
    directory = awq_checkpoint(tmp_path, LLAMA_8B)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "torch_dtype": "bfloat16"}))
    turing, ampere = find_card("T4").device(), find_card("3090").device()
    both = [Study.read(directory, EngineConfig(), device, ranks=2, weakest=turing) for device in (turing, ampere)]
    assert {found.plan.dtype for found in both} == {"float16"}
    assert Study.read(directory, EngineConfig(), ampere, ranks=2, weakest=ampere).plan.dtype == "bfloat16"


def test_the_smallest_cards_that_would_do(model: Path) -> None:
    found = study(model, find_card("RTX 2060").device())
    with pytest.raises(PlanError):
        _ = found.plan
    first, *others = found.larger()
    assert engines(model, first.device()).num_blocks > 0 and len(others) == 2
    for card in CARDS:
        if card.memory < first.memory:
            with pytest.raises(PlanError):
                engines(model, card.device())
    assert study(model, replace(CPU, available=4 << 30)).larger() == []


def test_json_has_stable_keys(model: Path) -> None:
    found = study(model)
    answers = Answers.of(found, [CARD], 4, 1024).to_dict()
    json.dumps(answers)
    assert {**found.plan.to_dict(), **answers} == answers  # the plan's own keys are all there
    more = {"fits", "asked", "cache_dtypes", "predicted_speed", "tensor_parallel", "planned_only"}
    assert set(answers) - set(found.plan.to_dict()) == more and answers["planned_only"] is None
    assert answers["fits"] is True and answers["tensor_parallel"] is None
    rows = answers["cache_dtypes"]
    assert isinstance(rows, list)
    assert set(rows[0]) == {"kv_cache_dtype", "fits", "dtype", "token_bytes", "tokens", "max_model_len", "sequences"}
    speed = answers["predicted_speed"]
    assert isinstance(speed, dict) and speed["measured"] is False and speed["reason_for_none"] is None
    assert set(speed["decode"][0]) == {"sequences", "tokens", "tokens_per_second"}
    assert set(speed["prefill"]["tokens_per_second"]) == {"low", "high", "roof"}


def test_text_is_not_too_wide(model: Path) -> None:
    for device in (CARD, CPU):
        lines = Answers.of(study(model, device), [device], 4, 1024).text().splitlines()[1:]
        assert max(map(len, lines)) <= 100


def test_what_was_asked_for_and_does_not_fit_comes_with_what_would_make_it_fit(model: Path) -> None:
    """40 of 8192 tokens: 40 GiB of cache. Every remedy holds when it is planned with, and keeps both numbers."""
    found = Answers.of(study(model), [CARD], 40, 8192)
    assert not found.fits and found.remedies
    flags = [one.options for one in found.remedies]
    assert {"kv_cache_dtype": "int4"} in flags and not any({"max_num_seqs", "max_model_len"} & {*one} for one in flags)
    for one in found.remedies:
        plan = engines(model, CARD, max_num_seqs=40, max_model_len=8192, **one.options)
        assert plan.max_num_seqs == 40 and plan.sequences(8192) >= 40 and plan.tokens == one.tokens
    text = found.text()
    assert "What would make that fit (--max-num-seqs 40 --max-model-len 8192, and one of these)\n  " in text
    assert "  --kv-cache-dtype int4: keys and values in 4 bits; room for" in text
    assert found.to_dict()["remedies"] == [one.to_dict() for one in found.remedies]
    for card in found.larger:
        assert Answers.of(study(model, card.device()), [card.device()], 40, 8192).fits
    assert not Answers.of(study(model), [CARD], 2, 1024).to_dict().keys() & {"remedies", "cards_that_fit"}


def test_where_nothing_makes_it_fit_that_is_said(model: Path) -> None:
    found = Answers.of(study(model), [CARD], 10**6, 8192)
    assert not found.fits and not found.remedies and not found.larger
    assert "1,000,000 sequences of 8,192 tokens do not fit at once\nNo setting makes that fit\n" in found.text()
