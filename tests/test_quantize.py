"""Quantizing a model: what is made of it, the same after an interruption; the text that it sees; the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from appliance import cli
from appliance.quantize.calibration import calibration_ids, text_ids
from appliance.quantize.job import Job
from appliance.quantize.options import Options
from appliance.quantize.run import usual_output
from appliance.text.tokenizer import Tokenizer
from models.plain import FLOATS, PlainLayer
from models.rope import cos_sin_table
from models.spec import ModelSpec
from quant.checkpoint import Checkpoint
from quant.errors import InputError
from tests.quantizing import LENGTH, VOCAB, divergence, ids, logits, make, quantized


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("dense") / "model")


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
    llm = LLM(
        str(directory), dtype="float32", reference_ops=True, kv_cache_memory_bytes=1 << 20, lm_head_dtype="model", threads=1
    )
    (output,) = llm.generate([{"prompt_token_ids": tokens[0].tolist()}], SamplingParams(max_tokens=1, prompt_logprobs=0))
    assert output.prompt_logprobs is not None
    found = [entry[token].logprob for token, entry in zip(tokens[0].tolist(), output.prompt_logprobs, strict=True) if entry]
    expected = logits(directory, tokens)[0, :-1].gather(1, tokens[0, 1:, None])[:, 0]
    off = (torch.tensor(found) - expected).abs()  # the engine rounds weights to the type of their scales
    assert float(off.mean()) < 0.01 and float(off.max()) < 0.1
    assert divergence(directory, model) < (0.3 if options.get("bits", 4) >= 4 else 1.0)


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
    assert text_ids(str(lines), tokenizer) == tokenizer.encode("one\n\ntwo\n\nthree", add_special_tokens=False)
    parts = [{"type": "text", "text": "two"}, {"type": "image_url", "image_url": {"url": "x"}}]
    other = tmp_path / "text.NDJSON"
    other.write_text(json.dumps({"messages": [{"content": parts}, {"content": None}, {"content": "three"}]}))
    assert text_ids(str(other), tokenizer) == tokenizer.encode("two\nthree", add_special_tokens=False)
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


def test_where_it_goes_by_itself(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert usual_output("organisation/Model-1B", Options(method="gptq", target_bits=4.5)) == "Model-1B-gptq-4.5bit"
    assert usual_output("~/Model-1B/", Options(fit="RTX 4090")) == "Model-1B-awq-fit"
    monkeypatch.chdir(tmp_path)
    assert cli.run(["quantize", str(model), "--method", "rtn", "--group-size", "16", "--threads", "1"]) == 0
    assert (tmp_path / f"{model.name}-rtn-4bit" / "config.json").is_file()


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
