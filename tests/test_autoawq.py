"""AutoAWQ as an engine, and our AWQ held against it: the same model, tokens and bits."""

from __future__ import annotations

import json
import shutil
import socket
import sys
import warnings
from collections import namedtuple
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from appliance import cli
from appliance.quantize import autoawq
from appliance.quantize.autoawq import AutoAWQJob
from appliance.quantize.calibration import calibration_ids
from appliance.quantize.job import Job
from appliance.quantize.layer import Watcher, _outputs
from appliance.quantize.options import Options
from appliance.text.tokenizer import Tokenizer
from models.plain import PlainLayer
from models.rope import cos_sin_table
from models.spec import ModelSpec
from quant.algorithms.awq import search_cuts, search_scales
from quant.algorithms.grid import Grid
from quant.checkpoint import Checkpoint
from quant.errors import InputError
from quant.tensor import QuantTensor
from tests.test_quantize import VOCAB, divergence, ids, logits
from tests.tiny_model import write_tokenizer

GROUP = 32


@pytest.fixture(scope="module", autouse=True)
def package() -> Any:
    """AutoAWQ is asked for once: its import takes seconds."""
    return pytest.importorskip("awq.models.auto", exc_type=ImportError)


@pytest.fixture(scope="module", autouse=True)
def no_network() -> Any:
    def refuse(*args: Any) -> None:
        raise AssertionError(f"a connection to {args[1:]}")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", refuse)
        yield


def make(directory: Path, kinds: str = "Llama", **config: Any) -> Path:
    """A random model with outlier channels, in sizes that AutoAWQ's clipping can do with."""
    import transformers

    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 16}
    shape |= {"num_key_value_heads": 4, "vocab_size": VOCAB, "max_position_embeddings": 256, "tie_word_embeddings": False}
    shape |= {"pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2}
    made = getattr(transformers, f"{kinds}ForCausalLM")(getattr(transformers, f"{kinds}Config")(**shape | config)).float()
    for name, parameter in made.named_parameters():
        with torch.no_grad():
            if "layernorm" in name:
                parameter[::13] *= 20
            elif "bias" in name:
                parameter.normal_()
            elif parameter.dim() == 2:
                parameter.copy_(torch.randn_like(parameter) * 1.5 / parameter.shape[1] ** 0.5)
    made.save_pretrained(directory)
    write_tokenizer(directory)
    return directory


def quantized(kind: type[Job], source: Path, output: Path, tokens: Tensor, **options: Any) -> Path:
    engine = "autoawq" if kind is AutoAWQJob else "appliance"
    with torch.inference_mode():
        kind(source, output, Options(**{"group_size": GROUP, "engine": engine, **options}).checked(), tokens).run()
    return output


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("dense") / "model")


@pytest.fixture(scope="module")
def theirs(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantized(AutoAWQJob, model, tmp_path_factory.mktemp("theirs") / "made", ids())


def test_ours_on_planted_outliers(model: Path, theirs: Path, tmp_path: Path) -> None:
    """Perplexity over what the model itself would say is exp(entropy + divergence): no worse by 1 %."""
    ours = divergence(quantized(Job, model, tmp_path / "ours", ids()), model)
    rounded = divergence(quantized(Job, model, tmp_path / "rounded", ids(), method="rtn"), model)
    assert divergence(theirs, model) < 0.8 * rounded  # or AutoAWQ does not do here what it does elsewhere
    assert ours <= divergence(theirs, model) + 0.01


@pytest.mark.timeout(600)  # half a minute where others have the processors, too
@pytest.mark.realdata
def test_ours_on_a_real_model(shared_data: Path, tmp_path: Path) -> None:
    original, text = shared_data / "models/TinyStories-656K", str(shared_data / "text/tinystories.txt")
    tokenizer = Tokenizer.load(original)
    tokens = calibration_ids(text, tokenizer, samples=64, length=128, vocab=2048, seed=0)
    held_out = calibration_ids(text, tokenizer, samples=128, length=128, vocab=2048, seed=77)
    expected = logits(original, held_out)

    def judged(kind: type[Job], method: str) -> tuple[float, float]:
        """(divergence from the original, perplexity)."""
        found = logits(quantized(kind, original, tmp_path / f"{kind.__name__}-{method}", tokens, method=method), held_out)
        loss = -found[:, :-1].gather(2, held_out[:, 1:, None]).mean()
        return float((expected.exp() * (expected - found)).sum(-1).mean()), float(loss.exp())

    rounded, their, ours = judged(Job, "rtn"), judged(AutoAWQJob, "awq"), judged(Job, "awq")
    assert their[0] < 0.95 * rounded[0]
    assert ours[0] <= 1.01 * their[0] and ours[1] <= 1.01 * their[1], (ours, their)


SHARED = {"tie_word_embeddings": True, "num_key_value_heads": 2, "head_dim": 32}
OLD = {"original_max_position_embeddings": 256}
KINDS = [("Qwen2", {}), ("Qwen3", {"head_dim": 32}), ("Mistral", {"sliding_window": 16}), ("Phi3", OLD), ("Llama", SHARED)]


@pytest.mark.parametrize(("kinds", "config"), KINDS)
def test_architectures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kinds: str, config: dict[str, Any]) -> None:
    monkeypatch.setattr(autoawq, "TOKENS_AT_ONCE", 96)  # a batch in parts
    model, tokens = make(tmp_path / "model", kinds, num_hidden_layers=1, **config), ids(samples=8)
    made = quantized(AutoAWQJob, model, tmp_path / "theirs", tokens)
    rounded = quantized(Job, model, tmp_path / "rounded", tokens, method="rtn")
    assert divergence(made, model) < 0.9 * divergence(rounded, model)


