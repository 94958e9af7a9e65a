"""Quantizing a model: better than rounding, the same after an interruption, read by others, refused where it cannot be."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from appliance import cli
from appliance.quantize.calibration import calibration_ids
from appliance.quantize.job import Job
from appliance.quantize.options import Options
from appliance.text.tokenizer import Tokenizer
from models.plain import FLOATS, PlainLayer
from models.rope import cos_sin_table
from models.spec import ModelSpec
from quant.checkpoint import Checkpoint
from quant.errors import InputError
from tests.tiny_model import write_tokenizer

VOCAB, LENGTH = 99, 32


def make(directory: Path, **config: Any) -> Path:
    """A random Llama or Qwen3 as transformers writes it, whose norms make some channels large."""
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4, "head_dim": 16}
    shape |= {"num_key_value_heads": 2, "vocab_size": VOCAB, "max_position_embeddings": 256, "tie_word_embeddings": False}
    kinds = (Qwen3Config, Qwen3ForCausalLM) if config.pop("qwen", False) else (LlamaConfig, LlamaForCausalLM)
    dtype = getattr(torch, config.pop("dtype", "float32"))
    model = kinds[1](kinds[0](**shape, **config)).float()
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            if "layernorm" in name:
                parameter[::13] *= 20  # outliers, as real models have them
            elif parameter.dim() == 2:
                parameter.copy_(torch.randn_like(parameter) * 1.5 / parameter.shape[1] ** 0.5)
    model.to(dtype).save_pretrained(directory)
    write_tokenizer(directory)
    return directory


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("dense") / "model")


def ids(seed: int = 1, samples: int = 24) -> Tensor:
    return torch.randint(3, VOCAB, (samples, LENGTH), generator=torch.Generator().manual_seed(seed))


def logits(directory: Path, tokens: Tensor) -> Tensor:
    """Log-probabilities [B, T, V] of a checkpoint's own weights, in float32."""
    with Checkpoint.open(directory) as checkpoint, torch.inference_mode():
        spec = ModelSpec.from_config(checkpoint.config)
        table, head = (
            checkpoint.take(name if checkpoint.has(name) else other, dtypes=FLOATS).float()
            for name, other in (("model.embed_tokens.weight", "lm_head.weight"), ("lm_head.weight", "model.embed_tokens.weight"))
        )
        norm = checkpoint.take("model.norm.weight", dtypes=FLOATS).float()
        hidden, table_of_angles = table[tokens], cos_sin_table(spec.rope, tokens.shape[1])
        for number in range(spec.layers):
            hidden = PlainLayer.read(checkpoint, spec, number, table_of_angles, torch.float32).forward(hidden)
        hidden = hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + spec.eps) * norm
        return torch.log_softmax(hidden @ head.t(), -1)


def divergence(directory: Path, original: Path) -> float:
    """Mean KL divergence over tokens that were not seen while quantizing."""
    expected, found = (logits(one, ids(seed=99, samples=8)) for one in (original, directory))
    return float((expected.exp() * (expected - found)).sum(-1).mean())


def quantized(source: Path, output: Path, tokens: Tensor | None = None, **options: Any) -> Path:
    made = Options(**{"group_size": 16, **options}).checked()
    with torch.inference_mode():
        Job(source, output, made, tokens if tokens is not None else ids() if made.calibrated else None).run()
    return output


@pytest.mark.parametrize("qwen", [False, True])
def test_a_plain_layer_is_what_transformers_computes(tmp_path: Path, qwen: bool) -> None:
    from transformers import AutoModelForCausalLM

    directory = make(tmp_path / "model", qwen=qwen, attention_bias=qwen)
    with torch.inference_mode():
        expected = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)(ids()).logits.log_softmax(-1)
    assert torch.allclose(logits(directory, ids()), expected, atol=2e-4)


@pytest.mark.parametrize("bits", [3, 4])
def test_awq_and_gptq_beat_rounding(model: Path, tmp_path: Path, bits: int) -> None:
    form = {"bits": bits, "format": "compressed-tensors", "symmetric": False}
    found = {
        method: divergence(quantized(model, tmp_path / method, method=method, **form), model) for method in ("rtn", "awq", "gptq")
    }
    assert found["awq"] < 0.8 * found["rtn"] and found["gptq"] < 0.8 * found["rtn"], found


