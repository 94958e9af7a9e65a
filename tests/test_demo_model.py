"""The embedded demo model: what ships, and that it answers its own held-out questions, through the server as a user would ask."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
import torch
from safetensors.torch import load_file

from appliance.hub import demo_model
from models.spec import ModelSpec
from quant.checkpoint import Checkpoint
from tests import warm

ROOT = Path(__file__).resolve().parent.parent
GOOD = 0.9


@pytest.fixture(scope="module")
def items() -> list[dict[str, str]]:
    return [json.loads(line) for line in (demo_model() / "heldout.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def scripts() -> Iterator[None]:
    """The folder of scripts can be imported from."""
    sys.path.insert(0, str(ROOT / "scripts"))
    yield
    sys.path.remove(str(ROOT / "scripts"))


@pytest.fixture(scope="module")
def questions(scripts: None) -> object:
    from demo_model import questions

    return questions


def test_what_ships() -> None:
    directory = demo_model()
    assert sum(path.stat().st_size for path in directory.iterdir()) <= 4_000_000
    with Checkpoint.open(directory, "awq") as checkpoint:
        spec = ModelSpec.from_config(checkpoint.config)
        assert 1_000_000 <= spec.num_parameters <= 3_000_000
        stored = checkpoint.scheme.for_module("model.layers.0.mlp.up_proj")
        assert (stored.layout, stored.bits, stored.group_size) == ("awq-gemm", 4, 64)
        for module in spec.modules():
            checkpoint.weight(module.name, expect=(module.N, module.K))
        for name, numel in spec.small_tensors():
            assert checkpoint.tensor(name).numel() == numel
        assert checkpoint.leftover() == []


def test_held_out_questions_are_not_trained_on(items: list[dict[str, str]], questions: object) -> None:
    conversations = questions.Conversations(0)  # type: ignore[attr-defined]
    trained = {q.text.lower().rstrip(".?!") for group in conversations.by_category.values() for q in group}
    asked = [item["question"].lower().rstrip(".?!") for item in items]
    assert len(items) >= 200 and len(set(asked)) == len(asked)
    assert not trained.intersection(asked)
    sample = questions.held_out_sample(300, 0)  # type: ignore[attr-defined]
    assert [q.text for q in sample] == [item["question"] for item in items], "the generator is deterministic"


def on_the_grid(weight: torch.Tensor) -> torch.Tensor:
    """A weight [N, K] rounded, said once more: 64 inputs share a step in float16 and a zero point, set by their extremes."""
    groups = weight.unflatten(1, (-1, 64))
    low, high = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(min=0)
    steps = ((high - low) / 15).clamp(min=1e-5).half().float()
    zeros = (-low / steps).round().clamp(0, 15)
    return ((((groups / steps).round() + zeros).clamp(0, 15) - zeros) * steps).flatten(1)


def test_training_makes_what_ships(
    scripts: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A few steps, the last of them with rounded weights: what ships are the weights that the training computed with."""
    import train_demo_model
    from demo_model.model import Linear

    work, output = tmp_path / "work", tmp_path / "demo"
    few = ["--steps", "4", "--rows", "2", "--length", "48", "--held-out", "12", "--threads", "1"]
    monkeypatch.setattr(sys, "argv", ["train", "--work", str(work), "--output", str(output), *few])
    monkeypatch.setenv("COLUMNS", "200")
    assert train_demo_model.main() == 1, "nobody learns sums in four steps, and it says so"
    out = capfd.readouterr().out
    assert "KL from base" in out and "exact match" in out and re.search(r"rtn-4 .*\b0\.0% of 12", out), out
    assert {path.name for path in output.glob("*.json*")} > {"config.json", "tokenizer.json", "heldout.jsonl"}
    trained = load_file(work / "trained" / "model.safetensors")
    with Checkpoint.open(output, "awq") as checkpoint, torch.no_grad():
        spec = ModelSpec.from_config(checkpoint.config)
        stored = checkpoint.scheme.for_module("model.layers.0.mlp.up_proj")
        assert (stored.layout, stored.bits, stored.group_size) == ("awq-gemm", 4, 64)
        for module in spec.modules():
            weight = trained[f"{module.name}.weight"]
            shipped = checkpoint.weight(module.name, expect=(module.N, module.K))
            if module.part == "embedding":
                assert torch.equal(shipped, weight.half())
                continue
            assert torch.equal(shipped.dequantize(), on_the_grid(weight)), module.name
            assert Linear.rounded, "as it was in the last step"
            linear = Linear(module.K, module.N)
            linear.weight.copy_(weight)
            assert torch.allclose(linear(torch.eye(module.K)).t(), shipped.dequantize(), rtol=0, atol=1e-7), module.name
            assert not torch.allclose(weight, shipped.dequantize(), rtol=0, atol=1e-4)


