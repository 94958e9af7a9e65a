"""`appliance quantize`, killed (SIGKILL) wherever it may be: the same command goes on, and makes the same files to the byte."""

from __future__ import annotations

import fcntl
import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from appliance import cli
from appliance.quantize import shards
from appliance.quantize.calibration import default_text
from quant.algorithms.grid import Grid
from quant.checkpoint import Checkpoint
from quant.errors import InputError
from tests.quantizing import make

LAYERS = 4
METHODS = {
    "awq": ["--method", "awq"],
    "gptq": ["--method", "gptq", "--act-order"],
    "kv-scales": ["--method", "awq", "--kv-scales", "--format", "compressed-tensors"],
    "mixed": ["--method", "gptq", "--target-bits", "5.5", "--format", "compressed-tensors"],
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = make(tmp_path_factory.mktemp("dense") / "model", num_hidden_layers=LAYERS)
    text_beside(model).write_text(default_text()[:50_000])  # all of it takes longer than the rest of a command
    return model


def text_beside(model: Path) -> Path:
    return model.with_name("text.txt")


def command(model: Path, output: Path, more: Sequence[str]) -> list[str]:
    text = [
        "--calibration",
        str(text_beside(model)),
        "--calibration-samples",
        "6",
        "--calibration-length",
        "48",
        "--group-size",
        "16",
        "--threads",
        "1",
    ]
    return ["quantize", str(model), "--output", str(output), *text, *more]


def digests(directory: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.iterdir()}


def unfinished(output: Path) -> Path:
    """What there is of it: nothing that looks whole."""
    half = output.with_name(f"{output.name}.partial")
    assert not output.exists() and not (half / "config.json").exists()
    with pytest.raises(InputError):
        Checkpoint.open(half)
    return half


def killed(argv: list[str], prepare: Callable[[], None]) -> None:
    """Run the command in a process of its own that ``prepare`` sees to be killed."""
    child = os.fork()
    if child == 0:
        try:
            prepare()
            cli.run(argv)
        finally:
            os._exit(0)  # not killed: the test fails
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, status


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fitting(calls: list[None], last: int | None) -> Callable[..., Any]:
    """Grid.fit, whose calls are counted: several for each module. Within the ``last`` one the process is killed."""
    fit = Grid.fit

    def count(self: Grid, *args: Any) -> Any:
        calls.append(None)
        if len(calls) == last:
            die()
        return fit(self, *args)

    return count


def writing(last: int) -> Callable[..., None]:
    """save_file, which is killed when half of the ``last`` file is on the disk."""
    save, written = shards.save_file, []

    def half(tensors: Any, path: Path, **more: Any) -> None:
        save(tensors, path, **more)
        written.append(path)
        if len(written) == last:
            os.truncate(path, path.stat().st_size // 2)
            die()

    return half


@pytest.mark.parametrize("name", METHODS)
def test_killed_within_layers_and_while_files_are_written(
    model: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[None] = []
    with monkeypatch.context() as patch:
        patch.setattr(Grid, "fit", fitting(calls, None))
        assert cli.run(command(model, tmp_path / "whole", METHODS[name])) == 0
    argv, total = command(model, tmp_path / "parts", METHODS[name]), len(calls)
    there = []
    for prepare in (
        lambda: setattr(Grid, "fit", fitting([], total // 2)),
        lambda: setattr(shards, "save_file", writing(2)),
    ):
        killed(argv, prepare)
        half = unfinished(tmp_path / "parts")
        there.append(len(list(half.glob("*.safetensors"))))
    assert there == sorted(there) and 0 < there[-1] < LAYERS + 1, "each went on where the one before was killed"
    assert list(half.glob("*.tmp")), "half a file"
    assert cli.run(argv) == 0 and not half.exists()
    assert digests(tmp_path / "parts") == digests(tmp_path / "whole")


def test_killed_from_outside(model: Path, tmp_path: Path) -> None:
    """At some moment behind the first file, whatever it was doing then."""
    argv = command(model, tmp_path / "parts", [])
    process = subprocess.Popen([sys.executable, "-m", "appliance", *argv], stderr=subprocess.DEVNULL)
    first, end = tmp_path / "parts.partial" / f"model-00001-of-{LAYERS + 1:05}.safetensors", time.monotonic() + 90
    while not first.exists() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    unfinished(tmp_path / "parts")
    assert cli.run(argv) == 0 and cli.run(command(model, tmp_path / "whole", [])) == 0
    assert digests(tmp_path / "parts") == digests(tmp_path / "whole")


def test_interrupted(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C: a line that says what there is, and how to go on."""
    argv, write, half = command(model, tmp_path / "made", ["--method", "rtn"]), shards.Shards.write, tmp_path / "made.partial"

    def interrupt(self: shards.Shards, number: int, *args: Any) -> None:
        if number == 2:
            raise KeyboardInterrupt
        write(self, number, *args)

    with monkeypatch.context() as patch:
        patch.setattr(shards.Shards, "write", interrupt)
        with pytest.raises(SystemExit) as ended:
            cli.run(argv)
    assert ended.value.code == 130
    err = capsys.readouterr().err
    assert f"interrupted: what is done is kept in {half}, and the same command goes on with it" in err and "Traceback" not in err
    unfinished(tmp_path / "made")
    assert cli.run(argv) == 0
    out, err = capsys.readouterr()
    assert f"going on with {half}: 2 of {LAYERS} layers are done" in err and " KiB, of " in out


def test_what_safetensors_was_writing_does_not_stay(model: Path, tmp_path: Path) -> None:
    """It writes to a file of its own, with a hidden name, before the one that we named is there."""
    argv = command(model, tmp_path / "made", METHODS["awq"])
    half = tmp_path / "made.partial"

    def prepare() -> None:
        def leave(tensors: Any, path: Path, **more: Any) -> None:
            (path.parent / ".tmpAbCdEf").write_bytes(b"half of it")
            die()

        shards.save_file = leave

    killed(argv, prepare)
    assert (half / ".tmpAbCdEf").is_file()
    assert cli.run(argv) == 0
    names = {path.name for path in (tmp_path / "made").iterdir()}
    weights = {f"model-{n + 1:05}-of-{LAYERS + 1:05}.safetensors" for n in range(LAYERS + 1)}
    assert names == {*weights, "model.safetensors.index.json", "config.json"} | {
        path.name for path in model.iterdir() if path.suffix == ".json" and path.name != "config.json"
    }


def test_one_process_at_a_time(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = command(model, tmp_path / "made", METHODS["awq"])
    (tmp_path / "made.partial").mkdir()
    with (tmp_path / "made.partial" / shards.JOB).open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert cli.run(argv) == 2
        assert "another process is at work on it" in capsys.readouterr().err
    assert cli.run(argv) == 0  # the file is empty, as if the plug had been pulled: a beginning
    assert not (tmp_path / "made.partial").exists()


@pytest.mark.parametrize(
    ("output", "words"),
    [("/", "cannot be a new directory"), ("x" * 300, "File name too long"), ("model/sub", "lies within the model's own")],
)
def test_places_that_cannot_be(model: Path, output: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    where = str(model / "sub") if output == "model/sub" else output
    assert cli.run(["quantize", str(model), "--output", where, "--method", "rtn", "--group-size", "16"]) == 2
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1


def test_directories_with_names_of_files(tmp_path: Path) -> None:
    source = make(tmp_path / "model")
    (source / "strange.json").mkdir()
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tools.jinja").write_text("{{ messages }}")
    (source / "adapter_config.json").write_text("{}")
    assert cli.run(["quantize", str(source), "--output", str(tmp_path / "made"), "--method", "rtn", "--group-size", "16"]) == 0
    assert (tmp_path / "made/additional_chat_templates/tools.jinja").is_file()
    assert not (tmp_path / "made/strange.json").exists() and not (tmp_path / "made/adapter_config.json").exists()