@pytest.mark.parametrize(
    "options",
    [
        {"method": "awq"},
        {"method": "gptq", "act_order": True},
        {"method": "gptq", "bits": 3, "group_size": 32, "format": "compressed-tensors"},
    ],
)
def test_what_was_made_is_served(model: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    """The engine computes what the checkpoint's weights say, and they are near the original's."""
    from appliance import LLM, SamplingParams

    directory = quantized(model, tmp_path / "made", **options)
    tokens = ids(seed=5, samples=1)
    llm = LLM(str(directory), dtype="float32", reference_ops=True, kv_cache_memory_bytes=1 << 20, lm_head_dtype="model")
    (output,) = llm.generate([{"prompt_token_ids": tokens[0].tolist()}], SamplingParams(max_tokens=1, prompt_logprobs=0))
    assert output.prompt_logprobs is not None
    found = [entry[token].logprob for token, entry in zip(tokens[0].tolist(), output.prompt_logprobs, strict=True) if entry]
    expected = logits(directory, tokens)[0, :-1].gather(1, tokens[0, 1:, None])[:, 0]
    off = (torch.tensor(found) - expected).abs()  # the engine rounds weights to the type of their scales
    assert float(off.mean()) < 0.01 and float(off.max()) < 0.1
    assert divergence(directory, model) < (0.3 if options.get("bits", 4) >= 4 else 1.0)


def test_compressed_tensors_in_transformers(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors", exc_type=ImportError)
    from transformers import AutoModelForCausalLM

    directory = quantized(model, tmp_path / "made", method="gptq", format="compressed-tensors", act_order=False)
    with torch.inference_mode():
        theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)(ids()).logits.log_softmax(-1)
    assert torch.allclose(logits(directory, ids()), theirs, atol=0.05)


class Stopped(Exception):
    """As if the process had been killed."""


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_an_interrupted_job_goes_on_and_makes_the_same(tmp_path: Path, method: str) -> None:
    model = make(tmp_path / "model", dtype="bfloat16")
    some = ids(samples=6)
    whole = quantized(model, tmp_path / "whole", some, method=method)
    options = Options(group_size=16, method=method).checked()

    def stop(done: float) -> None:
        if done == 2:
            raise Stopped

    with torch.inference_mode():
        with pytest.raises(Stopped):
            Job(model, tmp_path / "parts", options, some).run(stop)
        half = tmp_path / "parts.partial"
        assert len(list(half.glob("*.safetensors"))) == 2 and not (half / "config.json").exists()
        (half / "model-00003-of-00004.tmp").write_bytes(b"half a file")
        for other, words in ((Options(group_size=32, method=method).checked(), "other options"), (options, "text")):
            with pytest.raises(InputError, match=words):
                Job(model, tmp_path / "parts", other, ids(seed=2) if other is options else some)
        told: list[float] = []
        job = Job(model, tmp_path / "parts", options, some)
        assert job.shards.resumed
        job.run(told.append)
    names = sorted(path.name for path in whole.iterdir())
    assert sorted(path.name for path in (tmp_path / "parts").iterdir()) == names and not half.exists()
    for name in names:
        assert (whole / name).read_bytes() == (tmp_path / "parts" / name).read_bytes(), name


def test_scales_of_keys_and_values(model: Path, tmp_path: Path) -> None:
    from models.kv_scales import read_largest

    directory = quantized(model, tmp_path / "made", method="awq", kv_scales=True)
    with Checkpoint.open(directory) as checkpoint:
        largest = [read_largest(checkpoint, f"model.layers.{number}.self_attn", 2) for number in range(3)]
    for number, pair in enumerate(largest):  # what the quantized layers themselves come to
        seen = {"keys": 0.0, "values": 0.0}

        def watch(name: str, x: Tensor, seen: dict[str, float] = seen) -> None:
            if name in seen:
                seen[name] = max(seen[name], float(x.abs().max()))

        with Checkpoint.open(directory) as checkpoint, torch.inference_mode():
            spec = ModelSpec.from_config(checkpoint.config)
            hidden, angles = (
                checkpoint.take("model.embed_tokens.weight", dtypes=FLOATS).float()[ids()],
                cos_sin_table(spec.rope, LENGTH),
            )
            for k in range(number + 1):
                original = PlainLayer.read(Checkpoint.open(model), spec, k, angles, torch.float32)
                made = PlainLayer.read(checkpoint, spec, k, angles, torch.float32)
                if k == number:
                    made.forward(hidden, watch)
                hidden = original.forward(hidden)
        assert pair == pytest.approx((seen["keys"], seen["values"]), rel=0.01)


def test_refusals(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for options, words in (
        ({"method": "marlin"}, "--method is 'marlin'"),
        ({"method": "awq", "act_order": True}, "--act-order is GPTQ's"),
        ({"method": "gptq", "act_order": True, "format": "compressed-tensors"}, "compressed-tensors has given up groups"),
        ({"method": "gptq", "format": "awq"}, "--format awq cannot say what GPTQ makes"),
        ({"format": "gguf"}, "--format is 'gguf'"),
        ({"damping": 0.0}, "--damping is 0"),
        ({"samples": 0}, "--calibration-samples is 0"),
    ):
        with pytest.raises(InputError, match=words):
            Options(**options).checked()  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"--group-size 48 does not divide the 64 inputs of self_attn\.q_proj"):
        quantized(model, tmp_path / "a", group_size=48)
    with pytest.raises(InputError, match="the model was made for 256 tokens"):
        quantized(model, tmp_path / "a", torch.zeros(2, 300, dtype=torch.int64))
    made = quantized(model, tmp_path / "b", method="rtn")
    with pytest.raises(InputError, match="quantized already"):
        quantized(made, tmp_path / "a")
    with pytest.raises(InputError, match="exists already"):
        quantized(model, made)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 1000))
    with pytest.raises(InputError, match=r"has 0\.00 GB free, and the checkpoint will take"):
        quantized(model, tmp_path / "a")
    assert not (tmp_path / "a").exists() and not (tmp_path / "a.partial").exists()


