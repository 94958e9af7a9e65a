"""What would fit: each remedy is planned again as the command line would have it, and the mildest of its kind is named."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from appliance.config import EngineConfig
from appliance.memory.advice import advise
from appliance.memory.cards import find_card
from appliance.memory.demand import Demand
from appliance.memory.devices import DeviceInfo
from appliance.memory.fit import fit
from appliance.memory.loading import Loading, Transient
from appliance.memory.options import QUARTER
from appliance.memory.plan import PlanError, Remedy
from appliance.memory.planner import command_line, make_plan
from appliance.memory.study import Study
from tests.memory.published import write_published
from tests.memory.test_plan import DEFAULTS, GIB, LLAMA_8B, cpu

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": 4096,
    "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8, "num_hidden_layers": 32,
    "vocab_size": 128256, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}  # fmt: skip


def card(gib: float) -> DeviceInfo:
    return DeviceInfo("cuda", "card", int(gib * GIB), int(gib * GIB) - (300 << 20), capability=89)


def refusal(directory: Path, config: EngineConfig, device: DeviceInfo) -> PlanError:
    with pytest.raises(PlanError) as error:
        make_plan(directory, config, device)
    for remedy in error.value.remedies:
        assert str(remedy) in str(error.value)
        if remedy.options:
            found = make_plan(directory, replace(config, **dict(remedy.options)), device)
            assert (found.tokens, found.max_model_len) == (remedy.tokens, remedy.max_model_len)
    return error.value


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_published(tmp_path_factory.mktemp("dense"), LLAMA, "none")


@pytest.fixture(scope="module")
def awq(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_published(tmp_path_factory.mktemp("awq"), LLAMA, "awq")


def flags(error: PlanError) -> list[str]:
    return [remedy.flags for remedy in error.remedies]


def test_a_model_larger_than_the_card(dense: Path) -> None:
    """8B in 16 bits on 12 GiB: layers are rounded or go to the host, or another checkpoint is taken, whose size is named."""
    error = refusal(dense, EngineConfig(max_model_len=4096), card(12))
    online, offload, small = error.remedies
    assert online.options == {"quantization": "int8"} and online.effect.startswith(
        "layers rounded while they are loaded, at some"
    )
    assert list(offload.options) == ["cpu_offload_gb"] and offload.effect.startswith("these weights come over the bus in every")
    fewer = replace(EngineConfig(max_model_len=4096), cpu_offload_gb=float(str(offload.options["cpu_offload_gb"])) - 0.5)
    with pytest.raises(PlanError):
        make_plan(dense, fewer, card(12))
    assert small.options == {} and small.instead == "another checkpoint: this model in 4 bits (AWQ, groups of 128)"
    assert small.effect.startswith("weights of 4.92 GiB, at some cost in quality; room for ")
    assert small.to_dict()["instead"] == str(small) and json.dumps(small.to_dict())


def test_rounding_only_as_much_as_it_must_be(dense: Path) -> None:
    """In 8 bits, in 4 where those are too many, and in 4 beside a head in 8 where that alone is not enough."""
    config = EngineConfig(max_model_len=4096, lm_head_dtype="model", kv_cache_dtype="fp8", gpu_memory_utilization=1.0)
    for gib, wanted in (
        (10, "--quantization int8"),
        (7, "--quantization int4"),
        (6.5, "--lm-head-dtype int8 --quantization int4"),
    ):
        assert flags(refusal(dense, config, machine(gib)))[0] == wanted


def test_no_smaller_version_is_named_where_it_is_one_already(awq: Path) -> None:
    error = refusal(awq, EngineConfig(max_model_len=4096), card(5.5))
    assert error.remedies and not any(remedy.instead for remedy in error.remedies)


def test_a_head_in_8_bits(awq: Path) -> None:
    """Between what the head takes in 16 and in 8 bits."""
    config = EngineConfig(max_model_len=2048, lm_head_dtype="model", max_num_batched_tokens=256, kv_cache_dtype="fp8")
    found = refusal(awq, config, card(6.9))
    assert "--lm-head-dtype int8" in flags(found)
    assert not any("--lm-head-dtype" in one for one in flags(refusal(awq, replace(config, lm_head_dtype="int8"), card(6.2))))


def test_an_embedding_in_8_bits(awq: Path) -> None:
    """The same of the embedding, where the head has 8 bits already; both together where one is not enough."""
    config = EngineConfig(max_model_len=2048, max_num_batched_tokens=256, kv_cache_dtype="fp8")
    assert "--embedding-dtype int8" in flags(refusal(awq, config, card(6.4)))
    both = flags(refusal(awq, replace(config, lm_head_dtype="model"), card(6.4)))
    assert "--lm-head-dtype int8 --embedding-dtype int8" in both
    assert not any("--embedding-dtype" in one for one in flags(refusal(awq, replace(config, embedding_dtype="int8"), card(5.6))))


def test_the_mildest_comes_first(awq: Path) -> None:
    found = refusal(awq, EngineConfig(max_model_len=65536, gpu_memory_utilization=0.8), card(16))
    names = [next(iter(remedy.options)) for remedy in found.remedies]
    assert names[:2] == ["gpu_memory_utilization", "kv_cache_dtype"] and names[-1] == "cpu_offload_gb"
    assert names.index("max_model_len") == len(names) - 2


def test_several_changes_where_no_single_one_helps(awq: Path) -> None:
    config = EngineConfig(max_model_len=131072, gpu_memory_utilization=0.5, max_num_batched_tokens=16384, enforce_eager=True)
    found = refusal(awq, config, card(11))
    assert len(found.remedies) == 1 and len(found.remedies[0].options) >= 2
    given = dict(found.remedies[0].options)
    for name in given:  # none of them can be left out
        rest = {key: value for key, value in given.items() if key != name}
        with pytest.raises(PlanError):
            make_plan(awq, replace(config, **rest), card(11))


def test_the_whole_command(dense: Path) -> None:
    config = EngineConfig(model="a model", max_model_len=4096, enforce_eager=True, enable_prefix_caching=False, swap_space=1.5)
    remedy = Remedy(options={"max_model_len": 2048, "cpu_offload_gb": 6.0}, effect="", tokens=1, max_model_len=1)
    line = command_line(config, remedy)
    assert shlex.split(line)[:3] == ["appliance", "serve", "a model"]
    assert line.endswith("--max-model-len 2048 --swap-space 1.5 --no-enable-prefix-caching --enforce-eager --cpu-offload-gb 6"), (
        line
    )
    assert command_line(EngineConfig(), command="plan") == "appliance plan"


LARGE = replace(LLAMA_8B, streamed=({"attention": GIB // 32, "mlp": GIB // 8, "padding": 0},) * 32, threads=4)


def test_swap_space_for_which_the_host_is_too_small() -> None:
    host = DeviceInfo("cpu", "host", 16 * GIB, 8 * GIB)
    chosen = replace(DEFAULTS, utilization=0.92, max_len=4096, swap_bytes=20 * GIB)
    with pytest.raises(PlanError, match="the host has") as error:
        fit(LARGE, chosen, card(24), host)
    found = advise(error.value, LARGE, chosen, card(24), host=host)
    assert [list(one.options) for one in found.remedies] == [["swap_space"]]
    size = float(str(found.remedies[0].options["swap_space"]))
    fit(LARGE, replace(chosen, swap_bytes=int(size * GIB)), card(24), host)
    with pytest.raises(PlanError):
        fit(LARGE, replace(chosen, swap_bytes=int(size * GIB) + QUARTER), card(24), host)


def test_streamed_weights_for_which_the_host_is_too_small() -> None:
    host = DeviceInfo("cpu", "host", 16 * GIB, 5 * GIB)
    chosen = replace(DEFAULTS, utilization=0.92, max_len=4096, offload_gb=4.5)
    with pytest.raises(PlanError, match="streamed weights 4") as error:
        fit(LARGE, chosen, card(24), host)
    found = advise(error.value, LARGE, chosen, card(24), host=host)
    assert [list(one.options) for one in found.remedies] == [["cpu_offload_gb"]]
    assert 0 <= float(str(found.remedies[0].options["cpu_offload_gb"])) < 4.5


def test_a_model_that_cannot_be_loaded_in_the_budget() -> None:
    """It would serve in 6.6 GiB, but a layer takes 3 more for a while."""
    large: Demand = replace(LLAMA_8B, loading=Loading(Transient(0, 0, 3 * GIB)))
    tight = replace(DEFAULTS, utilization=0.5, max_len=1000, kv_dtype="int8", runtime=300 << 20)
    with pytest.raises(PlanError, match=r"while weights are loaded one layer at a time, 9\.29 GiB") as error:
        fit(large, tight, cpu(16))
    found = advise(error.value, large, tight, cpu(16))
    assert flags(found) == ["--gpu-memory-utilization 0.59"]


def test_a_refusal_is_about_what_was_asked_for(dense: Path) -> None:
    """An 8B model in 16 bits on 12 GB: what makes it fit at all is not enough for four of 32000 tokens."""
    found = Study.read(dense, EngineConfig(model=str(dense)), find_card("RTX 3060 12GB").device())
    plain, asked = found.refusal(), found.asking(4, 32000).refusal()
    assert plain is not None and asked is not None and found.asking(1, 64).refusal() is not None
    assert any(one.tokens < 4 * 32000 for one in plain.remedies)
    assert asked.remedies and all(one.tokens >= 4 * 32000 and one.max_model_len == 32000 for one in asked.remedies)
    four_bits = asked.remedies[-1]
    assert four_bits.instead and four_bits.options == {"kv_cache_dtype": "int4"}
    assert str(four_bits) == f"{four_bits.instead} with --kv-cache-dtype int4"


SMALL: dict[str, object] = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 128}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {**LLAMA, **SMALL, "num_hidden_layers": 2, "vocab_size": 2048, "max_position_embeddings": 512, "head_dim": 16}
    return write_published(tmp_path_factory.mktemp("small"), sizes, "none")


def machine(gib: float) -> DeviceInfo:
    return DeviceInfo("cpu", "a machine", int(gib * GIB), int(gib * GIB))


def mildest(directory: Path, config: EngineConfig, device: DeviceInfo, name: str, step: int) -> int:
    """The value of the one remedy that changes just this, with which the model fits; with a step more it does not."""
    (found,) = (one for one in refusal(directory, config, device).remedies if list(one.options) == [name])
    value = int(str(found.options[name]))
    with pytest.raises(PlanError):
        make_plan(directory, replace(config, **{name: value + step}), device)
    return value


def test_fewer_sequences_on_a_cpu(small: Path) -> None:
    """Each has a place in a grammar set aside, and its mask."""
    config = EngineConfig(max_num_seqs=40_000, max_num_batched_tokens=40_000, gpu_memory_utilization=1.0)
    assert 1 < mildest(small, config, machine(3), "max_num_seqs", 1) < 40_000


def test_fewer_threads(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of native kernels, of which each has memory of its own."""
    monkeypatch.setattr("kernels.layout.ops_name", lambda kind, *, reference=False: "cpu-native")
    config = EngineConfig(threads=4000, gpu_memory_utilization=1.0)
    assert 1 < mildest(small, config, machine(0.6), "threads", 1) < 4000
    assert not any("threads" in one.options for one in refusal(small, replace(config, threads=1), machine(0.3)).remedies)


