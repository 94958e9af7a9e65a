"""Models with layers of the gated delta rule: what configs say, every format, what is left out, several sequences at once."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from inspect import getclosurevars
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from appliance.memory.activations import activation_bytes
from appliance.memory.modules import Machinery, layer_weights
from kernels.cpu import backend
from kernels.ops import KVCache, Ops, PagedBatch, get_ops
from models.decoder import Decoder
from models.loader import load_model
from models.order import apart
from models.spec import DeltaNet, ModelSpec
from quant.checkpoint import Checkpoint
from quant.errors import CheckpointError, InputError
from quant.headers import CheckpointIndex
from quant.scheme import read_scheme
from tests.kernels.native import instruction_sets
from tests.kernels.paged import make_step
from tests.memory.published import VARIANTS, Tensors, dense, fill, livelier, write_headers
from tests.models.test_against_transformers import feed, poisoned_states
from tests.models.test_bind import make_ops
from tests.models.test_mixture import written_dense

IDS = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9])
TEXT: dict[str, Any] = {
    "model_type": "qwen3_5_text", "hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 300, "max_position_embeddings": 128, "rms_norm_eps": 1e-6,
    "hidden_act": "silu", "dtype": "bfloat16", "attn_output_gate": True, "full_attention_interval": 3, "mlp_only_layers": [],
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 32, "linear_value_head_dim": 64,
    "linear_conv_kernel_dim": 4, "mamba_ssm_dtype": "float32", "mtp_num_hidden_layers": 1, "eos_token_id": 7,
    "rope_parameters": {
        "rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25, "mrope_interleaved": True,
        "mrope_section": [4, 2, 2],
    },
}  # fmt: skip
SMALL = {
    "architectures": ["Qwen3_5ForConditionalGeneration"], "model_type": "qwen3_5", "text_config": TEXT, "vision_config": {},
    "tie_word_embeddings": False,
}  # fmt: skip


MOE = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 256, "shared_expert_intermediate_size": 128}
FAMILIES = {
    "dense": SMALL,
    "moe": {**SMALL, "architectures": ["Qwen3_5MoeForConditionalGeneration"], "text_config": {**TEXT, **MOE}},
    "next": {**TEXT, **MOE, "architectures": ["Qwen3NextForCausalLM"], "model_type": "qwen3_next", "decoder_sparse_step": 1},
}


def blocks(name: str, N: int, K: int, group: int) -> Tensors:
    return {f"{name}.weight": ("F8_E4M3", (N, K)), f"{name}.weight_scale_inv": ("BF16", (-(-N // 128), -(-K // 128)))}


FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
ALL = {**VARIANTS, "fp8-blocks": (blocks, 0, {**FP8, "modules_to_not_convert": ["lm_head", "model.visual"]})}


def written(folder: Path, variant: str = "none", family: str = "dense") -> Path:
    """As published: under the names of a model that reads pictures, with layers beside that guess ahead.

    b, a and routers are exact; Qwen3.5's experts stand in one tensor where they are, too.
    """
    make, group, quantization = ALL[variant]
    hidden, text = TEXT["hidden_size"], "model" if family == "next" else "model.language_model"
    exact = {"in_proj_ba": 8} if family == "next" else {"in_proj_b": 4, "in_proj_a": 4}
    tensors: Tensors = {f"{text}.embed_tokens.weight": ("BF16", (300, hidden)), "lm_head.weight": ("BF16", (300, hidden))}
    norms = {f"{text}.norm": hidden}
    delta = {"in_proj_qkvz": (640, hidden)} if family == "next" else {"in_proj_qkv": (384, hidden), "in_proj_z": (256, hidden)}
    delta |= {"out_proj": (hidden, 256)}
    attention = {"q_proj": (512, hidden), "k_proj": (128, hidden), "v_proj": (128, hidden), "o_proj": (hidden, 256)}
    for layer in range(3):
        prefix = f"{text}.layers.{layer}"
        norms |= {f"{prefix}.{name}": hidden for name in ("input_layernorm", "post_attention_layernorm")}
        linears = mlp("mlp", TEXT["intermediate_size"])
        if family != "dense":
            stacked = family == "moe" and variant == "none"
            linears = mlp("mlp.shared_expert", 128)
            for number in range(0 if stacked else 6):
                linears |= mlp(f"mlp.experts.{number}", 256)
            if stacked:
                tensors[f"{prefix}.mlp.experts.gate_up_proj"] = "BF16", (6, 512, hidden)
                tensors[f"{prefix}.mlp.experts.down_proj"] = "BF16", (6, hidden, 256)
            tensors |= dense(f"{prefix}.mlp.gate", 6, hidden, 0) | dense(f"{prefix}.mlp.shared_expert_gate", 1, hidden, 0)
        if layer == 2:
            linears |= {f"self_attn.{name}": shape for name, shape in attention.items()}
            norms |= {f"{prefix}.self_attn.{name}": 64 for name in ("q_norm", "k_norm")}
        else:
            linears |= {f"linear_attn.{name}": shape for name, shape in delta.items()}
            norms |= {f"{prefix}.linear_attn.norm": 64}
            tensors |= {
                f"{prefix}.linear_attn.conv1d.weight": ("BF16", (384, 1, 4)),
                f"{prefix}.linear_attn.A_log": ("F32", (4,)),
                f"{prefix}.linear_attn.dt_bias": ("BF16", (4,)),
            }
            for name, outputs in exact.items():
                tensors |= dense(f"{prefix}.linear_attn.{name}", outputs, hidden, 0)
        for name, (N, K) in linears.items():
            tensors |= make(f"{prefix}.{name}", N, K, group)
    tensors |= {f"{name}.weight": ("BF16", (size,)) for name, size in norms.items()}
    tensors |= {"mtp.norm.weight": ("BF16", (hidden,)), "mtp.fc.weight": ("BF16", (hidden, 2 * hidden))}
    tensors |= {} if family == "next" else {"model.visual.pos_embed.weight": ("BF16", (16, 8))}
    config = FAMILIES[family] | ({} if quantization is None else {"quantization_config": quantization})
    return livelier(fill(write_headers(folder, tensors, config), variant if variant in VARIANTS else "none"))


def mlp(name: str, inner: int) -> dict[str, tuple[int, int]]:
    hidden = TEXT["hidden_size"]
    return {f"{name}.gate_proj": (inner, hidden), f"{name}.up_proj": (inner, hidden), f"{name}.down_proj": (hidden, inner)}


def load(folder: Path, ops: Ops, dtype: torch.dtype = torch.float32, **options: Any) -> Decoder:
    with Checkpoint.open(folder, options.pop("quantization", None)) as checkpoint:
        spec = ModelSpec.from_config(checkpoint.config)
        return load_model(checkpoint, spec, ops, dtype=dtype, max_len=64, lm_head_dtype="model", **options)


@pytest.fixture(params=["reference", "torch", "native"])
def ops(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Ops:
    if request.param == "native" and backend.native() is None:
        pytest.skip("the native extension is not built")
    monkeypatch.setenv("APPLIANCE_CPU_ISA", "auto" if request.param == "native" else "torch")
    return get_ops("cpu", reference=request.param == "reference")


KINDS = [("dense", variant) for variant in ALL] + [("moe", one) for one in ("none", "awq", "fp8-blocks")]
KINDS += [("next", one) for one in ("none", "gptq-act-order", "fp8-blocks")]


@pytest.fixture(scope="module", params=KINDS, ids="-".join)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    """A checkpoint, and its logits when the same weights are written dense; with rounded activations the reference's own."""
    family, variant = request.param
    folder = written(tmp_path_factory.mktemp("made"), variant, family)
    plain = folder if variant == "ct-w8a8" else written_dense(folder, tmp_path_factory.mktemp("dense") / "it")
    return folder, feed(load(plain, get_ops("cpu", reference=True)), IDS, [len(IDS)])