def test_what_it_made_is_read_as_it_reads_it(model: Path, theirs: Path) -> None:
    from awq.utils.packing_utils import dequantize_gemm

    tensors = {name: tensor for file in theirs.glob("*.safetensors") for name, tensor in load_file(file).items()}
    with Checkpoint.open(theirs) as checkpoint:
        spec = ModelSpec.from_config(checkpoint.config)
        for name in [f"model.layers.{k}.{module.name}" for k in range(spec.layers) for module in spec.layer_modules()]:
            qweight, qzeros, scales = (tensors[f"{name}.{part}"] for part in ("qweight", "qzeros", "scales"))
            weight = checkpoint.weight(name, expect=(scales.shape[1], qweight.shape[0]))
            assert isinstance(weight, QuantTensor)
            assert torch.equal(weight.dequantize(), dequantize_gemm(qweight, qzeros, scales.float(), 4, GROUP).t())


def test_what_it_made_is_served(theirs: Path) -> None:
    from appliance import LLM, SamplingParams

    tokens = ids(seed=5, samples=1)
    llm = LLM(str(theirs), dtype="float32", reference_ops=True, kv_cache_memory_bytes=1 << 20, lm_head_dtype="model")
    (output,) = llm.generate([{"prompt_token_ids": tokens[0].tolist()}], SamplingParams(max_tokens=1, temperature=0.0))
    assert output.outputs[0].token_ids[0] == int(logits(theirs, tokens)[0, -1].argmax())


def test_the_searches_find_the_same(package: Any) -> None:
    """Scales for linears that are compared by their own outputs, as AutoAWQ does for the outputs of attention and of the MLP."""
    torch.manual_seed(1)
    x = torch.randn(4, 100, 128)
    x[..., ::17] *= 12
    grid = Grid(4, GROUP, False, torch.float32)
    linear = torch.nn.Linear(128, 192, bias=False)
    original = linear.weight.detach().clone()
    with torch.no_grad():
        _, _, found = searcher()._search_best_scale(torch.nn.ModuleList([linear]), linear, [linear], x)
    assert torch.equal(linear.weight, original)  # on a CPU AutoAWQ by itself leaves it multiplied by every scale that it tried
    flat = x.flatten(0, 1)
    ours = search_scales([original], flat, flat.abs().mean(0), grid)
    assert torch.allclose(ours.scales, found, rtol=1e-4)
    loss = (flat @ (grid.rounded(original * found) / found - original).t()).square().sum()
    assert ours.loss == pytest.approx(float(loss), rel=1e-3) and ours.loss < 0.7 * ours.before


