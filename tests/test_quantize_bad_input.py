"""Bad input to `appliance quantize`, as users give it: exit code 2, one line that says what is wrong, nothing that looks done."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from appliance import cli
from appliance.quantize import shards
from tests.quantizing import make

TEXTS = {
    "good.txt": b"it was a dark and stormy night; " * 100,
    "short.txt": b"it was",
    "empty.txt": b"",
    "latin.txt": b"it was caf\xe9 noir " * 100,
    "fields.jsonl": b'{"text": "a"}\n{"prompt": "b"}\n',
    "broken.jsonl": b'{"text": "a"\n',
    "number.jsonl": b'{"text": 5}\n',
}
Tensors = dict[str, Tensor]
UP, NORM = "model.layers.1.mlp.up_proj", "model.layers.0.input_layernorm.weight"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("input")
    make(folder / "model", num_hidden_layers=2)
    for name, text in TEXTS.items():
        (folder / name).write_bytes(text)
    (folder / "void").mkdir()
    return folder


def command(folder: Path, output: Path | str, flags: str = "", model: str = "model", text: str = "good.txt") -> list[str]:
    given = flags.split()
    for flag, value in (("--group-size", "16"), ("--calibration-samples", "6"), ("--calibration-length", "40")):
        given += [] if flag in given else [flag, value]
    return [
        "quantize",
        str(folder / model),
        "--output",
        str(output),
        "--calibration",
        str(folder / text),
        "--threads",
        "1",
        *given,
    ]


def refused(argv: list[str], output: Path, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert cli.run(argv) == 2
    out, err = capsys.readouterr()
    lines = [line for line in err.replace("\r", "\n").split("\n") if line.strip() and "Quantizing" not in line]
    assert len(lines) == 1 and lines[0].startswith("appliance: error: ") and not out, (lines, out)
    assert (
        not (output / "config.json").exists() and not output.with_name(f"{output.name}.partial").joinpath("config.json").exists()
    )
    return lines[0]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"text": "short.txt"}, "has 6 tokens: 6 samples of 40 need at least 46 (better 240)"),
        ({"text": "empty.txt"}, "has 0 tokens"),
        ({"text": "nowhere.txt"}, "nowhere.txt: No such file"),
        ({"text": "void"}, "void: Is a directory"),
        ({"text": "latin.txt"}, "latin.txt: byte 10 (0xe9) is not UTF-8"),
        ({"text": "fields.jsonl"}, 'fields.jsonl, line 2: JSON with "text" or "messages" is needed'),
        ({"text": "broken.jsonl"}, "broken.jsonl, line 1: JSON"),
        ({"text": "number.jsonl"}, "number.jsonl, line 1: JSON"),
        ({"flags": "--group-size 48"}, "--group-size 48 does not divide the 64 inputs of self_attn.q_proj"),
        ({"flags": "--group-size 0"}, "--group-size is 0"),
        ({"flags": "--bits 5"}, "--bits is 5: the format compressed-tensors has 2, 3, 4, 8"),
        ({"flags": "--bits 3 --format awq"}, "--bits is 3: the format awq has 4"),
        ({"flags": "--method magic"}, "--method is 'magic'"),
        ({"flags": "--calibration-samples 0"}, "--calibration-samples is 0"),
        ({"flags": "--method gptq --damping nan"}, "--damping is nan"),
        ({"model": "nowhere"}, "no such directory"),
        ({"model": "void"}, "config.json: the file is missing"),
        ({"model": "good.txt"}, "is a file: name the directory"),
    ],
)
def test_what_was_asked_for(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: dict[str, Any], words: str
) -> None:
    output = tmp_path / "made"
    assert words in refused(command(folder, output, **more), output, capsys)
    assert not list(tmp_path.iterdir()), "nothing was begun"


def test_where_it_is_to_be(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted((path.name, path.stat().st_mtime_ns) for path in (folder / "model").iterdir())
    assert cli.run(command(folder, folder / "model")) == 2
    assert "model exists already: name another directory, or remove it" in capsys.readouterr().err
    assert sorted((path.name, path.stat().st_mtime_ns) for path in (folder / "model").iterdir()) == before
    assert "exists already" in refused(command(folder, folder / "good.txt"), folder / "good.txt", capsys)
    output = folder / "good.txt" / "made"
    assert "Not a directory" in refused(command(folder, output), output, capsys)
    made = tmp_path / "made"
    assert cli.run(command(folder, made, "--method rtn")) == 0
    (folder / "again").symlink_to(made)
    again = tmp_path / "again"
    assert "quantized already (awq): give the original model" in refused(command(folder, again, model="again"), again, capsys)


def test_a_place_that_cannot_be_written_to(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Path, *args: Any, **more: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", refuse)
        assert "made: Read-only file system" in refused(command(folder, tmp_path / "made"), tmp_path / "made", capsys)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("file", [1, 2, 3])
def test_a_disk_that_gets_full(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, file: int
) -> None:
    """What is done is kept; with room again, the same command ends what was begun."""
    save, written, argv = shards.save_file, [], command(folder, tmp_path / "made", "--method rtn")

    def fill(tensors: Tensors, path: Path, **more: Any) -> None:
        written.append(path)
        if len(written) == file:
            path.write_bytes(b"half a file")
            raise OSError(errno.ENOSPC, "No space left on device")
        save(tensors, path, **more)

    with monkeypatch.context() as patch:
        patch.setattr(shards, "save_file", fill)
        said = refused(argv, tmp_path / "made", capsys)
    assert "No space left on device; what is done is kept, and gone on with next time" in said
    assert len(list((tmp_path / "made.partial").glob("model-*"))) == file - 1
    assert cli.run(argv) == 0 and cli.run(command(folder, tmp_path / "whole", "--method rtn")) == 0
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "made" / path.name).read_bytes()


def put(name: str, value: Any) -> Callable[[Tensors], None]:
    """Change a tensor, or one value of it."""

    def change(tensors: Tensors) -> None:
        if isinstance(value, float):
            tensors[name].view(-1)[7] = value
        elif value is None:
            del tensors[name]
        else:
            tensors[name] = value

    return change


def enlarge(tensors: Tensors) -> None:
    for name in tensors:
        if "up_proj" in name or "gate_proj" in name:
            tensors[name] *= 1e25


@pytest.mark.parametrize(
    ("change", "methods", "words"),
    [
        (put(f"{UP}.weight", float("nan")), "rtn awq gptq", f"{UP}: some of its values are not finite"),
        (put(f"{UP}.weight", float("inf")), "awq", f"{UP}: some of its values are not finite"),
        (put(NORM, float("nan")), "gptq", f"{NORM}: some of its values are not finite"),
        (put("model.embed_tokens.weight", float("nan")), "awq", "model.embed_tokens.weight: some of its values are not"),
        (put("lm_head.weight", float("inf")), "rtn", "lm_head.weight: some of its values are not finite"),
        (enlarge, "rtn", "mlp.gate_proj.scales: some of its values are not finite numbers in float16; take another --format"),
        (enlarge, "awq gptq", "down_proj: its inputs hold numbers that are not finite: the calibration text drives"),
        (put(f"{UP}.weight", None), "rtn", f"{UP}: its weight is missing from"),
        (put(NORM, None), "rtn", f"{NORM}: the tensor is missing from"),
        (
            put("lm_head.weight", None),
            "rtn",
            "(if the model's head is its embedding, config.json needs tie_word_embeddings: true)",
        ),
        (put(f"{UP}.bias", torch.ones(128)), "rtn", f"1 tensors have no place in a LlamaForCausalLM: {UP}.bias"),
        (put(f"{UP}.weight", torch.zeros(7, 7)), "rtn", f"{UP}"),
        (put(f"{UP}.weight", torch.zeros(128, 64, dtype=torch.int8)), "rtn", f"{UP}"),
    ],
)
def test_damaged_models(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: Callable[[Tensors], None],
    methods: str,
    words: str,
) -> None:
    model = tmp_path / "model"
    shutil.copytree(folder / "model", model)
    tensors = load_file(model / "model.safetensors")
    change(tensors)
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    for method in methods.split():
        output = tmp_path / method
        assert words in refused(command(folder, output, f"--method {method}", model=str(model)), output, capsys), method


def test_other_architectures(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(folder / "model", tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"architectures": ["StableLmForCausalLM"]}))
    said = refused(command(folder, tmp_path / "made", model=str(tmp_path / "model")), tmp_path / "made", capsys)
    assert "architecture StableLmForCausalLM is not supported; supported are LlamaForCausalLM" in said


def test_without_a_tokenizer(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, made = tmp_path / "model", tmp_path / "made"
    shutil.copytree(folder / "model", model, ignore=shutil.ignore_patterns("tokenizer*"))
    said = refused(command(folder, made, "--method awq", model=str(model)), made, capsys)
    assert f"{model} has no tokenizer, and calibration needs it: put its files there, or take --method rtn" in said
    config = json.loads((model / "config.json").read_text())
    sparse = {"architectures": ["MixtralForCausalLM"], "num_local_experts": 4, "num_experts_per_tok": 2}
    (model / "config.json").write_text(json.dumps(config | sparse))
    said = refused(command(folder, made, "--method awq", model=str(model)), made, capsys)
    assert "MixtralForCausalLM is a mixture of experts, and this version quantizes none" in said


@pytest.mark.parametrize("what", ["constant", "dead", "zero"])
def test_inputs_that_say_little(folder: Path, tmp_path: Path, what: str) -> None:
    """A singular Hessian is made good: inputs that never change, some or all of them zero, and fewer of them than columns."""
    model = tmp_path / "model"
    shutil.copytree(folder / "model", model)
    tensors = load_file(model / "model.safetensors")
    if what == "constant":
        tensors["model.embed_tokens.weight"][:] = tensors["model.embed_tokens.weight"][5].clone()
    for name in tensors if what != "constant" else ():
        if "layernorm" in name:
            tensors[name][: 30 if what == "dead" else None] = 0
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    few = "--calibration-samples 1 --calibration-length 8"
    for method in ("awq", "gptq", "gptq --act-order"):
        output = tmp_path / method
        assert cli.run(command(folder, output, f"--method {method} {few}", model=str(model))) == 0
        made = [tensor for path in output.glob("*.safetensors") for tensor in load_file(path).values()]
        assert all(bool(torch.isfinite(tensor).all()) for tensor in made if tensor.is_floating_point())
