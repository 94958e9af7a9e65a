"""Plans of models whose layers keep a state of each sequence: the published 27B worked out by hand, and refusals by name."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from appliance.config import EngineConfig
from appliance.core.messages import plan_bytes
from appliance.core.step import Return
from appliance.memory.devices import MIB, DeviceInfo
from appliance.memory.fit import fit
from appliance.memory.giving_way import CPU_BANDWIDTH, GivingWay
from appliance.memory.inputs import input_bytes
from appliance.memory.modules import Machinery
from appliance.memory.picture import memory_map
from appliance.memory.plan import PlanError
from appliance.memory.planner import make_plan
from appliance.memory.roofline import Limits, Work
from appliance.memory.study import Study
from appliance.quantize.job import check_kind
from appliance.runtime.caches import allocate_states
from models.spec import ModelSpec
from quant.errors import CheckpointError, InputError
from quant.headers import read_header
from quant.scheme import QuantScheme
from tests.memory.published import fill, write_headers
from tests.memory.qwen3_5 import SMALL, write_qwen3_5
from tests.memory.test_plan import DEFAULTS, LLAMA_8B, cpu
from tests.memory.test_planner import compare, kind  # noqa: F401

GIB = 1 << 30
MACHINE = DeviceInfo("cpu", "machine", 64 * GIB, 60 * GIB)
SEQUENCE = 48 * 4 * (48 * 128 * 128 + 3 * (2 * 16 * 128 + 48 * 128))


@pytest.mark.parametrize(
    ("variant", "dtype", "choice"),
    [("none", "auto", "auto"), ("none", "float32", "int8"), ("awq", "auto", "model"), ("ct-w8a8", "float32", "auto")],
)
def test_what_is_planned_is_what_the_loader_holds(tmp_path: Path, variant: str, dtype: str, choice: str, kind: str) -> None:  # noqa: F811
    plan = compare(fill(write_qwen3_5(tmp_path, SMALL, variant), variant), kind, dtype=dtype, lm_head_dtype=choice)
    assert plan.weights["delta"] > plan.weights["attention"] > 0


@pytest.mark.parametrize("left_alone", [("z", "b", "a"), ("qkv", "z", "b")], ids="-".join)
def test_parts_that_are_stored_differently_are_planned_one_by_one(tmp_path: Path, left_alone: tuple[str, ...], kind: str) -> None:  # noqa: F811
    config = {**SMALL, "linear_num_value_heads": 8, "linear_value_head_dim": 32}
    compare(fill(write_qwen3_5(tmp_path, config, "awq", left_alone), "awq"), kind)


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_layers_that_are_rounded_while_they_are_loaded(tmp_path: Path, quantization: str, kind: str) -> None:  # noqa: F811
    compare(fill(write_qwen3_5(tmp_path, SMALL, "none"), "none"), kind, quantization=quantization)


@pytest.fixture(scope="module")
def published(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = json.loads((shared_data / "configs" / "Qwen--Qwen3.5-27B_config.json").read_text())
    return write_qwen3_5(tmp_path_factory.mktemp("27b"), config, "awq")


@pytest.fixture
def native(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans for native kernels, on any machine."""
    monkeypatch.setattr("kernels.layout.ops_name", lambda device, reference=False: "triton" if device == "cuda" else "cpu-native")


