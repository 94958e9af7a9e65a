"""Loading: tied tables under either name, joined projections, act-order without gathers, strictness, and the memory it takes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from kernels.cpu import backend
from kernels.ops import get_ops
from models.decoder import Decoder
from models.loader import load_model
from models.spec import ModelSpec
from quant.checkpoint import Checkpoint
from quant.errors import CheckpointError
from quant.rows import quantize_rows
from tests.models.test_against_transformers import feed
from tests.tiny_model import make_checkpoint

DENSE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 50, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
    "hidden_act": "silu", "torch_dtype": "float32",
}  # fmt: skip
IDS = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5])


def write_dense(folder: Path, tensors: dict[str, torch.Tensor] | None = None, **config: Any) -> Path:
    """A random dense checkpoint; ``tensors`` replaces what it holds."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = {**DENSE, **config}
    (folder / "config.json").write_text(json.dumps(settings))
    save_file(dense_tensors(settings) if tensors is None else tensors, folder / "model.safetensors")
    return folder


def dense_tensors(config: dict[str, Any]) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    spec = ModelSpec.from_config(config)
    tensors = {f"{m.name}.weight": 0.3 * torch.randn(m.N, m.K, generator=rng) for m in spec.modules()}
    tensors |= {f"{m.name}.bias": torch.randn(m.N, generator=rng) for m in spec.modules() if m.bias}
    return tensors | {name: 1 + 0.1 * torch.randn(size, generator=rng) for name, size in spec.small_tensors()}


def load(folder: Path, dtype: torch.dtype = torch.float32, *, reference: bool = False, **options: Any) -> Decoder:
    with Checkpoint.open(folder) as checkpoint:
        spec = ModelSpec.from_config(checkpoint.config)
        return load_model(checkpoint, spec, get_ops("cpu", reference=reference), dtype=dtype, max_len=64, **options)


def logits(decoder: Decoder) -> torch.Tensor:
    return feed(decoder, IDS, [len(IDS)])