def test_a_reserve_gives_no_more_than_it_must(small: Path) -> None:
    config = EngineConfig(gpu_memory_reserve="7900M", max_num_batched_tokens=16, max_num_seqs=1, threads=1)
    assert 0 < mildest(small, config, machine(8), "gpu_memory_reserve", QUARTER) < 7900 << 20


def test_a_cache_that_is_too_small_for_the_context(small: Path) -> None:
    """A larger one, or a shorter context in that one; and not both at once, which would give no more."""
    block = make_plan(small, EngineConfig(threads=1), machine(8)).kv.block_bytes
    config = EngineConfig(kv_cache_memory_bytes=7 * block, max_model_len=300, threads=1, kv_cache_dtype="int4")
    block = make_plan(small, replace(config, max_model_len=16), machine(8)).kv.block_bytes
    found = refusal(small, replace(config, kv_cache_memory_bytes=7 * block), machine(8))
    assert flags(found) == [f"--kv-cache-memory-bytes {19 * block}", "--max-model-len 112"]
    nothing = refusal(small, replace(config, kv_cache_memory_bytes=1), machine(8))
    assert flags(nothing) == [f"--kv-cache-memory-bytes {19 * block}"]
    huge = refusal(small, replace(config, kv_cache_memory_bytes="100G"), machine(8))
    assert [list(one.options) for one in huge.remedies] == [["kv_cache_memory_bytes"]]
