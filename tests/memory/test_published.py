"""Plans of real models in every format, from headers alone, against the arithmetic of these formats written out by hand."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from appliance.config import EngineConfig
from appliance.memory.demand import Demand
from appliance.memory.devices import DeviceInfo
from appliance.memory.modules import Loaded, Machinery, layer_weights, parents, published_weights
from appliance.memory.planner import make_plan
from models.spec import ModelSpec
from quant.headers import CheckpointIndex, read_json
from quant.scheme import read_scheme
from tests.memory.published import VARIANTS, linears, write_headers, write_published
from tests.memory.test_mixture import SMALL as MIXTURE

GIB = 1 << 30
CARD = DeviceInfo("cuda", "a card with 192 GiB", 192 * GIB, 190 * GIB, capability=89)
SMALL = DeviceInfo("cuda", "NVIDIA GeForce RTX 4090", 24564 << 20, 24100 << 20, capability=89)
DENSE = (
    "meta-llama--Meta-Llama-3.1-8B", "meta-llama--Meta-Llama-3.1-70B", "Qwen--Qwen3-0.6B", "Qwen--Qwen3-1.7B", "Qwen--Qwen3-8B",
    "Qwen--Qwen3-32B", "Qwen--Qwen3-32B-FP8",
)  # fmt: skip
PUBLISHED = {  # bytes of one linear in the files
    "none": lambda N, K: 2 * N * K,
    "awq": lambda N, K: N * K // 2 + K // 128 * (N // 2) + 2 * (K // 128) * N,
    "gptq": lambda N, K: N * K // 2 + K // 128 * (N // 2) + 2 * (K // 128) * N + 4 * K,
    "gptq-act-order": lambda N, K: N * K // 2 + K // 32 * (N // 2) + 2 * (K // 32) * N + 4 * K,
    "ct-w4a16": lambda N, K: N * K // 2 + 2 * (K // 128) * N + 16,
    "ct-w8a8": lambda N, K: N * K + 2 * N,
    "ct-fp8": lambda N, K: N * K + 2 * N,
}
ON_CARD = {  # the same packed for Triton: a scale and an addend of 16 bits each; an FP8 scale in float32
    "none": lambda N, K: 2 * N * K,
    "awq": lambda N, K: N * K // 2 + 4 * (K // 128) * N,
    "gptq": lambda N, K: N * K // 2 + 4 * (K // 128) * N,
    "gptq-act-order": lambda N, K: N * K // 2 + 4 * (K // 32) * N,
    "ct-w4a16": lambda N, K: N * K // 2 + 4 * (K // 128) * N,
    "ct-w8a8": lambda N, K: N * K + 4 * N,
    "ct-fp8": lambda N, K: N * K + 4 * N,
}
ON_CPU = {  # and for the native kernels of a CPU: 16-bit scales, zero points of a byte where there are any; FP8 scales in float32
    "none": lambda N, K: 2 * N * K,
    "awq": lambda N, K: N * K // 2 + 3 * (K // 128) * N,
    "gptq": lambda N, K: N * K // 2 + 2 * (K // 128) * N,
    "gptq-act-order": lambda N, K: N * K // 2 + 2 * (K // 32) * N,
    "ct-w4a16": lambda N, K: N * K // 2 + 2 * (K // 128) * N,
    "ct-w8a8": lambda N, K: N * K + 2 * N,
    "ct-fp8": lambda N, K: N * K + 4 * N,
}


def config_of(shared_data: Path, model: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((shared_data / "configs" / f"{model}_config.json").read_text())
    return found


def norms(config: dict[str, Any]) -> int:
    """Values of all of them: two a layer and one at the end; with Qwen3 one for the queries and one for the keys of a layer."""
    hidden, layers = config["hidden_size"], config["num_hidden_layers"]
    heads = 2 * config["head_dim"] * layers if config["architectures"] == ["Qwen3ForCausalLM"] else 0
    return (2 * layers + 1) * hidden + heads


def by_part(config: dict[str, Any], variant: str, sizes: dict[str, Any], order: int) -> dict[str, int]:
    """Bytes of attention and MLP.

    order: bytes an input of the order that act-order needs, once for q, k and v, for o, and for gate and up; that of down is
    moved into gate and up.
    """
    layers, shapes = config["num_hidden_layers"], linears(config)
    sums = {"attention": 0, "mlp": 0}
    for name, (N, K) in shapes.items():
        sums["attention" if "attn" in name else "mlp"] += sizes[variant](N, K)
    if variant == "gptq-act-order":
        hidden, q = config["hidden_size"], shapes["self_attn.o_proj"][1]
        sums["attention"] += order * (hidden + q)
        sums["mlp"] += order * hidden
    return {part: layers * size for part, size in sums.items()}


@pytest.mark.realdata
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("model", DENSE)
def test_every_byte_of_real_models(shared_data: Path, tmp_path: Path, model: str, variant: str) -> None:
    config = config_of(shared_data, model)
    directory = write_published(tmp_path, config, variant)
    hidden, vocab, layers, tied = (config[k] for k in ("hidden_size", "vocab_size", "num_hidden_layers", "tie_word_embeddings"))
    table = vocab * hidden
    index = CheckpointIndex.open(directory)
    linear = sum(by_part(config, variant, PUBLISHED, 0).values())
    assert index.total_bytes == linear + 2 * table * (1 if tied else 2) + 2 * norms(config)

    plan = make_plan(directory, EngineConfig(max_model_len=4096), CARD)
    head = table + 8 * vocab  # int8, with a scale and an addend of 32 bits a row
    ends = {"embedding": head, "head": 0} if tied else {"embedding": 2 * table, "head": head}
    assert plan.weights == by_part(config, variant, ON_CARD, 8) | ends | {"norms": 2 * norms(config)}
    kv_heads, size = config["num_key_value_heads"], config.get("head_dim") or hidden // config["num_attention_heads"]
    assert plan.kv.token_bytes == 2 * layers * kv_heads * size * 2 and plan.kv.block_bytes == 64 * plan.kv.token_bytes
    assert plan.scratch["positions"] == 4096 * size * 4 and plan.scratch["logits"] == 64 * vocab * 6
    assert plan.total <= plan.budget == int(0.92 * 192 * GIB) and plan.max_num_seqs == 256
    assert plan.num_blocks == 256 * 64 or plan.budget - plan.total < plan.kv.block_bytes

    settings, scheme = read_scheme(index)
    native = Machinery(ops="cpu-native", dtype="bfloat16", head_bits=8)
    weights = Demand.of(ModelSpec.from_config(settings), scheme, native, model="m").weights
    head = table + 4 * vocab
    ends = {"embedding": head, "head": 0} if tied else {"embedding": 2 * table, "head": head}
    assert weights == by_part(config, variant, ON_CPU, 4) | ends | {"norms": 2 * norms(config)}


@pytest.mark.realdata
def test_totals_worked_out_by_hand(shared_data: Path, tmp_path: Path) -> None:
    """Llama 3.1 8B in AWQ: 32 layers of 41,943,040 weights in attention and 176,160,768 in the MLP, at 4 5/32 bits in the files.

    6,979,321,856 / 2 + their groups' zero points, a 256th, and scales, a 64th: 3,625,975,808; two tables of 1,050,673,152 bytes;
    65 norms of 8,192.
    """
    directory = write_published(tmp_path, config_of(shared_data, "meta-llama--Meta-Llama-3.1-8B"), "awq")
    assert CheckpointIndex.open(directory).total_bytes == 5_727_854_592
    plan = make_plan(directory, EngineConfig(max_model_len=8192), SMALL)
    assert plan.weights == {
        "embedding": 1_050_673_152, "attention": 713_031_680, "mlp": 2_994_733_056, "head": 526_362_624, "norms": 532_480,
    }  # fmt: skip
    assert plan.kv.token_bytes == 131_072 and plan.budget == int(0.92 * (24564 << 20))
    assert plan.sequences(8192) == plan.num_blocks / 128 and 15.5 < plan.sequences(8192) < 16


@pytest.mark.realdata
def test_weights_that_are_alike_are_counted(tmp_path: Path) -> None:
    """All of the files' weights, each once, where an expert of the second layer is not quantized, and two have larger scales."""
    folder = write_published(tmp_path, MIXTURE, "awq")
    tensors = {name: (info.dtype, info.shape) for name, info in CheckpointIndex.open(folder).tensors.items()}
    expert = "model.layers.1.mlp.experts.{}.{}_proj"
    for number, part in ((2, "gate"), (3, "up"), (3, "gate")):
        tensors[f"{expert.format(number, part)}.scales"] = ("F32", tensors[f"{expert.format(number, part)}.scales"][1])
    for suffix in ("qweight", "qzeros", "scales"):
        del tensors[f"{expert.format(5, 'down')}.{suffix}"]
    tensors[f"{expert.format(5, 'down')}.weight"] = ("BF16", (256, 128))
    config, scheme = read_scheme(CheckpointIndex.open(write_headers(folder, tensors, read_json(folder / "config.json"))))
    spec, machinery = ModelSpec.from_config(config), Machinery(ops="cpu-native", dtype="bfloat16", head_bits=8)

    def kinds(weights: Iterable[Loaded]) -> Counter[tuple[Any, ...]]:
        return Counter((one.slot, one.stored, one.scale_bytes, one.gated, one.nbytes(machinery)) for one in weights)

    found = parents(spec, scheme)
    joined: Counter[tuple[Any, ...]] = sum((kinds([*one.joined] * one.count) for one in found), Counter())
    published: Counter[tuple[Any, ...]] = sum((kinds([*one.published] * one.count) for one in found), Counter())
    assert joined == kinds(layer_weights(spec, scheme)) and published == kinds(published_weights(spec, scheme))
    assert [one.count for one in found] == [2, 2, 11, 1, 1, 1]  # attention, routers, experts
    assert published.total() == 2 * (4 + 1 + 3 * 7) and len(joined) == 9