def test_every_format(made: tuple[Path, torch.Tensor], ops: Ops) -> None:
    """Whole and in chunks."""
    folder, expected = made
    decoder, rounded = load(folder, ops), "int-quantized" in (folder / "config.json").read_text()
    assert [layer.delta is not None for layer in decoder.layers] == [True, True, False] and expected.std() > 0.1
    chooses = decoder.spec.mixture is not None  # rounding may change a choice, and with it all that follows
    for chunks in ([15], [4, 10, 1]):
        off = (feed(decoder, IDS, chunks) - expected).abs() / expected.std()
        assert off.mean() < (0.1 if rounded else 0.02 if chooses else 0.01) and (rounded or chooses or off.max() < 0.05), chunks


def test_parts_that_allow_it_are_one_weight(tmp_path: Path) -> None:
    for variant, found in (("none", [2, 2, 1]), ("awq", [2, 2, 1]), ("fp8-blocks", [2, 2, 1])):
        decoder = load(written(tmp_path / variant, variant), get_ops("cpu", reference=True))
        assert [len(layer.qkv) for layer in decoder.layers] == found
        assert [layer.qkv[0].N for layer in decoder.layers] == [640, 640, 768]
        rule = decoder.layers[0].delta
        assert rule is not None and {t.dtype for t in (rule.conv, rule.rate, rule.dt_bias, rule.norm)} == {torch.float32}
        assert (rule.key_dim, rule.value_dim, rule.value_heads) == (32, 64, 4)


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_gates_stay_exact_where_weights_are_rounded(tmp_path: Path, quantization: str) -> None:
    folder = written(tmp_path)
    with Checkpoint.open(folder, quantization) as checkpoint:
        kept = [
            m.name
            for m in ModelSpec.from_config(checkpoint.config).modules()
            if not checkpoint.scheme.for_module(m.name).quantized
        ]
    ends = ["model.embed_tokens", "lm_head"]
    assert sorted(kept) == sorted([f"model.layers.{n}.linear_attn.in_proj_{one}" for n in (0, 1) for one in "ba"] + ends)
    exact = feed(load(folder, get_ops("cpu", reference=True)), IDS, [15])
    found = feed(load(folder, get_ops("cpu", reference=True), quantization=quantization), IDS, [9, 6])
    assert 1e-4 < ((found - exact).abs() / exact.std()).mean() < (0.08 if quantization == "int8" else 0.7)


