"""What is planned for steps of the reference operators, against the tensors that they make."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from appliance.config import EngineConfig
from appliance.memory.devices import DeviceInfo
from appliance.memory.plan import MemoryPlan
from appliance.memory.planner import make_plan
from appliance.runtime import warmup
from appliance.runtime.startup import Timeline, Tools, load_decoder, make_runner
from tests.tiny_model import Shape, make_checkpoint

HEADS = 16
CPU, HERE = DeviceInfo("cpu", "some CPU", 24 << 30, 22 << 30), torch.device("cpu")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(
        tmp_path_factory.mktemp("reference"), shape=Shape(hidden=128, heads=HEADS, kv_heads=4), tokenizer=False
    )


def most(plan: MemoryPlan, config: EngineConfig, trial: warmup.Trial) -> int:
    """Bytes of all tensors that a step makes, at the moment when these are most."""
    decoder, _ = load_decoder(config, plan, HERE, Timeline(), None)
    runner, plan = make_runner(decoder, plan, config, Tools(), Timeline(), device=HERE, alone=False)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        warmup.run(runner, [trial], plan.max_model_len)
    events = [one for one in seen.profiler.kineto_results.events() if one.name() == "[memory]"]
    held = highest = 0
    for event in sorted(events, key=lambda one: one.start_ns()):
        held += event.nbytes()
        highest = max(highest, held)
    return highest


@pytest.mark.parametrize(("dtype", "tokens", "length"), [("float32", 200, 500), ("bfloat16", 200, 500), ("bfloat16", 256, 100)])
def test_scores_are_planned(model: Path, dtype: str, tokens: int, length: int) -> None:
    """A prompt's last tokens see all before them: scores of all heads, twice."""
    config = EngineConfig(
        model=str(model), reference_ops=True, dtype=dtype, max_model_len=length, max_num_batched_tokens=tokens, threads=1,
        kv_cache_memory_bytes=4 << 20, skip_tokenizer_init=True,
    )  # fmt: skip
    plan, own = make_plan(model, config, CPU), min(tokens, length)
    planned = plan.scratch["activations"] + plan.scratch["products"]
    trial = warmup.Trial(((length - own, own),) * (tokens // own))
    assert abs(most(plan, config, trial) - planned) < 0.05 * planned
    scores = 2 * 4 * HEADS * own * length
    assert scores < planned < 1.6 * scores + 0.5 * planned


def test_a_longer_context_or_step_takes_more(model: Path) -> None:
    def taken(tokens: int, length: int) -> int:
        given = {"reference_ops": True, "kv_cache_memory_bytes": 4 << 20, "max_num_seqs": 4}
        config = EngineConfig(max_num_batched_tokens=tokens, max_model_len=length, **given)  # type: ignore[arg-type]
        return make_plan(model, config, CPU).workspace

    sizes = [16, 40, 64, 200, 256, 500]
    for tokens in sizes:
        found = [taken(tokens, length) for length in sizes]
        assert found == sorted(found) and found[0] < found[-1]
    for length in sizes:
        found = [taken(tokens, length) for tokens in sizes]
        assert found == sorted(found) and found[0] < found[-1]
