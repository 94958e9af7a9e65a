"""Damaged, incomplete and contradictory directories: each says what is wrong with which file."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from quant.errors import CheckpointError, InputError
from quant.headers import INDEX, CheckpointIndex, read_json


def write(path: Path, *names: str) -> None:
    save_file({name: torch.ones(4, 4) for name in names}, path)


def raw(path: Path, header: object, data: bytes = b"") -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def refuses(directory: Path, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        CheckpointIndex.open(directory)


def test_single_file_wins_over_a_stale_index(tmp_path: Path) -> None:
    write(tmp_path / "model.safetensors", "a")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"b": "gone.safetensors"}}))
    assert set(CheckpointIndex.open(tmp_path).tensors) == {"a"}


def test_shards(tmp_path: Path) -> None:
    write(tmp_path / "one.safetensors", "a", "b")
    write(tmp_path / "two.safetensors", "c")
    weight_map = {"a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors"}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    index = CheckpointIndex.open(tmp_path)
    assert set(index.tensors) == {"a", "b", "c"} and index.total_bytes == 3 * 64
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {**weight_map, "d": "two.safetensors"}}))
    refuses(tmp_path, "d should be in two.safetensors, but no file has it")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {**weight_map, "b": "two.safetensors"}}))
    refuses(tmp_path, "b should be in two.safetensors, but it is in one.safetensors")
    (tmp_path / "two.safetensors").unlink()
    refuses(tmp_path, "1 of 2 files are missing: two.safetensors")
    write(tmp_path / "two.safetensors", "c", "a")
    refuses(tmp_path, "a is in two files, one.safetensors and two.safetensors: remove the stale one|should be in")
    (tmp_path / INDEX).write_text("{}")
    refuses(tmp_path, "the index has no weight_map")
    (tmp_path / INDEX).write_text("{]")
    refuses(tmp_path, "index.json: not valid JSON")


def test_tensors_that_share_bytes(tmp_path: Path) -> None:
    one, other = ({"dtype": "U8", "shape": [4], "data_offsets": [at, at + 4]} for at in (0, 3))
    empty = {"dtype": "U8", "shape": [0], "data_offsets": [2, 2]}
    raw(tmp_path / "model.safetensors", {"a": one, "none": empty, "b": other}, bytes(7))
    refuses(tmp_path, "damaged safetensors header: a and b share bytes")


@pytest.mark.parametrize("header", [b"[" * 100_000, b'{"a":' * 100_000])
def test_headers_too_deep(tmp_path: Path, header: bytes) -> None:
    raw(tmp_path / "model.safetensors", header)
    refuses(tmp_path, "the safetensors header is not valid JSON")


def test_numbers_beyond_all_measure(tmp_path: Path) -> None:
    raw(tmp_path / "model.safetensors", b'{"a": {"dtype": "U8", "shape": [1e999], "data_offsets": [0, 1]}}', bytes(1))
    refuses(tmp_path, "damaged safetensors header: the entry of a reads")


@pytest.mark.parametrize("old", [True, False])
def test_the_text_part_of_a_model_that_reads_pictures(tmp_path: Path, old: bool) -> None:
    """Under the names that transformers wrote before 4.52, and since."""
    layers, rest = ("language_model.model.", "") if old else ("model.language_model.", "model.")
    head = "language_model.lm_head.weight" if old else "lm_head.weight"
    beside = f"{rest}vision_tower.layers.0.weight", f"{rest}multi_modal_projector.weight"
    write(tmp_path / "model.safetensors", f"{layers}layers.0.weight", f"{layers}norm.weight", head, *beside, "other")
    index = CheckpointIndex.open(tmp_path)
    assert set(index.tensors) == {"model.layers.0.weight", "model.norm.weight", "lm_head.weight", "other"}
    assert index.beside_text == 2 and index.total_bytes == 4 * 64
    write(tmp_path / "model.safetensors", f"{layers}norm.weight", f"{rest}visual.patch_embed.weight", "lm_head.weight")
    assert set(CheckpointIndex.open(tmp_path).tensors) == {"model.norm.weight", "lm_head.weight"}
    write(tmp_path / "model.safetensors", "visual.merger.weight", "model.norm.weight")  # Qwen2.5-VL as it was published
    assert set(CheckpointIndex.open(tmp_path).tensors) == {"model.norm.weight"}
    shared = "model.layers.0.shared_mlp"
    write(tmp_path / "model.safetensors", f"{shared}.input_linear.weight", f"{shared}.output_linear.qweight")  # Granite 4
    assert set(CheckpointIndex.open(tmp_path).tensors) == {
        f"model.layers.0.mlp.{n}" for n in ("gate_up_proj.weight", "down_proj.qweight")
    }
    write(tmp_path / "model.safetensors", "vision_tower.weight", "model.norm.weight")
    assert set(CheckpointIndex.open(tmp_path).tensors) == {"vision_tower.weight", "model.norm.weight"}


def test_old_names(tmp_path: Path) -> None:
    write(tmp_path / "gptq_model-4bit-128g.safetensors", "a")
    assert set(CheckpointIndex.open(tmp_path).tensors) == {"a"}


def test_numbered_shards_without_an_index(tmp_path: Path) -> None:
    for n in (1, 3):
        write(tmp_path / f"model-{n:05d}-of-00003.safetensors", f"t{n}")
    refuses(tmp_path, "of 3 files like model-00001-of-00003.safetensors, these numbers are missing: 2")
    write(tmp_path / "model-00002-of-00003.safetensors", "t2")
    assert set(CheckpointIndex.open(tmp_path).tensors) == {"t1", "t2", "t3"}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (None, r"no \*.safetensors file; a model is a directory with config.json and \*.safetensors"),
        ("model.gguf", r"no \*.safetensors file, only model.gguf. GGUF is not supported: take the AWQ, GPTQ or original"),
        ("pytorch_model.bin", "only pytorch_model.bin. PyTorch pickles are not loaded, since they can run code: convert"),
        ("awq.pt", "only awq.pt. PyTorch pickles are not loaded"),
        (
            "model.safetensors.incomplete",
            "only model.safetensors.incomplete. The download is not finished: run its command again",
        ),
        (".cache/huggingface/download/a1.incomplete", "only a1.incomplete. The download is not finished"),
    ],
)
def test_no_safetensors(tmp_path: Path, name: str | None, message: str) -> None:
    if name:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    refuses(tmp_path, message)


def test_an_adapter_is_no_model(tmp_path: Path) -> None:
    write(tmp_path / "adapter_model.safetensors", "base_model.model.lm_head.lora_A.weight")
    (tmp_path / "adapter_config.json").write_text("{}")
    refuses(tmp_path, r"an adapter \(adapter_config.json\), no model: serve its model with --lora-modules NAME=ADAPTER")
    (tmp_path / "config.json").write_text("{}")  # a model that keeps what it was made with
    assert CheckpointIndex.open(tmp_path).tensors


def test_no_directory(tmp_path: Path) -> None:
    refuses(tmp_path / "nowhere", "nowhere: no such directory; a model is a directory with")


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        (b"{]", b"", "the safetensors header is not valid JSON"),
        (b"[1]", b"", "the safetensors header is not a JSON object"),
        (
            {"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}},
            b"x" * 15,
            r"truncated: a ends at byte \d+, the file has",
        ),
        ({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 12]}}, b"x" * 16, r"a is F32\[4\] but spans 12 bytes"),
        ({"a": {"dtype": "F32", "shape": [4], "data_offsets": [16, 0]}}, b"x" * 16, r"a has shape \[4\] at offsets \[16, 0\]"),
        ({"a": {"dtype": "F32", "shape": [4]}}, b"x" * 16, "the entry of a reads"),
        ({"a": 3}, b"", "the entry of a reads 3"),
    ],
)
def test_damaged_headers(tmp_path: Path, header: object, data: bytes, message: str) -> None:
    raw(tmp_path / "model.safetensors", header, data)
    refuses(tmp_path, message)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a safetensors file"),
        (b"abc", "not a safetensors file"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
            "a git-lfs pointer of 63 bytes, not the file itself",
        ),
        (
            struct.pack("<Q", 2**60) + b"{}",
            "not a safetensors file: its header would have 1152921504606846976 bytes, the file has 10",
        ),
        (struct.pack("<Q", 0), "not a safetensors file"),
        (struct.pack("<Q", 500) + b"{}", "truncated: the header ends at byte 508, the file has 10; fetch it again"),
    ],
)
def test_no_header(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    refuses(tmp_path, message)


def test_truncation_anywhere_is_seen(tmp_path: Path) -> None:
    write(tmp_path / "model.safetensors", "a", "b")
    whole = (tmp_path / "model.safetensors").read_bytes()
    for size in range(0, len(whole), 7):
        (tmp_path / "model.safetensors").write_bytes(whole[:size])
        refuses(tmp_path, "truncated|not a safetensors file")


def test_unknown_dtypes_are_listed(tmp_path: Path) -> None:
    """A tensor of a dtype from the future is no reason to refuse the others."""
    raw(tmp_path / "model.safetensors", {"a": {"dtype": "F4", "shape": [3], "data_offsets": [0, 2]}}, b"xx")
    assert CheckpointIndex.open(tmp_path).tensors["a"].nbytes == 2


def test_read_json(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with pytest.raises(CheckpointError, match=r"config.json: the file is missing"):
        read_json(path)
    for content, message in (("{", "not valid JSON"), ("[]", "expected a JSON object, found list"), ("\udcff", "not valid JSON")):
        path.write_bytes(content.encode("utf-8", "surrogateescape"))
        with pytest.raises(InputError, match=message):
            read_json(path)


def test_no_torch_is_needed() -> None:
    code = "import sys, quant.headers, quant.scheme, quant.errors; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=False).returncode == 0