def test_sequences_in_company(tmp_path: Path, ops: Ops) -> None:
    """Prompts, chunks and single tokens in one step give what each alone gives; a place is taken over with what lies in it."""
    decoder = load(written(tmp_path), ops)
    spec, rng = decoder.spec, torch.Generator().manual_seed(3)
    prompts = [torch.randint(0, 300, (length,), generator=rng) for length in (11, 1, 9, 14)]
    expected = [feed(decoder, ids, [len(ids)]) for ids in prompts]
    caches = [KVCache.zeros(8, 16, spec.kv_heads, spec.head_dim, dtype="float32", device=torch.device("cpu"))]
    states, forward = poisoned_states(spec, 3), None
    forward = decoder.bind(caches, states=states, max_tokens=32)
    # (sequence, first token, tokens, place): the last one comes when the first is done, to where that was
    plan = [
        [(0, 0, 6, 2), (1, 0, 1, 0)],
        [(2, 0, 7, 1), (0, 6, 1, 2)],
        [(0, 7, 4, 2)],
        [(3, 0, 13, 2), (2, 7, 2, 1)],
        [(3, 13, 1, 2)],
    ]
    found: list[list[torch.Tensor]] = [[] for _ in prompts]
    for step in plan:
        ids = torch.cat([prompts[s][start : start + count] for s, start, count, _ in step])
        positions = torch.cat([torch.arange(start, start + count) for _, start, count, _ in step])
        owners = torch.cat([torch.full((count,), s) for s, _, count, _ in step])
        batch = PagedBatch(
            positions=positions,
            slots=owners * 16 + positions,
            query_starts=torch.tensor([0, *(count for _, _, count, _ in step)]).cumsum(0).int(),
            seq_lens=torch.tensor([start + count for _, start, count, _ in step]).int(),
            block_tables=torch.tensor([[s] for s, _, _, _ in step]).int(),
            max_query=max(count for _, _, count, _ in step),
            max_seq=max(start + count for _, start, count, _ in step),
            states=torch.tensor([place for _, _, _, place in step]).int(),
        )
        hidden = forward(ids, batch)
        logits = decoder.logits(hidden, torch.empty(len(ids), spec.vocab))
        for (s, _, _, _), part in zip(step, logits.split([count for _, _, count, _ in step]), strict=True):
            found[s].append(part.clone())
    for parts, whole in zip(found, expected, strict=True):
        assert (torch.cat(parts) - whole).abs().max() < 1e-3 * whole.std()