@pytest.mark.parametrize("inputs", ["attention", "mlp"])
def test_the_searches_find_the_same_by_a_block(model: Path, inputs: str) -> None:
    """By the outputs of attention or of the MLP, whose other weights stay as they are."""
    from transformers import AutoModelForCausalLM

    dense, told = AutoModelForCausalLM.from_pretrained(model, use_cache=False), {}
    there, tokens = dense.model.layers[0], ids()[:, :24]
    block = there.self_attn if inputs == "attention" else there.mlp
    block.register_forward_pre_hook(lambda module, given, named: told.update(x=given, **named), with_kwargs=True)
    with Checkpoint.open(model) as checkpoint, torch.inference_mode():
        spec = ModelSpec.from_config(checkpoint.config)
        layer = PlainLayer.read(checkpoint, spec, 0, cos_sin_table(spec.rope, 24), torch.float32)
        watcher = Watcher("awq", 1, False)
        layer.look(dense.model.embed_tokens(tokens), watcher)
    with torch.no_grad():
        dense(tokens)
        given = told.pop("x")
        x = told.pop("hidden_states", given[0] if given else None)
        short = ("q_proj", "k_proj", "v_proj") if inputs == "attention" else ("gate_proj", "up_proj")
        linears = [getattr(block, name) for name in short]
        _, _, found = searcher()._search_best_scale(there, linears[0], linears, x, block, told)
        names = [f"{'self_attn' if inputs == 'attention' else 'mlp'}.{name}" for name in short]
        seen, weights, grid = watcher.seen[inputs], [layer.weights[name] for name in names], Grid(4, GROUP, False, torch.float32)
        assert torch.cat(seen.some).shape[0] == tokens.numel()
        ours = search_scales(weights, torch.cat(seen.some), seen.mean(), grid, outputs=_outputs(layer, inputs, names, seen))
    assert torch.allclose(ours.scales, found, rtol=1e-3) and ours.loss < 0.8 * ours.before


def test_our_cuts_are_as_good(package: Any) -> None:
    """AutoAWQ clamps at a share of the largest magnitude, we shrink both ends: by the errors of the groups' parts of outputs."""
    torch.manual_seed(2)
    weight, x = torch.randn(64, 128), torch.randn(512, 128)
    grid, inputs = Grid(4, GROUP, False, torch.float32), x.view(512, -1, GROUP)

    def error(made: Tensor) -> float:
        off = (made - weight).view(64, -1, GROUP)
        return float(torch.einsum("tgk,ngk->tng", inputs, off).square().sum())

    limit = searcher()._compute_best_clip(weight, x)
    clamped = torch.clamp(weight.view(64, -1, GROUP), -limit, limit).view(64, 128)
    theirs, ours = error(grid.rounded(clamped)), error(grid.rounded(weight, search_cuts(weight, x, grid)))
    assert ours <= 1.01 * theirs < error(grid.rounded(weight))


def searcher() -> Any:
    """AutoAWQ's quantizer as we use it, without a model."""
    made = autoawq._quantizer().__new__(autoawq._quantizer())
    made.__dict__.update(w_bit=4, group_size=GROUP, zero_point=True, duo_scaling=True, max_chunk_memory=1 << 30)
    made.__dict__.update(n_parallel_calib_samples=None, tell=lambda done: None, layer=0, steps=1, taken=0)
    return made


def test_it_sees_our_tokens(model: Path) -> None:
    from transformers import AutoModelForCausalLM

    dense, seen, reached = AutoModelForCausalLM.from_pretrained(model, use_cache=False), [], []
    dense.model.embed_tokens.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    autoawq.quantize(dense, "llama", ids(), Options(group_size=GROUP, clip=False).checked(), reached.append)
    assert len(seen) == 1 and torch.equal(seen[0], ids())
    assert reached == sorted(reached) and reached[0] == 0 and 1 in reached and 1.7 < reached[-1] < 2


def test_options_it_does_not_have() -> None:
    for options, words in (
        ({"method": "gptq"}, r"--method gptq: --engine autoawq does awq in 4 bits .* leave --engine autoawq out"),
        ({"bits": 3}, "--bits 3:"),
        ({"act_order": True}, "--act-order:"),
        ({"sym": True}, "--sym:"),
        ({"format": "compressed-tensors"}, "--format compressed-tensors:"),
        ({"static_groups": False}, "--no-static-groups:"),
        ({"target_bits": 4.5}, "--target-bits 4.5:"),
        ({"group_size": -1}, "--group-size -1: AutoAWQ's search needs groups"),
        ({"engine": "llm-compressor"}, "--engine is 'llm-compressor': one of appliance, autoawq is needed"),
    ):
        with pytest.raises(InputError, match=words):
            Options(**{"engine": "autoawq", **options}).checked()  # type: ignore[arg-type]


