"""Perplexity, divergence and exact match against a plain loop over transformers' float32 logits; sizes, speeds, variants."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from torch import Tensor

from appliance import cli
from appliance.config import EngineConfig
from appliance.eval.picture import picture, spread
from appliance.eval.questions import read_questions
from appliance.eval.run import _requests
from appliance.eval.score import Score, Window, standard_error
from appliance.eval.scoring import Model, score, windows
from appliance.eval.variants import labels, read_variant
from appliance.hub import demo_model
from quant.checkpoint import Checkpoint
from quant.errors import InputError
from quant.tensor import QuantTensor
from tests.quantizing import VOCAB, ids, make, quantized

EXACT: dict[str, Any] = {"dtype": "float32", "lm_head_dtype": "model", "threads": 1}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("dense") / "model")


@pytest.fixture(scope="module")
def wide(model: Path) -> Path:
    return quantized(model, model.parent / "wide", method="rtn", bits=8, group_size=-1)


@pytest.fixture(scope="module")
def small(model: Path) -> Path:
    return quantized(model, model.parent / "small", method="rtn", bits=4, group_size=32)


def of_transformers(directory: Path, dense: Path | None = None) -> Callable[[Tensor], Tensor]:
    """Logits [1, T, V] by transformers in float32; with the ``dense`` model that it was made of, of a quantized one's weights.

    They are dequantized in the type of their scales, as the tools do that publish checkpoints.
    """
    from transformers import AutoModelForCausalLM

    found = AutoModelForCausalLM.from_pretrained(dense or directory, dtype=torch.float32)
    if dense is not None:
        with Checkpoint.open(directory) as checkpoint, torch.no_grad():
            for name, parameter in found.named_parameters():
                if checkpoint.has(name):
                    parameter.copy_(checkpoint.tensor(name))
                elif name.endswith("_proj.weight"):
                    weight = checkpoint.weight(name.removesuffix(".weight"))
                    assert isinstance(weight, QuantTensor)
                    parameter.copy_(weight.dequantize(weight.scales.dtype))
    return lambda piece: found(piece[None]).logits  # type: ignore[no-any-return]


def loop(forward: Callable[[Tensor], Tensor], text: list[int], length: int, stride: int, start: int | None, tail: bool) -> float:
    """Perplexity as transformers' documentation has it: what a window before had is masked, the rest is summed."""
    before = [] if start is None else [start]
    nll, count, done = 0.0, 0, 0
    for first in range(0, len(text), stride):
        end = min(first + length, len(text))
        if end - first < length and not tail:
            break
        piece = torch.tensor([*before, *text[first:end]])
        target = piece.clone()
        target[: len(piece) - (end - done)] = -100
        with torch.inference_mode():
            logits = forward(piece)[0, :-1]
        nll += float(torch.nn.functional.cross_entropy(logits, target[1:], ignore_index=-100, reduction="sum"))
        count += int((target[1:] != -100).sum())
        done = end
        if end == len(text):
            break
    return math.exp(nll / count)