@pytest.mark.realdata
@pytest.mark.usefixtures("native")
def test_27b_worked_out_by_hand(published: Path) -> None:
    """48 layers with a state, 16 of attention. 4 bits: N * K / 2 bytes of a weight [N, K], and 3 * N for each 128 inputs."""

    def four_bits(N: int, K: int) -> int:
        return N * K // 2 + 3 * N * (K // 128)

    config = EngineConfig(max_model_len=8192, max_num_seqs=4, enable_prefix_caching=False)
    plan = make_plan(published, config, MACHINE)
    delta = four_bits(16384, 5120) + four_bits(5120, 6144) + 2 * 128 * 5120
    assert delta == 61_685_760, "queries, keys, values and z; the output; and b and a in 16 bits, in whole panels of 64 outputs"
    attention = four_bits(2 * 6144 + 2 * 1024, 5120) + four_bits(5120, 6144)
    mlp = four_bits(2 * 17408, 5120) + four_bits(5120, 17408)
    norms = 2 * ((2 * 64 + 1) * 5120 + 16 * 2 * 256) + 4 * 48 * (4 * 10240 + 48 + 48 + 128)
    assert plan.weights == {
        "embedding": 2 * 248320 * 5120, "delta": 48 * delta, "attention": 16 * attention, "mlp": 64 * mlp,
        "head": 248320 * 5120 + 4 * 248320, "norms": norms,
    }  # fmt: skip
    assert plan.weight_bytes == 16_620_992_512
    assert plan.sequence_bytes == SEQUENCE == 156_893_184 and plan.state_bytes == 4 * SEQUENCE
    assert plan.kv.layers == 16 and plan.kv.token_bytes == 2 * 16 * 4 * 256 * 2 == 65_536
    assert plan.num_blocks == 4 * 512, "of what ends nothing is kept"
    others = plan.workspace + plan.runtime + plan.grammar_bytes
    assert plan.total == plan.weight_bytes + 4 * SEQUENCE + 4 * 8192 * 65_536 + others
    told = plan.to_dict()
    assert told["states"] == {"sequence_bytes": SEQUENCE, "places": 4, "kept": 0, "bytes": 4 * SEQUENCE}
    assert plan_bytes(told)["states"] == 4 * SEQUENCE
    assert re.search(r"\n  states, of 4 that run +598.50 MiB", plan.table())
    assert "\nStates: 149.62 MiB of each sequence that runs, whatever its length; none are kept" in plan.table()
    assert plan.sequences(512) == 4, "the cache holds more, but there are as many places"
    assert 'class="part"' not in memory_map(plan) and "states" in memory_map(plan)
    kept = make_plan(published, replace(config, enable_prefix_caching=True), MACHINE)
    assert kept.kept_states == 5 and kept.state_bytes == 9 * SEQUENCE and kept.fixed == plan.fixed + 5 * SEQUENCE
    assert kept.num_blocks == (kept.budget - kept.fixed) // kept.kv.block_bytes > plan.num_blocks, (
        "blocks of earlier prompts, too"
    )
    assert re.search(r"\n  states, of 4 that run, 5 kept +1\.32 GiB", kept.table())
    assert "whatever its length; those of 5 prompts are kept for others that go on there\n" in kept.table()
    least = replace(config, max_num_seqs=1, gpu_memory_utilization=(plan.total - 2 * SEQUENCE - 3 * 512 * 16 * 65_536) / 60 / GIB)
    assert make_plan(published, least, MACHINE).state_bytes == SEQUENCE
    with pytest.raises(PlanError, match=r"states 448\.88 MiB \(of 1 that run, 2 kept\)") as error:
        make_plan(published, replace(least, enable_prefix_caching=True), MACHINE)
    assert any(one.flags == "--no-enable-prefix-caching" for one in error.value.remedies)


