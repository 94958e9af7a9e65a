"""The files of a checkpoint that is being made: one for each layer, whole or not there, and what turns them into a model.

Everything is written to DIR.partial, where there is no config.json until all else is done; then that becomes DIR.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from appliance.memory.text import size_text
from quant.errors import InputError

JOB = "job.json"
NOTE = "chosen.json"  # what was chosen by measuring, before all else
COPIED = ("*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken")  # beside the weights: tokenizer, templates, generation defaults
TEMPLATES = "additional_chat_templates"  # a directory of them
REPLACED = ("config.json", "model.safetensors.index.json", "pytorch_model.bin.index.json", "adapter_config.json",
            "quantize_config.json", "quant_config.json", JOB, NOTE)  # fmt: skip
HALVES = ("*.tmp", ".tmp*")  # files that were being written: ours, and those that safetensors makes first


class Shards:
    def __init__(self, output: Path, job: Mapping[str, Any], count: int, needed: int) -> None:
        """``job`` says what is being made: a DIR.partial of the same is gone on with. ``needed``: bytes of all files.

        Raises InputError where another job is at work on it, or there is no room for it.
        """
        self.count, self.resumed = count, False
        self.output, self.folder = output, _partial(output)
        try:
            there = sum(path.stat().st_size for path in self.folder.glob("*.safetensors"))
            check_space(self.output.parent, needed - there)
            self._begin(job)
        except OSError as error:
            raise InputError(f"--output {output}: {error.strerror or error}") from None

    def _begin(self, job: Mapping[str, Any]) -> None:
        fresh = not (self.folder / JOB).is_file()
        if fresh and any(self.folder.glob("*.safetensors")):
            raise InputError(f"{self.folder} holds files of a job that nobody knows: remove it, or name another --output")
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = (self.folder / JOB).open("a+", encoding="utf-8")  # held until the end
        try:
            self._take(job)
        except BaseException:
            self._lock.close()
            raise

    def _take(self, job: Mapping[str, Any]) -> None:
        """Be the one who works here."""
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{self.folder}: another process is at work on it: wait for it, or name another --output") from None
        for half in self._halves():
            half.unlink()
        self._lock.seek(0)
        try:
            known = json.loads(self._lock.read())
        except ValueError:  # empty, or what was written of it when somebody pulled the plug: there is nothing behind it then
            known = None
        if known != job and (known is not None or any(self.folder.glob("*.safetensors"))):
            raise InputError(
                f"{self.folder} holds the beginning of another job (other options, text or model): remove it, or name "
                "another --output"
            )
        self.resumed = known is not None
        if not self.resumed:
            self._lock.truncate(0)
            self._lock.write(json.dumps(job, indent=1))
            _settle(self._lock)

    def _halves(self) -> list[Path]:
        return [half for pattern in HALVES for half in self.folder.glob(pattern)]

    def keep(self, note: Mapping[str, str]) -> None:
        """For when the job is gone on with (``noted``). Raises InputError where the disk is full."""
        half = self.folder / f"{NOTE}.tmp"
        try:
            with half.open("w", encoding="utf-8") as file:
                file.write(json.dumps(note, indent=1))
                _settle(file)
            half.rename(self.folder / NOTE)
        except OSError as error:
            raise self._failed(error) from None

    def path(self, number: int) -> Path:
        """Of file 0, 1, .. as it will be called in the end."""
        return self.folder / f"model-{number + 1:05}-of-{self.count:05}.safetensors"

    def has(self, number: int) -> bool:
        return self.path(number).is_file()

    def write(self, number: int, tensors: Mapping[str, Tensor]) -> None:
        """Write one file: it is there as a whole or not at all. Raises InputError where the disk is full."""
        half = self.path(number).with_suffix(".tmp")
        try:
            save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, half, metadata={"format": "pt"})
            half.chmod(0o644)  # the library makes it its owner's alone
            with half.open("rb+") as file:
                os.fsync(file.fileno())
            half.rename(self.path(number))
        except (OSError, SafetensorError) as error:  # the library has its own for a full disk
            half.unlink(missing_ok=True)
            raise self._failed(error) from None

    def _failed(self, error: Exception) -> InputError:
        why = getattr(error, "strerror", None) or error
        return InputError(f"{self.folder}: {why}; what is done is kept, and gone on with next time")

    def finish(self, source: Path, config: Mapping[str, Any], beside: Mapping[str, Mapping[str, Any]]) -> None:
        """Copy what belongs beside the weights from ``source``, write config.json last, and be DIR. Raises InputError.

        ``beside``: further JSON files, by name.
        """
        try:
            self._finish(source, config, beside)
        except (OSError, SafetensorError) as error:
            raise self._failed(error) from None

    def _finish(self, source: Path, config: Mapping[str, Any], beside: Mapping[str, Mapping[str, Any]]) -> None:
        weight_map: dict[str, str] = {}
        total = 0
        for number in range(self.count):
            path = self.path(number)
            with safe_open(path, "pt") as file:
                weight_map |= dict.fromkeys(file.keys(), path.name)
            total += path.stat().st_size
        for half in self._halves():
            half.unlink()
        for pattern in COPIED:
            for one in source.glob(pattern):
                if one.name not in REPLACED and one.is_file():
                    shutil.copyfile(one, self.folder / one.name)
        if (source / TEMPLATES).is_dir():
            shutil.copytree(source / TEMPLATES, self.folder / TEMPLATES, dirs_exist_ok=True)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        for name, value in {"model.safetensors.index.json": index, **beside, "config.json": config}.items():
            with (self.folder / name).open("w", encoding="utf-8") as file:
                file.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
                _settle(file)
        if self.output.exists():
            self.output.rmdir()  # it is empty
        self.folder.rename(self.output)
        (self.output / NOTE).unlink(missing_ok=True)
        (self.output / JOB).unlink()  # last: until then it says whose files these are

    def let_go(self) -> None:
        """Another process may go on."""
        self._lock.close()


def check_free(output: Path) -> Path:
    """An absolute path. Raises InputError for one that no directory can have, or where something is."""
    if "\0" in str(output) or not (path := Path(os.path.abspath(output))).name:
        raise InputError(f"--output {str(output)!r} cannot be a new directory: name another")
    try:
        if path.is_symlink() or (path.exists() and (not path.is_dir() or any(path.iterdir()))):
            raise InputError(f"--output {path} exists already: name another directory, or remove it")
        above = next(folder for folder in path.parents if folder.exists())
        if not above.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
    except OSError as error:
        raise InputError(f"--output {path}: {error.strerror or error}") from None
    return path


def checked_output(output: Path, source: Path) -> Path:
    """As ``check_free``. Raises InputError for a path within the model's own directory, too."""
    path = check_free(output)
    if source.resolve() in path.resolve().parents:
        raise InputError(f"--output {output} lies within the model's own directory: name another")
    return path


def noted(output: Path) -> dict[str, str] | None:
    """What ``keep`` kept of the job that makes ``output``; None: nothing yet."""
    path = _partial(output) / NOTE
    try:
        return json.loads(path.read_text()) if path.is_file() else None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}): remove {path.parent}, or name another --output") from None


def _partial(output: Path) -> Path:
    return output.with_name(output.name + ".partial")


def _settle(file: IO[str]) -> None:
    """What was written is on the disk."""
    file.flush()
    os.fsync(file.fileno())


def check_space(folder: Path, needed: int) -> None:
    """Raises InputError where the disk has less than ``needed`` bytes."""
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise InputError(f"{folder} has {size_text(free)} free, and the checkpoint will take {size_text(needed)} more")
