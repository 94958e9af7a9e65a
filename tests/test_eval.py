"""Perplexity, divergence and exact match against a plain loop over transformers' float32 logits."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from appliance import cli
from appliance.config import EngineConfig
from appliance.eval.questions import read_questions
from appliance.eval.scoring import Model, score, windows
from appliance.hub import demo_model
from quant.errors import InputError
from tests.test_quantize import ids, make, quantized


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("dense") / "model")


@pytest.mark.parametrize("at_once", [2048, 19])
def test_perplexity_and_divergence(model: Path, tmp_path: Path, at_once: int) -> None:
    from transformers import AutoModelForCausalLM

    small = quantized(model, tmp_path / "small", method="rtn", bits=8, group_size=-1)
    pieces = ids(seed=3, samples=2).tolist()
    options = {"dtype": "float32", "reference_ops": True, "kv_cache_memory_bytes": 1 << 20, "lm_head_dtype": "model"}
    both = [
        Model(EngineConfig(model=str(one), max_num_batched_tokens=at_once, **options), 33)  # type: ignore[arg-type]
        for one in (model, small)
    ]
    *_, own = score(both[0], pieces)
    *_, found = score(both[1], pieces, both[0])
    *_, same = score(both[0], pieces, both[0])
    with torch.inference_mode():
        logits = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)(torch.tensor(pieces)).logits[:, :-1]
    nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.tensor(pieces)[:, 1:].flatten())
    assert own.tokens == 2 * 31 and own.perplexity == pytest.approx(math.exp(nll), abs=1e-3 * math.exp(nll))
    assert same.kl == pytest.approx(0, abs=1e-6) and same.agree == same.tokens
    assert 0 < found.kl / found.tokens < 0.05 and 0.8 < found.agree / found.tokens <= 1
    assert found.perplexity == pytest.approx(own.perplexity, rel=0.1)


def test_windows() -> None:
    assert windows(range(10), 4, None, None) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert windows(range(10), 4, 1, 99) == [[99, 0, 1, 2, 3]]
    with pytest.raises(InputError, match="--text has 10 tokens, fewer than one window of 11"):
        windows(range(10), 11, None, None)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, questions = tmp_path / "text.txt", tmp_path / "questions.jsonl"
    text.write_text("What is 7 plus 5? The answer is 12. " * 30)
    lines = (demo_model() / "heldout.jsonl").read_text().splitlines()[:12]
    questions.write_text("\n".join(lines))
    demo = str(demo_model())
    flags = ["--lm-head-dtype", "model", "--kv-cache-memory-bytes", "8M", "--max-num-seqs", "16", "--threads", "1"]
    command = ["eval", demo, "--text", str(text), "--length", "64", "--questions", str(questions), *flags]
    assert cli.run([*command, "--base", demo, "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert found["exact_match"] >= 0.9 and found["questions"] == 12 and found["quantization"] == "awq"
    assert found["perplexity"] > 1 and abs(found["kl"]) < 1e-5 and found["top1_agreement"] == 1.0 and found["weights_bytes"] > 1e6
    for wrong, words in (
        (["eval", demo], "nothing to measure: give --text FILE, --questions FILE, or both"),
        (["eval", demo, "--text", str(text), "--length", "1"], "--length is 1"),
        (["eval", demo, "--text", "nowhere.txt"], "nowhere.txt: No such file"),
    ):
        assert cli.run(wrong) == 2
        assert words in capsys.readouterr().err
    questions.write_text('{"question": "a"}')
    with pytest.raises(InputError, match=r'line 1: JSON with "question" and "answer" is needed'):
        read_questions(str(questions))
