"""Embedding and head in codes: as they are made, as others are told of them, as they are loaded and planned."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from appliance.quantize import ends
from appliance.quantize.job import Job
from appliance.quantize.options import Options
from kernels.cpu import backend
from kernels.ops import get_ops
from models.loader import load_model
from models.spec import ModelSpec
from quant.algorithms.gptq import gptq
from quant.algorithms.grid import Grid, round_to_nearest
from quant.checkpoint import Checkpoint
from quant.errors import InputError
from quant.publish import EMBEDDING, HEAD
from tests.memory.test_planner import compare
from tests.models.test_against_transformers import feed
from tests.models.test_loader import dense_tensors, write_dense

IDS = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5])
SAMPLES = torch.randint(0, 51, (4, 32), generator=torch.Generator().manual_seed(0))
OPTIONS: dict[str, Any] = {
    "method": "rtn",
    "group_size": 16,
    "format": "compressed-tensors",
    "calibration_samples": 4,
    "calibration_length": 32,
}


def quantized(folder: Path, **options: Any) -> Path:
    """A model of 51 tokens, or whatever ``vocab`` says, quantized."""
    model = {key: options.pop(key) for key in ("tie_word_embeddings", "vocab_size") if key in options}
    source = write_dense(folder / "dense", torch_dtype="bfloat16", **{"vocab_size": 51, **model})
    chosen = Options(**{**OPTIONS, **options}).checked()
    Job(source, folder / "made", chosen, SAMPLES % model.get("vocab_size", 51) if chosen.calibrated else None).run()
    return folder / "made"


def read(folder: Path, name: str) -> Tensor:
    with Checkpoint.open(folder) as checkpoint:
        weight = checkpoint.weight(name)
        if isinstance(weight, Tensor):
            return weight
        # Products are of weights rounded to the type of their scales; rows that are looked up are rounded once, at last.
        return weight.dequantize(torch.float32 if name == EMBEDDING else weight.scales.dtype).float()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("head", "embedding"), [(4, 8), (8, 4), (16, 8), (4, 16)])
def test_tables_are_near_what_they_were(tmp_path: Path, head: int, embedding: int, tied: bool) -> None:
    """Half a step at most, and what bfloat16 scales are off; a tied model gets two tables and says so."""
    made = quantized(tmp_path, lm_head_bits=head, embedding_bits=embedding, sym=True, tie_word_embeddings=tied)
    config = json.loads((made / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    before = dense_tensors({**config, "tie_word_embeddings": tied})
    for name, bits, group in ((HEAD, head, 16), (EMBEDDING, embedding, 32)):
        weight, found = before[f"{EMBEDDING if tied else name}.weight"], read(made, name)
        if bits == 16:
            assert torch.equal(found, weight.bfloat16())
            continue
        parts = weight.unflatten(1, (-1, group))
        step = 2 * parts.abs().amax(2, keepdim=True) / (2**bits - 1)
        off = (found - weight).abs().unflatten(1, (-1, group))
        assert bool((off <= step * (0.51 + 2 ** (bits - 1) * 2**-7)).all()) and float(off.max()) > 0


@pytest.mark.parametrize("kind", ["reference", "torch", "native"])
@pytest.mark.parametrize(("head", "embedding", "vocab"), [(4, 4, 51), (8, 8, 70), (16, 4, 51)])
def test_they_are_loaded_and_planned_to_the_byte(
    tmp_path: Path, kind: str, head: int, embedding: int, vocab: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits are those of the same numbers in float32."""
    if kind == "native" and backend.native() is None:
        pytest.skip("the native extension is not built")
    monkeypatch.setenv("APPLIANCE_CPU_ISA", "auto" if kind == "native" else "torch")
    made = quantized(tmp_path, lm_head_bits=head, embedding_bits=embedding, vocab_size=vocab)
    plan = compare(made, kind, lm_head_dtype="model")
    assert plan.embedding == f"{embedding} bits as published" and f"embedding in {plan.embedding}" in plan.table()
    with Checkpoint.open(made) as checkpoint:
        spec = ModelSpec.from_config(checkpoint.config)
        names = [module.name for module in spec.modules()] + [name for name, _ in spec.small_tensors()]
        options: dict[str, Any] = {"dtype": torch.float32, "max_len": 64, "lm_head_dtype": "model"}
        decoder = load_model(checkpoint, spec, get_ops("cpu", reference=kind == "reference", threads=1), **options)
        assert not isinstance(decoder.embedding, Tensor) and not decoder.tied
        dense = {f"{n}.weight" if n in {m.name for m in spec.modules()} else n: checkpoint for n in names}
    tensors = {name: read(made, name.removesuffix(".weight")) if "norm" not in name else plain(made, name) for name in dense}
    config = {"vocab_size": vocab, "torch_dtype": "float32"}
    folder = write_dense(tmp_path / "same", {name: tensor.float().contiguous() for name, tensor in tensors.items()}, **config)
    with Checkpoint.open(folder) as checkpoint:
        expected = load_model(checkpoint, spec, get_ops("cpu", reference=True), **options)
    assert (feed(decoder, IDS, [len(IDS)]) - feed(expected, IDS, [len(IDS)])).abs().max() < 1e-2


def plain(folder: Path, name: str) -> Tensor:
    with Checkpoint.open(folder) as checkpoint:
        return checkpoint.tensor(name)