@pytest.mark.realdata
@pytest.mark.usefixtures("native")
def test_each_sequence_that_runs_is_paid_for(published: Path) -> None:
    """Of 26 GiB 15.5 are for weights: as many sequences run as there is room for, with three times as much for tokens of each."""
    tight = EngineConfig(gpu_memory_utilization=26 / 60)
    plan = make_plan(published, tight, MACHINE)
    fair = -(-(3 * SEQUENCE // 65_536) // 16)
    assert fair == 449
    assert 1 < plan.max_num_seqs < 256 and plan.num_blocks >= plan.max_num_seqs * fair
    assert plan.budget - plan.total < SEQUENCE + 2 * fair * plan.kv.block_bytes, "one more has no room"
    study = Study.read(published, EngineConfig(gpu_memory_utilization=26 / 60, max_model_len=8192), MACHINE)
    asked = study.asking(64, 2048)
    assert not asked.enough()
    [more] = asked.remedies()
    share = 16_900 * MIB + 64 * (SEQUENCE + 128 * 16 * 65_536) + 8 * SEQUENCE
    assert more.options["gpu_memory_utilization"] == pytest.approx(share / 60 / GIB, abs=0.01), (
        "less would do for the cache alone"
    )
    many = EngineConfig(gpu_memory_utilization=26 / 60, max_model_len=8192, max_num_seqs=100)
    with pytest.raises(PlanError, match=r"states 15\.78 GiB \(of 100 that run, 8 kept\), grammars") as error:
        make_plan(published, many, MACHINE)
    [fewer] = [one for one in error.value.remedies if "max_num_seqs" in one.options]
    good = make_plan(published, replace(many, max_num_seqs=fewer.options["max_num_seqs"]), MACHINE)  # type: ignore[arg-type]
    with pytest.raises(PlanError):
        make_plan(published, replace(many, max_num_seqs=good.max_num_seqs + 1), MACHINE)


@pytest.mark.parametrize("prefixes", [False, True])
def test_more_memory_never_gives_less(prefixes: bool) -> None:
    """Neither cache nor sequences, where each of these costs much by itself."""
    demand, auto = replace(LLAMA_8B, sequence_bytes=150 << 20), replace(DEFAULTS, max_seqs=None, max_len=8192, prefixes=prefixes)
    plans = [fit(demand, auto, cpu(gib / 4)) for gib in range(68, 160)]
    for before, after in pairwise(plans):
        assert after.num_blocks >= before.num_blocks and after.max_num_seqs >= before.max_num_seqs
    assert len({plan.max_num_seqs for plan in plans}) > 10
    for plan in plans:
        places = plan.max_num_seqs + (min(8, plan.max_num_seqs + 1) if prefixes else 0)
        assert plan.state_bytes == places * 150 << 20 and plan.total <= plan.budget


def test_what_is_allocated_is_what_is_planned() -> None:
    spec, plan = ModelSpec.from_config(SMALL), fit(replace(LLAMA_8B, sequence_bytes=9), replace(DEFAULTS, max_seqs=3), cpu(24))
    states = allocate_states(spec, plan.state_places, device=torch.device("cpu"))
    assert len(states) == 3 and {len(tensor) for one in states for tensor in one} == {3 + 4}
    assert {tensor.dtype for one in states for tensor in one} == {torch.float32}
    assert spec.delta is not None
    assert sum(tensor.nbytes for one in states for tensor in one) == 3 * (3 + 4) * spec.delta.state_bytes


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"swap_space": 1}, r"--swap-space is 1, but nothing of Qwen3_5ForCausalLM, .* is moved to host memory .*: leave it out"),
        ({"swap_space": 1, "preemption_mode": "swap"}, r"--swap-space is 1, but nothing of Qwen3_5ForCausalLM"),
        (
            {"speculative_config": '{"method": "ngram"}'},
            r"--speculative-config does not work with Qwen3_5ForCausalLM, .*: a wrong guess could not be taken back",
        ),
    ],
)
def test_options_that_states_rule_out_are_refused_by_name(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    directory = write_qwen3_5(tmp_path, SMALL, "none")
    with pytest.raises(InputError, match=words):
        make_plan(directory, EngineConfig(**options), MACHINE)
    with pytest.raises(InputError, match=words):
        Study.read(directory, EngineConfig(**options), MACHINE)


def test_a_model_with_attention_alone_has_no_states(tmp_path: Path) -> None:
    config = {**SMALL, "layer_types": ["full_attention"] * 4}
    plan = make_plan(write_qwen3_5(tmp_path, config, "none"), EngineConfig(swap_space=0.01), MACHINE)
    assert plan.sequence_bytes == plan.state_bytes == 0 and plan.kv.layers == 4 and plan.swap_blocks
    assert "tates" not in plan.table()


def test_a_card_has_a_place_for_what_fills_up_recorded_steps(tmp_path: Path) -> None:
    """And sends the seats with the other inputs. Several cards do not share such a model."""
    card, folder = DeviceInfo("cuda", "card", 80 * GIB, 80 * GIB, 90), write_qwen3_5(tmp_path, SMALL, "awq")
    for eager in (False, True):
        plan = make_plan(folder, EngineConfig(max_model_len=256, max_num_seqs=3, enforce_eager=eager), card)
        assert plan.graphs.get("spare_states", 0) == (0 if eager else plan.sequence_bytes) and plan.state_bytes > 0
        assert plan.scratch["inputs"] == input_bytes(plan.max_num_batched_tokens, 3, plan.kv.blocks(256), states=True)
    with pytest.raises(
        InputError, match="whose layers keep a state of each sequence, is not divided among cards: plan it for one"
    ):
        Study.read(folder, EngineConfig(model="m"), card, ranks=2)


def test_a_decode_step_reads_and_writes_states() -> None:
    """Beside weights and caches, at a card's bandwidth: of 27 B on a card of 1 TB/s 0.3 ms a sequence."""
    spec, limits = ModelSpec.from_config(SMALL), Limits(1e12, 1e15, 1e15)
    work = Work.of(spec, QuantScheme("none"), Machinery(ops="triton", dtype="bfloat16", head_bits=None))
    one, two = (work.decode_s(limits, sequences, 64, 0, None) for sequences in (1, 2))
    assert work.state_bytes == 3 * (4 * (3 * (2 * 2 * 32 + 4 * 64) + 4 * 32 * 64))
    assert two - one == pytest.approx(2 * work.state_bytes / 1e12)


def test_quantizing_is_refused() -> None:
    with pytest.raises(
        InputError, match="m is a Qwen3_5ForCausalLM: its layers of the gated delta rule are served and not quantized"
    ):
        check_kind(Path("m"), ModelSpec.from_config(SMALL))


@pytest.mark.parametrize("name", ["conv1d.weight", "A_log"])
def test_headers_of_something_else(tmp_path: Path, name: str) -> None:
    write_qwen3_5(tmp_path, SMALL, "none")
    tensors = {name: (info.dtype, info.shape) for name, info in read_header(tmp_path / "model.safetensors").items()}
    whole = f"model.layers.2.linear_attn.{name}"
    write_headers(tmp_path, tensors | {whole: ("BF16", (384, 4))}, SMALL)
    expected = r"\[384, 1, 4\]" if name == "conv1d.weight" else r"\[4\]"
    with pytest.raises(CheckpointError, match=rf"{whole}: found BF16\[384, 4\], expected {expected}"):
        make_plan(tmp_path, EngineConfig(), MACHINE)
    write_headers(tmp_path, {key: value for key, value in tensors.items() if key != whole}, SMALL)
    with pytest.raises(CheckpointError, match=rf"{whole}: the tensor is missing from .*, expected {expected}"):
        make_plan(tmp_path, EngineConfig(), MACHINE)


def test_a_return_is_made_up_for_beside_the_states_of_all_that_run() -> None:
    spec = ModelSpec.from_config(SMALL)
    assert spec.delta is not None
    cost = GivingWay.of(spec, MACHINE, block_bytes=4096, weight_bytes=1 << 20)
    assert cost.pair_s == pytest.approx(4 * 4 * 64 / 0.3e12), "one layer of attention, of 4 heads"
    assert cost.state_s == pytest.approx(2 * 3 * spec.delta.state_bytes / CPU_BANDWIDTH)
    alone, plain = Return(0, 100_000, 0, 1, 0), replace(cost, state_s=0.0)
    assert cost.turn(alone) < plain.turn(alone)