def test_models_it_cannot_do(model: Path, theirs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(words: str, source: Path, **options: Any) -> None:
        with pytest.raises(InputError, match=words):
            quantized(AutoAWQJob, source, tmp_path / "made", ids(), **options)
        assert not (tmp_path / "made").exists() and not (tmp_path / "made.partial").exists()

    def changed(name: str, **config: Any) -> Path:
        shutil.copytree(model, tmp_path / name)
        before = json.loads((model / "config.json").read_text())
        (tmp_path / name / "config.json").write_text(json.dumps(before | config))
        return tmp_path / name

    refused("quantized already", theirs)
    refused("does not divide the 64 inputs", model, group_size=48)
    refused("does not know model_type 'smollm9'", changed("unknown", model_type="smollm9"))
    phi = {"architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "num_key_value_heads": 2}
    refused("4 query heads share 2 in one qkv_proj: the model would be broken", changed("shared", **phi))
    narrow = r"self_attn\.v_proj has 32 outputs: AutoAWQ's clipping needs a multiple of 64; add --no-clip"
    refused(narrow, changed("narrow", num_key_value_heads=2))
    qwen = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "use_sliding_window": True, "sliding_window": 16}
    refused("--calibration-length 32: .* some here see 16 tokens", changed("windows", max_window_layers=1, **qwen))
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(tensors, changed("damaged") / "model.safetensors", metadata={"format": "pt"})
    refused(r"model\.layers\.1\.mlp\.up_proj: some of its values are not finite", tmp_path / "damaged")

    def fail(*args: Any, **more: Any) -> None:
        raise AssertionError

    with monkeypatch.context() as patch:
        patch.setattr("awq.quantize.quantizer.apply_scale", fail)
        refused(r"AutoAWQ failed at model\.layers\.0: a check of its own .*; leave --engine autoawq out", model)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 1000))
    refused(r"has 1000 bytes free, and the checkpoint will take \S+ KiB more", model)


def test_keys_that_share_scales_meant_for_values(tmp_path: Path) -> None:
    """Why Phi-3 with shared keys and values is refused."""
    model = make(tmp_path / "model", "Phi3", num_key_value_heads=2, num_hidden_layers=1, original_max_position_embeddings=256)
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.0.self_attn.qkv_proj.weight"][-32::5] *= 20  # values
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(autoawq, "check_model", lambda *args: None)
        made = quantized(AutoAWQJob, model, tmp_path / "theirs", ids(), clip=False)
    rounded = quantized(Job, model, tmp_path / "rounded", ids(), method="rtn")
    assert divergence(made, model) > 2 * divergence(rounded, model)


def test_the_package_is_absent_or_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "version", lambda name: "0.2.6")
    with pytest.raises(InputError, match=r"autoawq 0\.2\.6 is installed, but 0\.2\.9 is what works: pip install autoawq==0"):
        Options(engine="autoawq").checked()

    def absent(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", absent)
    with pytest.raises(InputError, match=r"needs the package autoawq: pip install 'appliance\[autoawq\]'"):
        Options(engine="autoawq").checked()
    with pytest.raises(InputError, match=r"autoawq 0\.2\.9 cannot be imported here: No module named 'awq\.nothing'"):
        autoawq._package("awq.nothing")


def test_the_command(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "awq")  # its farewell is said when that is imported
    before, output = warnings.filters[:], tmp_path / "made"
    text = ["--calibration-samples", "8", "--calibration-length", "32", "--threads", "1", "--group-size", "32", "--no-clip"]
    assert cli.run(["quantize", str(model), "--output", str(output), "--engine", "autoawq", *text]) == 0
    out, err = capsys.readouterr()
    assert "4 bits by awq (autoawq)" in out and err == f"try it: appliance serve {output}\n"
    assert warnings.filters[:] == before
    assert (output / "tokenizer.json").is_file() and not (output / "job.json").exists()
    assert cli.run(["quantize", str(model), "--output", str(output), "--engine", "autoawq", "--method", "gptq"]) == 2
    assert capsys.readouterr().err.startswith("appliance: error: --method gptq: --engine autoawq does awq")