@pytest.mark.parametrize("tables", [{}, {"tie_word_embeddings": True}])
def test_a_single_table_in_codes_serves_both(tmp_path: Path, tables: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """As others may write it: a tied model with one table in codes. Where operators cannot share it, it is there twice."""
    made = quantized(tmp_path, embedding_bits=8)
    config = json.loads((made / "config.json").read_text())
    (made / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    index = json.loads((made / "model.safetensors.index.json").read_text())
    drop(made, index, "lm_head.weight")
    for isa in ("torch", "auto"):
        monkeypatch.setenv("APPLIANCE_CPU_ISA", isa)
        plan = compare(made, "any")
        assert (plan.weights["head"] == 0) == (isa == "auto" and backend.native() is not None)


def drop(made: Path, index: dict[str, Any], name: str) -> None:
    from safetensors.torch import load_file, save_file

    file = made / index["weight_map"].pop(name)
    save_file({key: tensor for key, tensor in load_file(file).items() if key != name}, file)
    (made / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(("method", "form"), [("gptq", "gptq"), ("gptq", "compressed-tensors"), ("awq", "compressed-tensors")])
def test_a_head_of_4_bits_is_made_by_the_method(tmp_path: Path, method: str, form: str) -> None:
    """What it makes of what the model really gives it is nearer than rounding; an interrupted job ends with the same bytes."""
    options: dict[str, Any] = {
        "method": method,
        "format": form,
        "lm_head_bits": 4,
        "sym": True,
        "vocab_size": 64,
        "act_order": False,
    }
    made = quantized(tmp_path, **options)
    with Checkpoint.open(made) as checkpoint:
        spec = ModelSpec.from_config(checkpoint.config)
        decoder = load_model(checkpoint, spec, get_ops("cpu", reference=True), dtype=torch.float32, max_len=64)
    x = torch.cat([hidden(decoder, ids) for ids in SAMPLES % 64])
    before = plain(tmp_path / "dense", "lm_head.weight").bfloat16().float()
    plainly = round_to_nearest(before, Grid(4, 16, True, torch.bfloat16)).dequantize()
    assert (x @ (read(made, HEAD) - before).t()).square().mean() < 0.97 * (x @ (plainly - before).t()).square().mean()

    source, whole = tmp_path / "dense", made.rename(tmp_path / "whole")
    job = Job(
        source, made, Options(**{**OPTIONS, **{k: v for k, v in options.items() if k != "vocab_size"}}).checked(), SAMPLES % 64
    )
    with pytest.raises(KeyboardInterrupt):
        job.run(interrupt)
    Job(source, made, job.options, job.ids).run()
    for file in whole.glob("*.safetensors"):
        assert file.read_bytes() == (made / file.name).read_bytes(), file.name


def interrupt(done: float) -> None:
    if done >= 2:
        raise KeyboardInterrupt


def hidden(decoder: Any, ids: Tensor) -> Tensor:
    """What the head reads, by asking for all logits of a head that is the identity."""
    eye = decoder.ops.pack(torch.eye(decoder.spec.hidden), dtype=torch.float32)
    spec = replace(decoder.spec, vocab=decoder.spec.hidden)
    return feed(replace(decoder, head=eye, spec=spec), ids, [len(ids)])


@pytest.mark.parametrize("act_order", [False, True])
def test_slabs_change_nothing(act_order: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    table, x = torch.randn(70, 64).bfloat16(), torch.randn(200, 64) * torch.rand(64)
    grid = Grid(4, 32, False, torch.bfloat16)
    monkeypatch.setattr(ends, "SLAB", 64 * 9)
    for make in (
        lambda rows: round_to_nearest(rows, grid),
        lambda rows: gptq(rows, x.t() @ x / 200, grid, act_order=act_order).weight,
    ):
        found, whole = ends.by_slabs("it", table, make), make(table.float())
        assert torch.equal(found.dequantize(), whole.dequantize())
        assert torch.equal(found.scales, whole.scales) and torch.equal(found.zeros, whole.zeros)
    table[50, 3] = torch.nan
    with pytest.raises(InputError, match="it: some of its values are not finite"):
        ends.by_slabs("it", table, make)


def test_refusals(tmp_path: Path) -> None:
    for options, words in (
        ({"lm_head_bits": 5}, "--lm-head-bits is 5: 4, 8, or 16"),
        ({"embedding_bits": 2}, "--embedding-bits is 2: 4, 8, or 16"),
        ({"format": "awq", "lm_head_bits": 8}, "AutoAWQ reads no quantized head; take --format compressed-tensors, or gptq"),
        ({"method": "gptq", "format": "gptq", "embedding_bits": 8}, "reads the format gptq knows no quantized embedding"),
        ({"static_groups": False}, "--no-static-groups says how groups are made with --act-order"),
        ({"method": "gptq", "act_order": True, "static_groups": False}, "--no-static-groups: compressed-tensors has given up"),
    ):
        with pytest.raises(InputError, match=words):
            Options(**{**OPTIONS, **options}).checked()
    assert Options(embedding_bits=8).checked().format == "compressed-tensors"
    assert Options(method="gptq", lm_head_bits=8).checked().format == "gptq"
    source = write_dense(tmp_path / "dense", torch_dtype="bfloat16", vocab_size=51)
    with pytest.raises(InputError, match="lm_head is 51 x 32: the format gptq needs multiples of 8"):
        chosen = Options(**{**OPTIONS, "format": "gptq", "sym": True, "lm_head_bits": 4}).checked()
        Job(source, tmp_path / "made", chosen, None)


def test_a_head_with_zero_points_has_whole_words(tmp_path: Path) -> None:
    """vLLM cuts the words in which zero points are packed by the vocabulary, so 51 tokens have none."""
    for vocab, symmetric in ((51, True), (64, False)):
        made = quantized(tmp_path / str(vocab), lm_head_bits=4, vocab_size=vocab, sym=False)
        groups = json.loads((made / "config.json").read_text())["quantization_config"]["config_groups"].values()
        head = next(group for group in groups if any("lm_head" in target for target in group["targets"]))
        assert head["weights"]["symmetric"] == symmetric and groups