@pytest.mark.parametrize("at_once", [2048, 19])
def test_perplexity_and_divergence(model: Path, wide: Path, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pieces = ids(seed=3, samples=2).tolist()
    options = {"dtype": "float32", "reference_ops": True, "kv_cache_memory_bytes": 1 << 20, "lm_head_dtype": "model"}
    both = [
        Model(EngineConfig(model=str(one), max_num_batched_tokens=at_once, **options), 33)  # type: ignore[arg-type]
        for one in (model, wide)
    ]
    counted = [(piece, 1) for piece in pieces]
    *_, own = score(both[0], counted)
    *_, found = score(both[1], counted, both[0])
    *_, same = score(both[0], counted, both[0])
    with torch.inference_mode():
        theirs = [of_transformers(model), of_transformers(wide, model)]
        expected = [torch.cat([one(torch.tensor(piece))[0, :-1] for piece in pieces]).log_softmax(-1) for one in theirs]
    after = torch.tensor(pieces)[:, 1:].flatten()
    nll = [torch.nn.functional.nll_loss(one, after) for one in expected]
    kl = (expected[0].exp() * (expected[0] - expected[1])).sum(-1)
    assert own.tokens == 2 * 31 and own.perplexity == pytest.approx(math.exp(nll[0]), abs=1e-3 * math.exp(nll[0]))
    assert same.kl == pytest.approx(0, abs=1e-6) and same.agree == same.tokens
    assert 0 < found.kl / found.tokens < 0.05 and 0.8 < found.agree / found.tokens <= 1
    assert found.perplexity == pytest.approx(own.perplexity, rel=0.1)
    told = found.to_dict()
    assert told["kl"] == pytest.approx(float(kl.mean()), rel=1e-3) and told["kl_max"] == pytest.approx(float(kl.max()), rel=1e-3)
    assert told["kl_median"] == pytest.approx(float(np.median(kl)), rel=1e-3)
    assert told["ratio"] == pytest.approx(math.exp(nll[1] - nll[0]), rel=1e-4)
    assert told["base_perplexity"] == pytest.approx(own.perplexity, rel=1e-9)
    monkeypatch.delattr(both[0].engine, "runner")  # what the base said is known by now
    *_, again = score(both[1], counted, both[0])
    assert again.to_dict() == told


@pytest.mark.parametrize("start", [None, 1])
@pytest.mark.parametrize("stride", [None, 7, 24])
def test_perplexity_is_that_of_a_loop_over_transformers(model: Path, small: Path, stride: int | None, start: int | None) -> None:
    text = ids(seed=5, samples=3).flatten().tolist()[:91]
    for directory, dense in ((model, None), (small, model)):
        loaded = Model(EngineConfig(model=str(directory), **EXACT), 25)
        *_, found = score(loaded, windows(text, 24, None, start, stride))
        expected = loop(of_transformers(directory, dense), text, 24, stride or 24, start, tail=stride is not None)
        assert found.perplexity == pytest.approx(expected, abs=1e-3 * expected)
        counted = 72 if stride is None else 91  # without a start token all but those before which a window has nothing
        assert found.tokens == counted - (0 if start is not None else {None: 3, 7: 1, 24: 4}[stride])


def test_windows() -> None:
    assert windows(range(10), 4, None, None) == [([0, 1, 2, 3], 1), ([4, 5, 6, 7], 1)]
    assert windows(range(10), 4, 1, 99) == [([99, 0, 1, 2, 3], 1)]
    assert windows(range(7), 4, None, 99, 2) == [([99, 0, 1, 2, 3], 1), ([99, 2, 3, 4, 5], 3), ([99, 4, 5, 6], 3)]
    assert windows(range(6), 4, None, None, 2) == [([0, 1, 2, 3], 1), ([2, 3, 4, 5], 2)]
    with pytest.raises(InputError, match="--text has 10 tokens, fewer than one window of 11"):
        windows(range(10), 11, None, None)


def test_standard_errors_are_how_far_results_of_other_texts_lie_apart() -> None:
    """Windows that are alike within: tokens would claim a third of what is true."""
    rng = np.random.default_rng(0)
    texts = [[rng.normal(2, 0.5) + rng.normal(0, 1, 40) for _ in range(50)] for _ in range(400)]
    means = [float(np.concatenate(text).mean()) for text in texts]
    errors = [standard_error(text) or 0.0 for text in texts]
    assert np.mean(errors) == pytest.approx(np.std(means), rel=0.1) and standard_error(texts[0][:1]) is None
    easy = Score([Window(one + 0.1, one, np.full(40, 0.1), np.ones(40, bool)) for one in texts[0]])
    assert easy.ratio == pytest.approx(math.exp(0.1)) and easy.ratio_error == pytest.approx(0, abs=1e-9)
    assert easy.perplexity_error == pytest.approx(easy.perplexity * errors[0])


def test_what_cannot_be_a_number_is_none() -> None:
    found = Score([Window(np.full(3, math.inf)), Window(np.full(2, math.nan))]).to_dict()
    assert found["perplexity"] is None and found["tokens"] == 5 and json.loads(json.dumps(found)) == found


def test_variants(tmp_path: Path) -> None:
    config = EngineConfig(dtype="float32")
    directory = tmp_path / "a@b=c"
    directory.mkdir()
    plain = read_variant(str(directory), config).located()
    assert plain.config.model == str(directory) and plain.options == {} and plain.label == "a@b=c"
    own = read_variant(
        f"{directory}@lm-head-dtype=int4,kv_cache_dtype=fp8,reference_ops=true,threads=2,cpu_offload_gb=.5", config
    ).located()
    expected = {"lm_head_dtype": "int4", "kv_cache_dtype": "fp8", "reference_ops": True, "threads": 2, "cpu_offload_gb": 0.5}
    assert own.options == expected
    assert (own.config.dtype, own.config.threads, own.config.tokenizer) == ("float32", 2, str(directory))
    assert labels([plain, own]) == ["a@b=c", own.text.removeprefix(f"{tmp_path}/")]
    assert labels([plain, plain]) == [str(directory), str(directory)]
    for wrong, words in (
        ("lm_head=int4", "'lm_head' is no option that a model can have for itself"),
        ("dtype=float32,model=x", "'model' is no option"),
        ("block_size=16,block-size=32", "block_size stands there twice"),
        ("max_num_batched_tokens=many", "max_num_batched_tokens is 'many': a number is needed"),
        ("reference_ops=1", "reference_ops is '1': true or false is needed"),
    ):
        with pytest.raises(InputError, match=re.escape(words)):
            read_variant(f"{directory}@{wrong}", config)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, questions = tmp_path / "text.txt", tmp_path / "questions.jsonl"
    text.write_text("What is 7 plus 5? The answer is 12. " * 30)
    lines = (demo_model() / "heldout.jsonl").read_text().splitlines()[:12]
    questions.write_text("\n".join(lines))
    demo = str(demo_model())
    flags = ["--lm-head-dtype", "model", "--kv-cache-memory-bytes", "8M", "--max-num-seqs", "16", "--threads", "1"]
    command = ["eval", demo, "--text", str(text), "--length", "64", "--questions", str(questions), *flags]
    assert cli.run([*command, "--base", demo, "--json", "--no-speed"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert found["exact_match"] >= 0.9 and found["questions"] == 12 and found["quantization"] == "awq"
    assert found["perplexity"] > 1 and abs(found["kl"]) < 1e-5 and found["top1_agreement"] == 1.0 and found["weights_bytes"] > 1e6
    for wrong, words in (
        (["eval", demo], "nothing to measure: give --text FILE, --questions FILE, or both"),
        (["eval", demo, "--text", str(text), "--length", "1"], "--length is 1"),
        (["eval", demo, "--text", "nowhere.txt"], "nowhere.txt: No such file"),
        (["eval", demo, "--questions", str(questions), "--base", demo], "give --text FILE, too"),
        (["eval", demo, "--text", str(text), "--length", "9999999"], "--length is 9999999, but the models have room for"),
        (["eval", demo, "--text", str(text), "--length", "64", "--stride", "65"], "--stride is 65: windows of --length 64"),
        (["eval", demo, "--text", str(text), "--plot", "a.png"], "pictures are SVG"),
        (["eval", demo, "--text", str(text), "--plot", f"{tmp_path}/no/a.svg"], "there is no directory"),
        (["eval", demo, "--text", str(text), "--batch-size", "0"], "--batch-size is 0"),
        (["eval", demo, "--text", str(text), "--input-len", "9999999"], "--input-len 9999999"),
        (["eval", demo, f"{demo}@lm_head_dtype=int3", "--text", str(text)], "int3"),
    ):
        assert cli.run(wrong) == 2
        assert words in capsys.readouterr().err
    questions.write_text('{"question": "a"}')
    with pytest.raises(InputError, match=r'line 1: JSON with "question" and "answer" is needed'):
        read_questions(str(questions))


def test_one_model_beside_itself(model: Path, small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Head, cache and method cost what they cost: bytes by arithmetic, quality in the order of bits, and a picture of it all."""
    text, drawn = tmp_path / "text.txt", tmp_path / "drawn.svg"
    text.write_text("".join(map(chr, np.random.default_rng(0).integers(97, 122, 300))))
    variants = [str(small), f"{small}@lm_head_dtype=int8", f"{small}@lm_head_dtype=int4,kv_cache_dtype=int4", str(model)]
    flags = ["--dtype", "float32", "--threads", "1", "--length", "32", "--input-len", "12", "--output-len", "6", "--batch-size"]
    command = ["eval", *variants, "--base", str(model), "--text", str(text), *flags, "1", "3"]
    assert cli.run([*command, "--json", "--plot", str(drawn)]) == 0
    rows = json.loads(capsys.readouterr().out)
    tails = ["small", "small@lm_head_dtype=int8", "small@lm_head_dtype=int4,kv_cache_dtype=int4", "model"]
    assert [row["label"] for row in rows] == tails
    own, int8, int4, dense = rows
    assert dense["kl"] == pytest.approx(0, abs=1e-6) and own["kl"] < int4["kl"] and own["ratio_error"] > 0
    assert own["base_perplexity"] == pytest.approx(dense["perplexity"], rel=1e-6)
    # AWQ's packing of rtn: 4 bits, and 16 + 4 for 32 of them; the dense model's file is in float32
    assert own["bits_per_linear_weight"] == pytest.approx(4 + 20 / 32) and dense["bits_per_linear_weight"] == 32
    linears = 3 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 128 * 64)
    assert own["parameters"] == linears + 2 * VOCAB * 64 + 7 * 64
    assert own["file_bytes"] == sum(info.nbytes for info in Checkpoint.open(small).index.tensors.values())
    assert own["head_bytes"] >= own["embedding_bytes"] == 4 * VOCAB * 64 > int8["head_bytes"] > int4["head_bytes"]
    assert own["weights_bytes"] - int8["weights_bytes"] == own["head_bytes"] - int8["head_bytes"]
    for row in rows:
        assert row["prefill_tokens_per_s"] > 0 and set(row["decode_tokens_per_s"]) == {"1", "3"}
        assert min(row["decode_tokens_per_s"].values()) > 0 and (row["input_len"], row["output_len"]) == (12, 6)
    words = "".join(ElementTree.parse(drawn).getroot().itertext())
    assert all(row["label"][:30] in words for row in rows) and "1 sequence decoding" in words
    assert cli.run([*command, "--no-speed"][: len(command) - 2] + ["2", "--no-speed"]) == 0
    told = capsys.readouterr().out
    assert "KL from base" in told and "4.62" in told and "a second" not in told and f"{own['perplexity']:.3f} ±" in told


def test_prompts_by_which_speed_is_measured_fit_into_short_contexts() -> None:
    from types import SimpleNamespace

    asked = SimpleNamespace(speed=True, batch_size=(1, 8), input_len=None, output_len=None)
    assert _requests(asked, 4096) == ((8, 640), 128) and _requests(asked, 256) == ((8, 256), 64)  # type: ignore[arg-type]


def boxes(drawn: str) -> list[tuple[float, float, float, float]]:
    """Where the names stand: (left, top, right, bottom) at 6.4 pixels a letter."""
    found = []
    for group in ElementTree.fromstring(drawn).iter("{http://www.w3.org/2000/svg}g"):
        for text in group.findall("{http://www.w3.org/2000/svg}text"):
            x, y = float(text.attrib["x"]), float(text.attrib["y"])
            found.append((x, y - 11, x + 6.4 * len(text.text or ""), y + 4))
    return found


@pytest.mark.parametrize("speed", [True, False])
def test_names_in_the_picture_cover_nothing(speed: bool) -> None:
    rng = np.random.default_rng(3)
    rows = [
        {"label": f"model-{k}-{'x' * (k * 3)}", "weights_bytes": 4e9 + rng.random() * 1e7, "kl": 0.05 + rng.random() / 1e3}
        | ({"decode_tokens_per_s": {"4": 30 + rng.random()}} if speed else {})
        for k in range(14)
    ]
    drawn = picture(
        [*rows, {"label": "base", "weights_bytes": 16e9, "kl": 0.0}, {"label": "absent", "weights_bytes": 1, "kl": None}]
    )
    placed = boxes(drawn)
    assert len(placed) == 15 and "absent" not in drawn and ("4 sequences decoding" in drawn) == speed
    width, height = (float(ElementTree.fromstring(drawn).attrib[name]) for name in ("width", "height"))
    for k, (left, top, right, bottom) in enumerate(placed):
        assert left > 480 and right < min(width, 776) and top > 60 and bottom < height - 40
        assert all(bottom <= other[1] or top >= other[3] for other in placed[k + 1 :])
    for shape in ElementTree.fromstring(drawn).iter("{http://www.w3.org/2000/svg}path"):
        x, y = map(float, re.findall(r"[-0-9.]+", shape.attrib["transform"]))
        assert 0 < x < width and 0 < y < height


def test_spread_moves_no_more_than_it_must() -> None:
    assert spread([10, 50, 90], 10, 0, 100) == [10, 50, 90]
    assert spread([50, 50, 90], 10, 0, 100) == [45, 55, 90]
    assert spread([2, 1], 10, 0, 100) == [15, 5] and spread([99, 98, 97], 10, 0, 100) == [95, 85, 75]