@pytest.mark.parametrize("stored", ["model.embed_tokens.weight", "lm_head.weight", "both"])
def test_a_tied_table_is_found_under_either_name_and_kept_once(
    tmp_path: Path, stored: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("APPLIANCE_CPU_ISA", "torch")
    tensors = dense_tensors({**DENSE, "tie_word_embeddings": True})
    expected = logits(load(write_dense(tmp_path / "plain", tensors, tie_word_embeddings=True)))
    table = tensors.pop("model.embed_tokens.weight")
    names = ("model.embed_tokens.weight", "lm_head.weight") if stored == "both" else (stored,)
    decoder = load(write_dense(tmp_path / "other", tensors | {name: table.clone() for name in names}, tie_word_embeddings=True))
    assert torch.equal(logits(decoder), expected)
    assert decoder.tied and decoder.head.weight.data_ptr() == decoder.embedding.data_ptr()  # type: ignore[attr-defined]
    held = sum(t.numel() for t in tensors.values()) + table.numel() + decoder.cos_sin.numel()
    assert decoder.nbytes == 4 * held


def test_a_tied_model_with_two_different_tables_uses_both(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tensors = dense_tensors(DENSE)
    expected = logits(load(write_dense(tmp_path / "untied", tensors)))
    found = logits(load(write_dense(tmp_path / "tied", tensors, tie_word_embeddings=True)))
    assert torch.equal(found, expected)
    assert "they differ: using both" in caplog.text


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["reference", "torch", "native"])
def test_an_unquantized_head_is_quantized_when_asked(
    tmp_path: Path, tied: bool, bits: int, kind: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The logits are those of a head that was quantized before; native kernels look the embedding up in it too."""
    if kind == "native" and backend.native() is None:
        pytest.skip("the native extension is not built")
    monkeypatch.setenv("APPLIANCE_CPU_ISA", "auto" if kind == "native" else "torch")
    caplog.set_level("INFO")
    tensors = dense_tensors({**DENSE, "tie_word_embeddings": tied})
    table = tensors["model.embed_tokens.weight"]
    changed = quantize_rows(table if tied else tensors["lm_head.weight"], bits).dequantize()
    expected = {**tensors, "lm_head.weight": changed}
    if tied and kind == "native":
        expected["model.embed_tokens.weight"] = changed.clone()
    folder = write_dense(tmp_path / "dense", tensors, tie_word_embeddings=tied)
    decoder = load(folder, reference=kind == "reference", lm_head_dtype=f"int{bits}")
    found = logits(decoder)
    assert (found - logits(load(write_dense(tmp_path / "changed", expected), reference=True))).abs().max() < 1e-2
    assert (found - logits(load(folder, reference=True))).abs().max() > 1e-3
    shared = tied and kind == "native"
    assert decoder.tied == shared == (decoder.head is decoder.embedding) == (not isinstance(decoder.embedding, torch.Tensor))
    assert (f"the head is stored in int{bits}; the embedding it is tied to stays" in caplog.text) == (tied and not shared)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["reference", "torch", "native"])
def test_an_unquantized_embedding_is_quantized_when_asked(
    tmp_path: Path, tied: bool, bits: int, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits are those of an embedding that was quantized before; beside a head that it is not one with."""
    if kind == "native" and backend.native() is None:
        pytest.skip("the native extension is not built")
    monkeypatch.setenv("APPLIANCE_CPU_ISA", "auto" if kind == "native" else "torch")
    head = "model" if kind == "native" or not tied else "int8"
    tensors = dense_tensors({**DENSE, "tie_word_embeddings": tied})
    table = tensors["model.embed_tokens.weight"]
    changed = {**tensors, "model.embed_tokens.weight": quantize_rows(table, bits).dequantize()}
    if tied:
        changed["lm_head.weight"] = table.clone() if head == "model" else quantize_rows(table, 8).dequantize()
    folder = write_dense(tmp_path / "dense", tensors, tie_word_embeddings=tied)
    decoder = load(folder, reference=kind == "reference", lm_head_dtype=head, embedding_dtype=f"int{bits}")
    found = logits(decoder)
    assert not decoder.tied and not isinstance(decoder.embedding, torch.Tensor)
    assert (found - logits(load(write_dense(tmp_path / "changed", changed), reference=True))).abs().max() < 1e-2
    assert (found - logits(load(folder, reference=True))).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["reference", "torch", "native"])
def test_an_embedding_in_fp8_becomes_dense(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of FP8 are looked up by nobody here."""
    if kind == "native" and backend.native() is None:
        pytest.skip("the native extension is not built")
    monkeypatch.setenv("APPLIANCE_CPU_ISA", "auto" if kind == "native" else "torch")
    tensors = dense_tensors(DENSE)
    table = tensors.pop("model.embed_tokens.weight")
    codes, scale = (table * 100).to(torch.float8_e4m3fn), torch.full((50, 1), 0.01)
    stored = {"model.embed_tokens.weight": codes, "model.embed_tokens.weight_scale": scale}
    group = {"targets": ["Embedding"], "weights": {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}}
    config = {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {"group_0": group}}
    decoder = load(write_dense(tmp_path / "fp8", tensors | stored, quantization_config=config), reference=kind == "reference")
    assert isinstance(decoder.embedding, torch.Tensor)
    expected = write_dense(tmp_path / "dense", tensors | {"model.embed_tokens.weight": codes.float() * scale})
    assert torch.equal(logits(decoder), logits(load(expected, reference=kind == "reference")))


@pytest.mark.parametrize(
    "missing", ["lm_head.weight", "model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight", "model.norm.weight"]
)
def test_a_missing_tensor_is_named(tmp_path: Path, missing: str) -> None:
    tensors = dense_tensors(DENSE)
    del tensors[missing]
    with pytest.raises(CheckpointError, match=rf"{missing.removesuffix('.weight')}.*missing"):
        load(write_dense(tmp_path, tensors))


def test_leftover_tensors_are_named_and_counted(tmp_path: Path) -> None:
    extra = {f"model.layers.{i}.mlp.router.weight": torch.ones(2) for i in range(7)}
    with pytest.raises(
        CheckpointError, match=r"7 tensors have no place in a LlamaForCausalLM: model.layers.0.mlp.router.weight, .*\.\.\."
    ):
        load(write_dense(tmp_path, dense_tensors(DENSE) | extra))


def test_layers_beyond_the_config_are_left_over(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"9 tensors have no place .* model\.layers\.1\."):
        load(write_dense(tmp_path, dense_tensors(DENSE), num_hidden_layers=1))


def test_a_wrong_shape_is_named_with_both_shapes(tmp_path: Path) -> None:
    tensors = dense_tensors(DENSE)
    tensors["model.layers.0.self_attn.k_proj.weight"] = torch.ones(16, 31)
    with pytest.raises(CheckpointError, match=r"layers\.0\.self_attn\.k_proj.*\[?16, 31\]?.*\[?16, 32\]?"):
        load(write_dense(tmp_path, tensors))


def test_scales_that_are_not_numbers_are_refused(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, tokenizer=False)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.scales"][0, 3] = float("inf")
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model.layers.1.mlp.down_proj: some of its scales are not finite"):
        load(folder)


def test_biases_of_every_module(tmp_path: Path) -> None:
    """Against the same model with the biases of q, k, v, o and the MLP set to zero: the outputs differ, so they are read."""
    options = {"attention_bias": True, "mlp_bias": True}
    tensors = dense_tensors({**DENSE, **options})
    whole = logits(load(write_dense(tmp_path / "whole", tensors, **options)))
    for module in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"):
        changed = {name: t * 0 if name.endswith(f"{module}.bias") else t for name, t in tensors.items()}
        found = logits(load(write_dense(tmp_path / module, changed, **options)))
        assert (found - whole).abs().max() > 1e-4, module


def test_fused_and_separate_projections_agree(tmp_path: Path) -> None:
    """Phi-3's fused tensors against the same numbers in a Llama's separate ones."""
    tensors = dense_tensors(DENSE)
    fused = {n: t for n, t in tensors.items() if not any(p in n for p in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"))}
    for i in range(2):
        prefix = f"model.layers.{i}"
        fused[f"{prefix}.self_attn.qkv_proj.weight"] = torch.cat([tensors[f"{prefix}.self_attn.{n}_proj.weight"] for n in "qkv"])
        fused[f"{prefix}.mlp.gate_up_proj.weight"] = torch.cat([tensors[f"{prefix}.mlp.{n}_proj.weight"] for n in ("gate", "up")])
    separate = load(write_dense(tmp_path / "llama", tensors))
    phi = load(write_dense(tmp_path / "phi", fused, architectures=["Phi3ForCausalLM"]))
    assert torch.allclose(logits(phi), logits(separate), atol=1e-5)


def act_order_checkpoint(folder: Path, *, shared: bool) -> Path:
    """GPTQ with g_idx in every module; q, k and v have one order between them, or one each."""
    group, spec = 16, ModelSpec.from_config(DENSE)
    rng = torch.Generator().manual_seed(1)
    tensors = {name: t for name, t in dense_tensors(DENSE).items() if "_proj" not in name}
    orders: dict[tuple[int, str], torch.Tensor] = {}
    for m in spec.modules():
        if "_proj" not in m.name:
            continue
        family = "qkv" if shared and any(p in m.name for p in ("q_proj", "k_proj", "v_proj")) else m.name
        key = (int(m.name.split(".")[2]), family)
        if key not in orders:
            orders[key] = (torch.arange(m.K) // group)[torch.randperm(m.K, generator=rng)]

        def words(*shape: int) -> torch.Tensor:
            return torch.randint(-(2**31), 2**31, shape, generator=rng, dtype=torch.int64).to(torch.int32)

        tensors[f"{m.name}.qweight"] = words(m.K // 8, m.N)
        tensors[f"{m.name}.qzeros"] = torch.full((m.K // group, m.N // 8), 0x77777777, dtype=torch.int32)
        tensors[f"{m.name}.scales"] = (0.05 * (0.5 + torch.rand(m.K // group, m.N, generator=rng))).half()
        tensors[f"{m.name}.g_idx"] = orders[key].to(torch.int32)
    settings = {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": group,
        "desc_act": True,
        "sym": True,
        "checkpoint_format": "gptq",
    }
    return write_dense(folder, tensors, quantization_config=settings)


@pytest.mark.parametrize("shared", [True, False])
def test_act_order(tmp_path: Path, shared: bool) -> None:
    """As the same weights written dense; down_proj needs no gather, and q, k, v with one order are one weight."""
    folder = act_order_checkpoint(tmp_path / "gptq", shared=shared)
    spec = ModelSpec.from_config(DENSE)
    tensors = {name: t for name, t in load_file(folder / "model.safetensors").items() if "_proj" not in name}
    with Checkpoint.open(folder) as checkpoint:
        for m in spec.modules():
            if "_proj" in m.name:
                weight = checkpoint.weight(m.name, expect=(m.N, m.K))
                assert not isinstance(weight, torch.Tensor) and weight.perm is not None
                tensors[f"{m.name}.weight"] = weight.dequantize(torch.float16).float()
    expected = logits(load(write_dense(tmp_path / "dense", tensors)))
    for reference in (True, False):
        decoder = load(folder, reference=reference)
        assert (logits(decoder) - expected).abs().max() < 1e-3
        assert [len(layer.qkv) for layer in decoder.layers] == ([1, 1] if shared else [3, 3])
    assert all(layer.only_mlp.down.perm is None and layer.o.perm is not None for layer in decoder.layers)  # type: ignore[attr-defined]


def test_progress_runs_from_nothing_to_all(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    folder = make_checkpoint(tmp_path, tokenizer=False)
    load(folder, progress=lambda done, total: seen.append((done, total)))
    total = sum(t.nbytes for t in load_file(folder / "model.safetensors").values())
    assert seen[0] == (0, total) and seen[-1] == (total, total) and len(seen) >= 4
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_weights_come_in_the_dtype_asked_for(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, tokenizer=False)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        decoder = load(folder, dtype)
        assert decoder.embedding.dtype == decoder.norm.dtype == decoder.layers[0].input_norm.dtype == dtype
        assert decoder.cos_sin.dtype == torch.float32


MEASURE = """
import sys
from pathlib import Path
import psutil, torch
from kernels.ops import get_ops
from models.loader import load_model
from models.spec import ModelSpec
from quant.checkpoint import Checkpoint

def peak():
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) * 1024

with Checkpoint.open(Path(sys.argv[1])) as checkpoint:
    spec, ops = ModelSpec.from_config(checkpoint.config), get_ops("cpu")
    tiny = torch.ones(4, 4, dtype=torch.bfloat16) @ torch.ones(4, 4, dtype=torch.bfloat16)
    before = psutil.Process().memory_info().rss
    decoder = load_model(checkpoint, spec, ops, dtype=torch.bfloat16, max_len=512)
print(before, peak(), decoder.nbytes, psutil.Process().memory_info().rss)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from /proc")
def test_loading_takes_little_more_than_the_model(tmp_path: Path) -> None:
    """A 4-bit model of about 340 MB: the peak stays within 350 MB of its final size, where a second copy would pass that."""
    config = {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 10,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 8000,
        "quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm"},
        "torch_dtype": "float16",
    }  # fmt: skip
    spec = ModelSpec.from_config({**DENSE, **config})
    tensors = {name: torch.ones(size, dtype=torch.float16) for name, size in spec.small_tensors()}
    for m in spec.modules():
        if "_proj" in m.name:
            tensors[f"{m.name}.qweight"] = torch.full((m.K, m.N // 8), 0x12345678, dtype=torch.int32)
            tensors[f"{m.name}.qzeros"] = torch.full((m.K // 128, m.N // 8), 0x77777777, dtype=torch.int32)
            tensors[f"{m.name}.scales"] = torch.full((m.K // 128, m.N), 0.01, dtype=torch.float16)
        else:
            tensors[f"{m.name}.weight"] = torch.ones(m.N, m.K, dtype=torch.float16)
    folder = write_dense(tmp_path, tensors, **config)
    del tensors
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", MEASURE, str(folder)], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    before, peak, held, after = (int(n) for n in done.stdout.split())
    print(f"held {held >> 20} MiB, peak {(peak - before) >> 20} MiB, after {(after - before) >> 20} MiB")
    assert 300e6 < held < 400e6
    assert peak - before < held + 350e6
    assert after - before < held + 150e6
