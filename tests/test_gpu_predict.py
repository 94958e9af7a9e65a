"""Predictions for a card: the arithmetic, the document that is committed, and the column of measured shares."""

from __future__ import annotations

import importlib
import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))
predict = importlib.import_module("gpu_predict")


def test_the_document_is_the_scripts() -> None:
    """Else run scripts/gpu_predict.py, with the report that the document names."""
    text = predict.DOCUMENT.read_text()
    source = re.search(r"^Measured shares: those of `(.+?)`", text, re.MULTILINE)
    assert predict.document(ROOT / source[1] if source else None) == text


def test_bytes_and_operations() -> None:
    """Of a 7B model, from its published shapes: 4.25 bits a weight, the head in int8, 6.48 * 10^9 weights in the layers."""
    model = predict.Model("Llama-2-7B")
    layers = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    sizes = {slot: sum(n for name, n, _ in model.weights if name == slot) for slot in predict.TARGETS}
    assert sum(n for slot, n in sizes.items() if slot != "head") == pytest.approx(layers * 4.25 / 8)
    assert sizes["head"] == pytest.approx(32000 * 4096, rel=0.01)
    assert model.prefill_ops(1) == (2 * layers, 4 * 32 * 128 * 32)
    assert model.plan.kv.token_bytes == 2 * 32 * 4096 * 2 and model.plan.total <= 0.92 * predict.CARD.total


def test_caches() -> None:
    """Of 28 layers with 4 heads of 128: a code and four bytes of scale for each, twice; what that saves is room for tokens."""
    plain, int8, int4 = (predict.Model("Qwen2.5-7B", kind).plan for kind in ("auto", "int8", "int4"))
    assert [plan.kv.token_bytes for plan in (plain, int8, int4)] == [2 * 28 * 4 * size for size in (256, 132, 68)]
    assert int4.tokens * 68 == pytest.approx(plain.tokens * 256, rel=0.02) and int8.tokens * 132 < 1.02 * plain.tokens * 256
    table = predict.caches_table([predict.Model("Qwen2.5-7B")])
    assert re.search(rf"\| int4 \| 15 \| {int4.tokens} \|.*\| {1e3 * 8 * 2048 * int4.kv.token_bytes / 1008e9:.2f} \|", table)


def test_steps() -> None:
    model = predict.Model("Qwen2.5-7B")
    weights, cached = sum(n for _, n, _ in model.weights), 2048 * model.plan.kv.token_bytes
    assert model.decode_s(1, 2048, None) == pytest.approx((weights + cached) / 1008e9)
    every = {name: {32: 0.5} for name in predict.TARGETS}
    launches = (10 * 28 + 8) * 1e-6
    assert model.decode_s(1, 2048, every) == pytest.approx(2 * model.decode_s(1, 2048, None) + launches)
    low, best = (model.decode_s(8, 2048, predict.TARGETS, caution=c) for c in (predict.CAUTION, 1.0))
    assert model.decode_s(8, 2048, None) < best < low
    # So many rows that arithmetic takes longer than reading the weights.
    assert model.decode_s(1000, 0, None) == pytest.approx(sum(2000 * w.module.N * w.module.K for *_, w in model.weights) / 165e12)


def test_measured(tmp_path: Path) -> None:
    rows = [
        {"op": "w4a16", "shape": slot, "rows": m, "dtype": "float16", "bytes": 100, "ours_s": 1 / share}
        for slot in ("qkv", "o", "gate_up", "down", "head")
        for m, share in ((1, 0.5), (32, 0.25))
    ]
    for op, seconds in (("decode attention, cache 16 bits", 2.5), ("decode attention, cache 16 bits", 2.0), ("w4a8", 9.0)):
        rows.append({"op": op, "shape": "qkv", "context": 4096, "rows": 32, "dtype": "float16", "bytes": 100, "ours_s": seconds})
    report = {"machine": {"card": "Some Card"}, "limits": {"copy": 100.0}, "kernels": rows}
    path = tmp_path / "report.json"
    path.write_text(json.dumps(report))
    shares = predict.measured_shares(report)
    assert shares["qkv"] == {1: 0.5, 32: 0.25} and shares["decode attention"] == {32: pytest.approx(0.4)}
    assert [predict.at_rows(shares["o"], n) for n in (1, 2, 32, 64)] == [0.5, 0.25, 0.25, 0.25]
    text = predict.document(path)
    assert "those of `report.json` (Some Card)" in text and "| qkv | 16 | 80 % | 64 % | 25 % |" in text
    row = re.search(r"^\| Qwen2.5-7B \| 2048 \| 1 \|.*\| (\d+) \|$", text, re.MULTILINE)
    assert row is not None and int(row[1]) < 244 / 2
    report["kernels"] = [row for row in rows if "attention" not in row["op"]]
    path.write_text(json.dumps(report))
    with pytest.raises(SystemExit, match="decode attention"):
        predict.document(path)