ORACLE = """
import json, sys, torch
from pathlib import Path
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

directory, items = Path(sys.argv[1]), json.load(sys.stdin)
settings = json.loads((directory / "config.json").read_text())
settings.pop("quantization_config")
model = LlamaForCausalLM(LlamaConfig(**settings)).float().eval()
stored, weights = load_file(directory / "model.safetensors"), {}
ORDER = [0, 4, 1, 5, 2, 6, 3, 7]  # which nibble of a word holds column i: the inverse of 0,2,4,6,1,3,5,7
unpack = lambda words: ((words[..., None] >> (4 * torch.tensor(ORDER))) & 15).flatten(1).float()
for name, tensor in stored.items():
    if name.endswith(".qweight"):
        module = name.removesuffix(".qweight")
        scales, zeros = stored[module + ".scales"].float(), unpack(stored[module + ".qzeros"])
        rows = torch.arange(tensor.shape[0]) // (tensor.shape[0] // scales.shape[0])
        weights[module + ".weight"] = ((unpack(tensor) - zeros[rows]) * scales[rows]).t().contiguous()
    elif not name.endswith((".qzeros", ".scales")):
        weights[name] = tensor.float()
missing = model.load_state_dict(weights, strict=False).missing_keys
assert missing in ([], ["lm_head.weight"]), missing
model.tie_weights()
tokenizer, right = Tokenizer.from_file(str(directory / "tokenizer.json")), 0
for item in items:
    text = "<|bos|><|user|>" + item["question"] + "<|end|><|assistant|>"
    ids = torch.tensor([tokenizer.encode(text, add_special_tokens=False).ids])
    ends = dict(max_new_tokens=64, eos_token_id=2, pad_token_id=0)
    out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, **ends)
    answer = tokenizer.decode(out[0, ids.shape[1]:].tolist(), skip_special_tokens=True)
    right += answer == item["answer"]
print(right / len(items))
"""


def test_transformers_gets_the_same_answers(items: list[dict[str, str]], tmp_path: Path) -> None:
    """Dequantized by a few lines of its own, generated by transformers in float32, in a process and folder of its own."""
    sample = items[:: max(1, len(items) // 60)]
    done = warm.run("-c", ORACLE, str(demo_model().resolve()), input=json.dumps(sample), cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert float(done.stdout) >= GOOD


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """``appliance serve`` with nothing said, on a free port."""
    command = [sys.executable, "-m", "appliance", "serve", "--port", "0", "--threads", "1"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if found := re.search(r"ready at (http://\S+)", line):
                yield found[1]
                break
        else:
            raise AssertionError("the server ended before it was ready")
    finally:
        process.terminate()
        process.wait(15)


def test_it_answers_through_the_server(server: str, items: list[dict[str, str]]) -> None:
    client = openai.OpenAI(base_url=server, api_key="none", max_retries=0)

    def ask(item: dict[str, str]) -> bool:
        messages = [{"role": "user", "content": item["question"]}]
        answer = client.chat.completions.create(model="demo", messages=messages, temperature=0)  # type: ignore[arg-type]
        assert answer.choices[0].finish_reason == "stop"
        return answer.choices[0].message.content == item["answer"]

    with ThreadPoolExecutor(16) as pool:
        right = sum(pool.map(ask, items))
    assert right / len(items) >= GOOD


def test_a_second_turn(server: str) -> None:
    client = openai.OpenAI(base_url=server, api_key="none", max_retries=0)
    messages = [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hello! How can I help you?"},
        {"role": "user", "content": "What is the opposite of hot?"},
    ]
    stream = client.chat.completions.create(model="demo", messages=messages, stream=True, temperature=0)  # type: ignore[arg-type]
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
    assert text == "The opposite of hot is cold."
