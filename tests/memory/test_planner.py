"""Plans of checkpoints: byte totals against the files and against what the loader really holds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from appliance.config import EngineConfig
from appliance.memory.graphs import LAYER_BYTES
from appliance.memory.planner import DeviceInfo, MemoryPlan, PlanError, make_plan
from kernels.cpu import backend
from kernels.layout import paged_attention_nbytes
from models.spec import ModelSpec
from quant.errors import CheckpointError, InputError
from quant.headers import CheckpointIndex
from tests.models.test_loader import act_order_checkpoint, write_dense
from tests.tiny_model import make_checkpoint

GIB = 1 << 30
CPU = DeviceInfo("cpu", "some CPU", 24 * GIB, 22 * GIB)
QUANTIZED = (
    "awq-gemm-g128", "awq-gemm-g32", "ct-fp8-dynamic", "ct-w4a16-g128", "ct-w8a8-int8",
    "gptq-4bit-g32-act-order", "gptq-4bit-g32-sym", "gptq-4bit-g64-asym", "gptq-8bit-channel",
)  # fmt: skip


def write_headers(directory: Path, tensors: dict[str, tuple[str, tuple[int, ...]]], config: dict[str, Any]) -> Path:
    """A checkpoint of any size that takes no disk: a true header, and a hole where the data would be."""
    sizes = {"F16": 2, "BF16": 2, "F32": 4, "I32": 4}
    header, end = {}, 0
    for name, (dtype, shape) in tensors.items():
        begin, count = end, sizes[dtype]
        for n in shape:
            count *= n
        end += count
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with open(directory / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def awq_checkpoint(directory: Path, config: dict[str, Any], group: int = 128) -> Path:
    """The tensors that AutoAWQ writes for a model (gemm packing)."""
    quantization = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm"}
    config = {**config, "torch_dtype": "float16", "quantization_config": quantization}
    spec = ModelSpec.from_config(config)
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    for m in spec.modules():
        if m.part in ("embedding", "head"):
            tensors[f"{m.name}.weight"] = ("F16", (m.N, m.K))
        else:
            tensors[f"{m.name}.qweight"] = ("I32", (m.K, m.N // 8))
            tensors[f"{m.name}.qzeros"] = ("I32", (m.K // group, m.N // 8))
            tensors[f"{m.name}.scales"] = ("F16", (m.K // group, m.N))
    tensors |= {name: ("F16", (numel,)) for name, numel in spec.small_tensors()}
    return write_headers(directory, tensors, config)


BACKENDS = [pytest.param(name, id=name) for name in ("torch", "reference", "native")]


@pytest.fixture(params=BACKENDS)
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which operators a plan is for, and a loader will use."""
    if request.param == "native":
        if backend.native() is None:
            pytest.skip("the native extension is not built")
        monkeypatch.delenv("APPLIANCE_CPU_ISA", raising=False)
    else:
        monkeypatch.setenv("APPLIANCE_CPU_ISA", "torch")
    return request.param


@pytest.fixture
def torch_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("APPLIANCE_CPU_ISA", "torch")


def compare(directory: Path, kind: str, **options: Any) -> MemoryPlan:
    """Plan and load with the same options, and hold the bytes against each other."""
    import torch

    from kernels.ops import get_ops
    from models.loader import load_model
    from quant.checkpoint import Checkpoint

    config = EngineConfig(max_model_len=60, reference_ops=kind == "reference", **options)
    plan = make_plan(directory, config, CPU)
    with Checkpoint.open(directory, config.quantization) as checkpoint:
        spec, ops = ModelSpec.from_config(checkpoint.config), get_ops("cpu", reference=kind == "reference", threads=1)
        decoder = load_model(
            checkpoint,
            spec,
            ops,
            dtype=getattr(torch, plan.dtype),
            max_len=plan.max_model_len,
            lm_head_dtype=config.lm_head_dtype,
            embedding_dtype=config.embedding_dtype,
            activation=config.activation_dtype,
        )
    assert plan.weight_bytes + plan.scratch["positions"] == decoder.nbytes
    return plan


@pytest.mark.realdata
@pytest.mark.parametrize("dtype", ["auto", "float32"])
@pytest.mark.parametrize("name", QUANTIZED)
def test_what_is_planned_is_what_the_loader_holds(shared_data: Path, name: str, dtype: str, kind: str) -> None:
    compare(shared_data / "quantized" / name, kind, dtype=dtype)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("choice", ["auto", "int8", "int4", "model"])