@pytest.mark.skipif(backend.native() is None, reason="the native extension is not built")
@pytest.mark.parametrize("family", list(FAMILIES))
def test_one_call_is_the_operators_one_by_one(tmp_path: Path, family: str) -> None:
    """Gates of attention among them. Sequences with a past and without; states are the same, and memory is as planned."""
    folder = written(tmp_path, family=family)
    for number, isa in enumerate(instruction_sets()):
        dtype = (torch.bfloat16, torch.float32, torch.float16)[number % 3]
        quantization = "int4" if number % 2 else None
        decoder = load(folder, make_ops(isa), dtype, quantization=quantization)
        spec = decoder.spec
        one, other = poisoned_states(spec, 5), poisoned_states(spec, 5)
        for sequences in ([(0, 9), (0, 1), (0, 33)], [(33, 2), (1, 1), (0, 2), (9, 4)]):
            batch, cache = make_step(sequences, kv_heads=spec.kv_heads, head_dim=spec.head_dim, dtype=dtype)
            batch = replace(batch, states=torch.tensor([1, 3, 4] if len(sequences) == 3 else [4, 3, 0, 1]).int())
            ids = torch.randint(300, (len(batch.positions),))
            mine, theirs = (KVCache(cache.k.clone(), cache.v.clone()) for _ in range(2))
            bound = decoder.bind([mine], states=one, max_tokens=64)
            found = bound(ids, batch)
            assert (
                not isinstance(bound, partial)
                and torch.equal(found, decoder.forward(ids, batch, [theirs], other))
                and bool(found.isfinite().all())
            )
            for a, b in zip((mine.k, mine.v, *chain(*one)), (theirs.k, theirs.v, *chain(*other)), strict=True):
                assert torch.equal(a.nan_to_num(7), b.nan_to_num(7))
        scheme = read_scheme(CheckpointIndex.open(folder), quantization)[1]
        native = Machinery(ops="cpu-native", dtype=str(dtype).removeprefix("torch."), head_bits=None)
        planned, made = activation_bytes(spec, list(layer_weights(spec, scheme)), native) - 24, getclosurevars(bound).nonlocals
        assert made["hidden"].nbytes + made["workspace"].nbytes == 64 * planned
        with pytest.raises(ValueError, match="does not say where the states"):
            bound(ids, replace(batch, states=None))


def test_caches_and_states_are_counted(tmp_path: Path) -> None:
    decoder = load(written(tmp_path), get_ops("cpu", reference=True))
    batch = PagedBatch(*[torch.zeros(0, dtype=torch.int64)] * 5, 0, 0)
    with pytest.raises(ValueError, match="3 caches and 0 states, but there are layers for 1 and 2"):
        decoder.bind([KVCache(torch.empty(0), torch.empty(0))] * 3, max_tokens=4)(torch.zeros(0, dtype=torch.int64), batch)


def test_what_is_beside_the_text_is_left_out(tmp_path: Path) -> None:
    folder = written(tmp_path)
    index = CheckpointIndex.open(folder)
    assert index.beside_text == 1 and not any(name.startswith("model.visual") for name in index.tensors)
    assert ModelSpec.from_config(SMALL).ahead == ("mtp.",)  # found in the file, and left unread
    tensors = load_file(folder / "model.safetensors")
    extra = {"model.language_model.layers.0.linear_attn.in_proj_c.weight": torch.zeros(2)}
    save_file(tensors | extra, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"1 tensors have no place in a Qwen3_5ForConditionalGeneration: .*in_proj_c"):
        load(folder, get_ops("cpu", reference=True))


def test_experts_in_one_tensor_of_another_shape_are_named(tmp_path: Path) -> None:
    folder = written(tmp_path, family="moe")
    tensors, name = load_file(folder / "model.safetensors"), "model.language_model.layers.1.mlp.experts.gate_up_proj"
    for changed, message in (
        (tensors[name].transpose(1, 2).contiguous(), r"experts\.0\.gate_proj.*\[256, 256\]"),
        (tensors[name][:, 1:].contiguous(), r"experts\.0\.gate_proj.*missing"),
        (tensors[name][:5].contiguous(), r"experts\.5\.gate_proj.*missing"),
        (torch.cat([tensors[name]] * 2), r"12 tensors have no place in .*experts\.10\.gate_proj"),
    ):
        save_file(tensors | {name: changed}, folder / "model.safetensors")
        with pytest.raises(CheckpointError, match=message):
            load(folder, get_ops("cpu", reference=True))


@pytest.mark.parametrize(
    "name", ["in_proj_qkv.weight", "in_proj_a.weight", "out_proj.weight", "conv1d.weight", "A_log", "dt_bias", "norm.weight"]
)
def test_what_is_missing_or_of_another_shape_is_named(tmp_path: Path, name: str) -> None:
    folder = written(tmp_path)
    tensors, full = load_file(folder / "model.safetensors"), f"model.language_model.layers.1.linear_attn.{name}"
    for changed, message in ((None, "missing"), (torch.cat([tensors[full]] * 2).contiguous(), "found")):
        rest = {key: one for key, one in tensors.items() if key != full}
        save_file(rest if changed is None else rest | {full: changed}, folder / "model.safetensors")
        module = name.removesuffix(".weight").replace(".", r"\.")
        with pytest.raises(CheckpointError, match=rf"model\.layers\.1\.linear_attn\.{module}.*{message}"):
            load(folder, get_ops("cpu", reference=True))