def test_autoround_from_headers_alone(tmp_path: Path) -> None:
    """4 bits, but for what its config names: 8 in one group, zero points, and a projection left alone; and the head in 4."""
    hidden, vocab, group = 128, 320, 32
    model = {
        "architectures": ["LlamaForCausalLM"], "hidden_size": hidden, "intermediate_size": 256, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": vocab, "rms_norm_eps": 1e-5, "hidden_act": "silu",
        "max_position_embeddings": 256, "tie_word_embeddings": False,
    }  # fmt: skip
    extra = {
        "model.layers.0.mlp.down_proj": {"bits": 8, "group_size": -1}, r".*self_attn\.v_proj.*": {"bits": 16},
        r".*layers\.1\.self_attn\.o_proj.*": {"sym": False}, "lm_head": {"bits": 4, "group_size": group, "sym": True},
    }  # fmt: skip
    quantization = {"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq", "data_type": "int", "sym": True}
    quantization |= {"bits": 4, "group_size": group, "extra_config": extra}
    norms = ("norm", *(f"layers.{n}.{name}_layernorm" for n in (0, 1) for name in ("input", "post_attention")))
    tensors = {"model.embed_tokens.weight": ("BF16", (vocab, hidden))} | {f"model.{n}.weight": ("BF16", (hidden,)) for n in norms}
    named = {f"model.layers.{n}.{name}": shape for n in (0, 1) for name, shape in linears(model).items()}
    sums = {"attention": 0, "mlp": 0, "head": 0, "embedding": 2 * vocab * hidden, "norms": 2 * 5 * hidden}
    for name, (N, K) in (named | {"lm_head": (vocab, hidden)}).items():
        part = "attention" if "attn" in name else "mlp" if "mlp" in name else "head"
        if name.endswith("v_proj"):
            tensors |= {f"{name}.weight": ("BF16", (N, K))}
            sums[part] += 2 * N * K
            continue
        bits, groups = (8, 1) if "0.mlp.down" in name else (4, K // group)
        tensors[f"{name}.qweight"] = ("I32", (K * bits // 32, N))
        tensors[f"{name}.qzeros"] = ("I32", (groups, N * bits // 32))
        tensors[f"{name}.scales"] = ("F16", (groups, N))
        sums[part] += N * K * bits // 8 + groups * N * (3 if "1.self_attn.o" in name else 2)
    written = write_headers(tmp_path, tensors, {**model, "quantization_config": quantization})
    settings, scheme = read_scheme(CheckpointIndex.open(written), "auto-round")
    for dtype in ("bfloat16", "float32"):  # scales stay what they are
        spec = ModelSpec.from_config({**settings, "torch_dtype": dtype})
        demand = Demand.of(spec, scheme, Machinery(ops="cpu-native", dtype="bfloat16", head_bits=8), model="m")
        assert demand.quantization == "auto-round" and demand.weights == sums


def test_a_plan_takes_little_itself(shared_data: Path, tmp_path: Path) -> None:
    """32B in AWQ: the whole process that plans it stays below 200 MB (docs/benchmarks/plan-check.md has the seconds)."""
    directory = write_published(tmp_path, config_of(shared_data, "Qwen--Qwen3-32B"), "awq")
    program = (
        "import sys; from pathlib import Path; from appliance.config import EngineConfig; "
        "from appliance.memory.devices import DeviceInfo; from appliance.memory.planner import make_plan; "
        "card = DeviceInfo('cuda', 'NVIDIA GeForce RTX 4090', 24564 << 20, 24100 << 20, 89); "
        "make_plan(Path(sys.argv[1]), EngineConfig(), card).table(); "
        "print(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0])"  # KiB; ru_maxrss has its parent's too
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", program, str(directory)], cwd=root, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) * 1024 < 200e6