def test_every_head_is_planned_as_it_is_loaded(tmp_path: Path, choice: str, tied: bool, kind: str) -> None:
    directory = write_dense(tmp_path, tie_word_embeddings=tied, vocab_size=70, torch_dtype="bfloat16")
    plan = compare(directory, kind, lm_head_dtype=choice)
    stored = {"auto": "int8" if kind == "native" else "bfloat16", "model": "bfloat16"}.get(choice, choice)
    shared = tied and (stored != "bfloat16" if kind == "native" else stored == "bfloat16")
    assert plan.head == stored + (", shared with the embedding" if shared else "")
    assert (plan.weights["head"] == 0) == shared
    assert f"head in {plan.head}" in plan.table() and plan.to_dict()["lm_head"] == plan.head


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("choice", ["int8", "int4", "model"])
def test_every_embedding_is_planned_as_it_is_loaded(tmp_path: Path, choice: str, tied: bool, kind: str) -> None:
    """One that is not one with the head: of a tied model where the head is in codes and its operators know no rows of these."""
    directory = write_dense(tmp_path, tie_word_embeddings=tied, vocab_size=70, torch_dtype="bfloat16")
    heads = ("model", "int8") if tied else ("auto",)
    for head in heads:
        plan = compare(directory, kind, lm_head_dtype=head, embedding_dtype=choice)
        apart = not tied or "shared" not in plan.head
        assert plan.embedding == ({"model": "bfloat16"}.get(choice, choice) if apart else plan.head.split(",")[0])
        assert (f", embedding in {choice}" in plan.table()) == (apart and choice != "model")
        assert plan.to_dict()["embedding"] == plan.embedding


def test_scales_are_counted_in_their_own_dtype(tmp_path: Path, kind: str) -> None:
    """Every scale of the file in float32: of AWQ they are kept so; of GPTQ they are cast to the model's dtype when read."""
    from safetensors.torch import load_file, save_file

    awq = make_checkpoint(tmp_path / "awq", tokenizer=False)
    for directory in (awq, act_order_checkpoint(tmp_path / "gptq", shared=True)):
        file = directory / "model.safetensors"
        tensors = {n: t for n, t in load_file(file).items() if not n.endswith(".g_idx")}  # every module its own order: none
        save_file({n: t.float() if n.endswith(".scales") else t for n, t in tensors.items()}, file)
        for published in ("float16", "float32"):
            settings = json.loads((directory / "config.json").read_text())
            settings["quantization_config"].pop("desc_act", None)
            (directory / "config.json").write_text(json.dumps({**settings, "torch_dtype": published}))
            compare(directory, kind, dtype="bfloat16", lm_head_dtype="model")


@pytest.mark.realdata
def test_a_tied_head_is_counted_once(shared_data: Path, torch_ops: None) -> None:
    plan = make_plan(shared_data / "models" / "TinyStories-656K", EngineConfig(), CPU)
    assert plan.weights["head"] == 0 and plan.weights["embedding"] == 2048 * 128 * 4  # published in float32


@pytest.mark.realdata
@pytest.mark.parametrize(
    ("config", "published_gib"),  # of the 4-bit AWQ versions on the hub, group 128
    [("meta-llama--Meta-Llama-3.1-8B_config.json", 5.34), ("meta-llama--Meta-Llama-3.1-70B_config.json", 37.0)],
)
def test_large_awq_models(shared_data: Path, tmp_path: Path, torch_ops: None, config: str, published_gib: float) -> None:
    directory = awq_checkpoint(tmp_path, json.loads((shared_data / "configs" / config).read_text()))
    published = CheckpointIndex.open(directory).total_bytes
    assert published / GIB == pytest.approx(published_gib, rel=0.01)
    machine = DeviceInfo("cpu", "big", 256 * GIB, 256 * GIB)
    plan = make_plan(directory, EngineConfig(max_model_len=8192), machine)
    assert plan.weight_bytes == pytest.approx(published, rel=0.03)
    assert plan.dtype == "bfloat16" and plan.kv.token_bytes == 2 * plan.kv.layers * 8 * 128 * 2
    assert plan.total <= plan.budget == 128 * GIB
    tight = DeviceInfo("cpu", "small", 8 * GIB, int(1.3 * published))
    with pytest.raises(PlanError, match=r"does not fit: .* What would fit: .*--gpu-memory-utilization 0\.[89]\d?\b"):
        make_plan(directory, EngineConfig(max_model_len=512, max_num_batched_tokens=256), tight)