def test_tensors_that_are_missing_or_would_get_lost(model: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(model / "model.safetensors")
    for change, words in (
        (
            {"model.layers.1.self_attn.q_proj.bias": torch.ones(64)},
            "1 tensors have no place in a LlamaForCausalLM: .*q_proj.bias",
        ),
        ({"model.layers.2.mlp.up_proj.weight": None}, "1 tensors are missing: model.layers.2.mlp.up_proj.weight"),
    ):
        other = tmp_path / str(len(words))
        shutil.copytree(model, other)
        changed = {name: tensor for name, tensor in {**tensors, **change}.items() if tensor is not None}
        save_file(changed, other / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(InputError, match=words):
            quantized(other, tmp_path / "made")


def test_what_the_file_cannot_hold(model: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    other = tmp_path / "large"
    shutil.copytree(model, other)
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"][3] = 1e6
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"model\.norm\.weight: some of its values are not finite numbers in float16"):
        quantized(other, tmp_path / "made", method="rtn")
    (tmp_path / "made.partial" / "job.json").unlink()
    with pytest.raises(InputError, match="files of a job that nobody knows"):
        quantized(model, tmp_path / "made", method="rtn")


def test_damaged_weights(model: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    damaged = tmp_path / "damaged"
    shutil.copytree(model, damaged)
    tensors = load_file(damaged / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(tensors, damaged / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"model\.layers\.1\.mlp\.up_proj: some of its values are not finite"):
        quantized(damaged, tmp_path / "made")
    assert not (tmp_path / "made").exists() and not (tmp_path / "made.partial" / "config.json").exists()


def test_calibration(tmp_path: Path, model: Path) -> None:
    tokenizer = Tokenizer.load(model)
    text = tmp_path / "text.txt"
    text.write_text("it was a dark and stormy night " * 20)
    found = calibration_ids(str(text), tokenizer, samples=5, length=40, vocab=VOCAB, seed=3)
    assert found.shape == (5, 40) and torch.equal(
        found, calibration_ids(str(text), tokenizer, samples=5, length=40, vocab=VOCAB, seed=3)
    )
    lines = tmp_path / "text.jsonl"
    lines.write_text('{"text": "one"}\n\n{"messages": [{"role": "user", "content": "two"}]}\n"three"\n')
    assert (
        tokenizer.decode(calibration_ids(str(lines), tokenizer, samples=1, length=14, vocab=VOCAB, seed=0)[0].tolist()).count(
            "\n"
        )
        > 1
    )
    default = calibration_ids(None, tokenizer, samples=4, length=2000, vocab=VOCAB, seed=0)
    assert default.shape == (4, 2000) and len(set(default.flatten().tolist())) > 50
    with pytest.raises(InputError, match=r"has 620 tokens: 128 samples of 512 need at least 640 \(better 65536\)"):
        calibration_ids(str(text), tokenizer, samples=128, length=512, vocab=VOCAB, seed=0)
    with pytest.raises(InputError, match="but the model has 50 tokens"):
        calibration_ids(str(text), tokenizer, samples=1, length=5, vocab=50, seed=0)
    lines.write_text('{"text": "one"}\n{"prompt": "two"}')
    with pytest.raises(InputError, match=r'line 2: JSON with "text" or "messages" is needed'):
        calibration_ids(str(lines), tokenizer, samples=1, length=5, vocab=VOCAB, seed=0)
    with pytest.raises(InputError, match="No such file"):
        calibration_ids("nowhere.txt", tokenizer, samples=1, length=5, vocab=VOCAB, seed=0)


def test_the_command(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "made"
    flags = [
        "--method",
        "gptq",
        "--group-size",
        "16",
        "--calibration-samples",
        "8",
        "--calibration-length",
        "64",
        "--threads",
        "1",
    ]
    assert cli.run(["quantize", str(model), "--output", str(output), *flags]) == 0
    out, err = capsys.readouterr()
    assert "4 bits by gptq" in out and "largest mean squared errors" in out and f"appliance serve {output}" in err
    config = json.loads((output / "config.json").read_text())
    assert config["quantization_config"]["sym"] is True and (output / "tokenizer.json").is_file()
    assert json.loads((output / "quantize_config.json").read_text()) == config["quantization_config"]
    assert cli.run(["quantize", str(model), "--output", str(output), *flags]) == 2
    assert "exists already" in capsys.readouterr().err


@pytest.mark.realdata
def test_no_worse_than_those_who_do_this_for_a_living(shared_data: Path, tmp_path: Path) -> None:
    """AutoAWQ's, GPTQModel's and llm-compressor's checkpoints of the same model, by their divergence from it."""
    original = shared_data / "models/TinyStories-656K"
    tokenizer = Tokenizer.load(original)
    text = shared_data / "text/tinystories.txt"
    tokens = calibration_ids(str(text), tokenizer, samples=64, length=128, vocab=2048, seed=0)
    held_out = calibration_ids(str(text), tokenizer, samples=16, length=128, vocab=2048, seed=77)
    expected = logits(original, held_out)

    def off(directory: Path) -> float:
        return float((expected.exp() * (expected - logits(directory, held_out))).sum(-1).mean())

    theirs = shared_data / "quantized"
    for name, options in (
        ("awq-gemm-g32", {"method": "awq", "group_size": 32}),
        ("gptq-4bit-g32-sym", {"method": "gptq", "group_size": 32}),
        ("gptq-4bit-g32-act-order", {"method": "gptq", "group_size": 32, "act_order": True}),
        ("gptq-4bit-g64-asym", {"method": "gptq", "group_size": 64, "symmetric": False}),
        ("gptq-8bit-channel", {"method": "gptq", "group_size": -1, "bits": 8}),
        ("ct-w4a16-g128", {"method": "gptq", "group_size": 128, "format": "compressed-tensors"}),
    ):
        assert off(quantized(original, tmp_path / name, tokens, **options)) <= 1.01 * off(theirs / name), name
