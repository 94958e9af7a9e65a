"""Questions as people ask them, of real models on real cards: what is answered holds when it is done, and nothing contradicts."""

from __future__ import annotations

import contextlib
import io
import json
import random
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from appliance.config import EngineConfig
from appliance.memory.cards import CARDS
from appliance.plan_command import Asked, plan_of
from tests.memory.published import VARIANTS, write_published
from tests.memory.test_published import DENSE, config_of

OPTIONS: dict[str, tuple[Any, ...]] = {
    "kv_cache_dtype": ("fp8", "int8", "int4"),
    "max_num_seqs": (1, 4, 64, 300),
    "max_model_len": (512, 2048, 8192, 32768),
    "max_num_batched_tokens": (256, 8192),
    "gpu_memory_utilization": (0.3, 0.7, 1.0),
    "swap_space": (0.5, 4.0),
    "gpu_memory_reserve": ("1G",),
    "cpu_offload_gb": (1.0, 4.0),
    "enforce_eager": (True,),
}


def told(directory: Path, options: dict[str, Any], asked: Asked) -> dict[str, Any]:
    """What ``appliance plan --json`` says."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
        code = plan_of(directory, EngineConfig(model=str(directory), **options), asked)
    found: dict[str, Any] = json.loads(out.getvalue())
    assert found["fits"] == (code == 0)
    return found


def question(draw: random.Random) -> tuple[dict[str, Any], Asked]:
    """Options and what is asked, on a card or a machine."""
    options = {name: draw.choice(values) for name, values in OPTIONS.items() if draw.random() < 0.2}
    context, sequences = draw.choice((None, "256", "2000", "32000")), draw.choice((None, 1, 4, 16, 64, 500))
    if draw.random() < 0.3:
        options = {name: value for name, value in options.items() if name != "cpu_offload_gb"}
        memory = f"{draw.choice((4, 8, 16, 32, 64, 128))}GiB"
        return {**options, "device": "cpu"}, Asked(json=True, memory=memory, sequences=sequences, context=context)
    return options, Asked(json=True, gpu=(draw.choice(CARDS).name,), sequences=sequences, context=context)


@pytest.fixture(scope="module")
def models(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("models")
    return cache(lambda model, variant: write_published(folder / f"{model}-{variant}", config_of(shared_data, model), variant))


@pytest.mark.realdata
@pytest.mark.parametrize("seed", range(12))
def test_what_is_answered_holds_when_it_is_done(models: Any, seed: int) -> None:
    draw = random.Random(seed)
    directory = models(draw.choice(DENSE), draw.choice([*VARIANTS]))
    options, asked = question(draw)
    found = told(directory, options, asked)
    beside = dict(options)  # what is said to have been tried with remedies
    if asked.sequences or asked.context:
        beside["max_num_seqs"] = max(asked.sequences or 1, options.get("max_num_seqs", 1))
    if asked.context:
        beside["max_model_len"] = max(int(asked.context), options.get("max_model_len", 0))
    if not found["fits"] and "Nothing makes" not in found.get("error", ""):
        for one in found["remedies"]:
            if not one["instead"]:
                assert told(directory, {**beside, **one["options"]}, asked)["fits"], one["flags"]
        for card in found["cards_that_fit"][:1]:
            assert told(directory, beside, replace(asked, gpu=(card,), memory=None))["fits"], card
    if not found["fits"]:
        return
    if asked.sequences:
        length = found["asked"]["longest_context"]
        assert length >= int(asked.context or 2)
        again = told(directory, {**beside, "max_model_len": length}, replace(asked, context=None))
        assert again["asked"]["longest_context"] >= length
        assert told(directory, options, replace(asked, sequences=max(1, asked.sequences // 2)))["fits"]
    if asked.context:
        assert told(directory, options, replace(asked, context=str(int(asked.context) // 2)))["fits"]
    if asked.memory:
        more = told(directory, options, replace(asked, memory=f"{2 * int(asked.memory[:-3])}GiB"))
        for name in ("max_model_len", "max_num_seqs"):
            assert more[name] >= found[name]
        assert more["kv_cache"]["num_blocks"] >= found["kv_cache"]["num_blocks"]
        for name, value in found["asked"].items():
            assert more["asked"][name] >= value