def plan_of(directory: Path, **options: Any) -> MemoryPlan:
    return make_plan(directory, EngineConfig(**options), CPU)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A Llama with everything in 16 bits, 1024 tokens long."""
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": 256,
        "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 3,
        "vocab_size": 1000, "max_position_embeddings": 1024, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "tie_word_embeddings": False, "torch_dtype": "float16",
    }  # fmt: skip
    spec = ModelSpec.from_config(config)
    tensors = {f"{m.name}.weight": ("F16", (m.N, m.K)) for m in spec.modules()}
    tensors |= {name: ("F16", (numel,)) for name, numel in spec.small_tensors()}
    return write_headers(tmp_path, tensors, config)


def test_a_dense_model_takes_what_its_files_take(small: Path, torch_ops: None) -> None:
    plan = plan_of(small)
    assert plan.weight_bytes == CheckpointIndex.open(small).total_bytes
    assert plan.weights["mlp"] == 3 * 3 * 256 * 512 * 2 and plan.weights["norms"] == 7 * 256 * 2
    assert plan.max_model_len == 1024 and plan.num_blocks == 2 * 256 * 64  # as many contexts are kept as can run
    assert plan.scratch["products"] == paged_attention_nbytes(heads=4, kv_heads=2, head_dim=64, item_size=2, block_size=16)
    assert plan.quantization == "none"
    wide = plan_of(small, dtype="float")
    assert wide.weight_bytes == 2 * plan.weight_bytes and wide.kv.block_bytes == 2 * plan.kv.block_bytes


def test_the_plan_is_plain_data(small: Path) -> None:
    found = json.loads(json.dumps(plan_of(small, max_model_len="0.6k").to_dict()))
    assert found["max_model_len"] == 600 and found["kv_cache"]["block_size"] == 16
    assert (
        sum(found[f"{part}_bytes"]["total"] for part in ("weights", "workspace", "graphs"))
        + found["runtime_bytes"]
        + found["grammars_bytes"]["total"]
        + found["kv_cache"]["bytes"]
        == found["total_bytes"]
    )
    assert list(found["sequences"]) == ["512", "600"]
    assert found["max_concurrency"] == found["sequences"]["600"] == 512.0


def test_bad_input_is_named(small: Path) -> None:
    with pytest.raises(InputError, match="--max-model-len is 2048, but the model was made for at most 1024 tokens"):
        plan_of(small, max_model_len=2048)
    with pytest.raises(InputError, match="--block-size is 12"):
        plan_of(small, block_size=12)
    with pytest.raises(InputError, match="--activation-dtype is 'fp8': one of auto, int8, bf16 is needed"):
        plan_of(small, activation_dtype="fp8")
    with pytest.raises(InputError, match="--lm-head-dtype is '8': one of auto, int8, int4, model is needed"):
        plan_of(small, lm_head_dtype="8")
    with pytest.raises(InputError, match="'awq' was stated, but the checkpoint is 'none'"):
        plan_of(small, quantization="awq")
    with pytest.raises(InputError, match="--device 'tpu' is not known"):
        make_plan(small, EngineConfig(device="tpu"))
    with pytest.raises(CheckpointError, match="no such directory"):
        plan_of(small / "absent")
    with open(small / "model.safetensors", "r+b") as file:
        file.truncate(5000)
    with pytest.raises(CheckpointError, match="truncated"):
        plan_of(small)


def test_on_cards_recorded_steps_and_inputs_are_counted(small: Path) -> None:
    card = DeviceInfo("cuda", "some card", 8 * GIB, 8 * GIB, capability=89)
    recorded = make_plan(small, EngineConfig(), card)
    assert recorded.kv.block_size == 64 and recorded.graphs["spare_block"] == recorded.kv.block_bytes
    assert recorded.decode_sizes[-1] == 256 and recorded.graphs["steps"] == len(recorded.decode_sizes) * 3 * LAYER_BYTES
    assert recorded.graphs["results"] == sum(recorded.decode_sizes) * 256 * 2
    for options in ({"enforce_eager": True}, {"reference_ops": True}):
        launched = make_plan(small, EngineConfig(**options), card)
        assert launched.graphs == {} and launched.scratch["inputs"] > 0
    assert recorded.total <= recorded.budget
    assert plan_of(small).graphs == {} and plan_of(small).scratch["inputs"] == 0


def test_rounded_activations_are_counted_on_cards(small: Path, tmp_path: Path) -> None:
    """A byte for each of the widest input, 512, and eight for 128 of them."""
    config = json.loads((small / "config.json").read_text())
    (tmp_path / "awq").mkdir()
    card, checkpoint = DeviceInfo("cuda", "card", 8 * GIB, 8 * GIB, 89), awq_checkpoint(tmp_path / "awq", config)
    plain, rounded = (make_plan(checkpoint, EngineConfig(activation_dtype=kind), card) for kind in ("auto", "int8"))
    tokens = rounded.scratch["activations"] - plain.scratch["activations"]
    assert tokens > 0 and tokens % (512 + 8 * 4) == 0 and rounded.weight_bytes == plain.weight_bytes


def test_a_card_without_bfloat16_gets_float16(small: Path) -> None:
    settings = json.loads((small / "config.json").read_text())
    (small / "config.json").write_text(json.dumps({**settings, "torch_dtype": "bfloat16"}))
    for capability, dtype in ((75, "float16"), (80, "bfloat16"), (None, "bfloat16")):
        assert make_plan(small, EngineConfig(), DeviceInfo("cuda", "card", 8 * GIB, 8 * GIB, capability)).dtype == dtype


def test_this_machine_is_the_default(small: Path) -> None:
    plan = make_plan(small, EngineConfig(kv_cache_memory_bytes=1 << 20))
    assert plan.device.kind == "cpu" and plan.kv_bytes <= 1 << 20


def test_planning_needs_no_torch(small: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from appliance.config import EngineConfig; "
        "from appliance.memory.planner import make_plan; make_plan(Path(sys.argv[1]), EngineConfig()).table(); "
        "assert 'torch' not in sys.modules"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", program, str(small)], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