def test_parts_of_each_key_head_are_put_apart() -> None:
    """By what transformers does with outputs, of numbered ones."""
    net = DeltaNet(key_heads=3, value_heads=6, key_dim=2, value_dim=5, kernel=4, fused=True)
    assert net.inputs == (("linear_attn.in_proj_qkvz", 72), ("linear_attn.in_proj_ba", 12))
    qkvz, ba = apart(net)
    parts = torch.arange(72).view(3, 24).split([2, 2, 10, 10], dim=1)
    assert torch.equal(qkvz, torch.cat([part.reshape(-1) for part in parts]))
    assert ba.tolist() == [0, 1, 4, 5, 8, 9, 2, 3, 6, 7, 10, 11]


def test_the_published_27b(shared_data: Path) -> None:
    spec = ModelSpec.from_config(json.loads((shared_data / "configs" / "Qwen--Qwen3.5-27B_config.json").read_text()))
    assert (spec.attention_layers, spec.layers, spec.head_dim, spec.rope.rotary_dim, spec.max_len) == (16, 64, 256, 64, 262144)
    assert [layer for layer in range(64) if not spec.is_linear(layer)] == list(range(3, 64, 4))
    net = spec.delta
    assert net is not None and net.state_bytes == 48 * 128 * 128 * 4 + 10240 * 3 * 4 and net.channels == 10240
    hidden, inner = 5120, 17408
    delta = hidden * (10240 + 6144 + 2 * 48) + 6144 * hidden + 4 * 10240 + 2 * 48 + 128
    attention = hidden * (2 * 24 + 2 * 4) * 256 + 24 * 256 * hidden + 2 * 256
    assert (
        spec.num_parameters == 48 * delta + 16 * attention + 64 * (3 * hidden * inner + 2 * hidden) + 2 * 248320 * hidden + hidden
    )
    assert {m.part for m in spec.layer_modules(0)} == {"delta", "mlp"} and {m.part for m in spec.layer_modules(3)} == {
        "attention",
        "mlp",
    }


@pytest.mark.parametrize(
    "architecture,billions", [("Qwen3_5ForCausalLM", 9), ("Qwen3_5MoeForCausalLM", 35), ("Qwen3NextForCausalLM", 80)]
)
def test_sizes_that_names_of_models_state(architecture: str, billions: int) -> None:
    """By the defaults of transformers, which are those of Qwen3.5-9B, Qwen3.5-35B-A3B and Qwen3-Next-80B-A3B."""
    assert round(ModelSpec.from_config({"architectures": [architecture]}).num_parameters / 1e9) == billions


@pytest.mark.parametrize(
    "change,message", [
        ({"attn_output_gate": False}, "attn_output_gate = False is not supported for Qwen3_5"),
        ({"layer_types": ["linear_attention", "mamba", "full_attention"]}, "layer_types must name linear_attention or "),
        ({"layer_types": ["full_attention"]}, "layer_types must name linear_attention or full_attention for each of 3 layers"),
        ({"layer_types": ["linear_attention"] * 3}, "none of 3 layers is one of full_attention"),
        ({"full_attention_interval": 4}, "none of 3 layers is one of full_attention"),
        ({"linear_num_value_heads": 3}, "linear_num_value_heads 3 is no multiple of linear_num_key_heads 2"),
        ({"linear_conv_kernel_dim": 1}, "linear_conv_kernel_dim is 1, expected an integer of at least 2"),
        ({"linear_key_head_dim": "32"}, "linear_key_head_dim is '32', expected an integer"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        ({"num_experts": 4}, "num_experts = 4 is not supported for Qwen3_5ForConditionalGeneration"),
    ],
)  # fmt: skip
def test_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as error:
        ModelSpec.from_config({**SMALL, "text_config": {**TEXT, **change}})
    assert message in str(error.value)


def test_layers_that_are_all_alike() -> None:
    spec = ModelSpec.from_config({**SMALL, "text_config": {**TEXT, "layer_types": ["full_attention"] * 3}})
    assert (spec.delta, spec.linear, spec.attention_layers, spec.output_gate) == (None, (), 3, True)
