"""The files of a checkpoint that is being made: one for each layer, whole or not there, and what turns them into a model.

Everything is written to DIR.partial, where there is no config.json until all else is done; then that becomes DIR.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from appliance.memory.text import size_text
from quant.errors import InputError

JOB = "job.json"
NOTE = "chosen.json"  # what was chosen by measuring, before all else
COPIED = ("*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken")  # beside the weights: tokenizer, templates, generation defaults
REPLACED = ("config.json", "model.safetensors.index.json", "quantize_config.json", "quant_config.json", JOB, NOTE)


class Shards:
    def __init__(self, output: Path, job: Mapping[str, Any], count: int, needed: int) -> None:
        """``job`` says what is being made: a DIR.partial of the same is gone on with. ``needed``: bytes of all files.

        Raises InputError where DIR is taken, or there is no room for it.
        """
        self.count = count
        output = Path(os.path.abspath(output))
        self.output, self.folder = output, output.with_name(output.name + ".partial")
        if output.is_symlink() or (output.exists() and (not output.is_dir() or any(output.iterdir()))):
            raise InputError(f"--output {output} exists already: name another directory, or remove it")
        self.resumed = False
        there = sum(path.stat().st_size for path in self.folder.glob("*.safetensors"))
        check_space(self.output.parent, needed - there)
        try:
            self._begin(job)
        except OSError as error:
            raise InputError(f"--output {output}: {error.strerror or error}") from None

    def _begin(self, job: Mapping[str, Any]) -> None:
        note = self.folder / JOB
        if note.is_file():
            if json.loads(note.read_text()) != job:
                raise InputError(
                    f"{self.folder} holds the beginning of another job (other options, text or model): remove it, or name "
                    "another --output"
                )
            self.resumed = True
            for half in self.folder.glob("*.tmp"):
                half.unlink()
            return
        if any(self.folder.glob("*.safetensors")):
            raise InputError(f"{self.folder} holds files of a job that nobody knows: remove it, or name another --output")
        self.folder.mkdir(parents=True, exist_ok=True)
        half = note.with_suffix(".tmp")
        half.write_text(json.dumps(job, indent=1))
        half.rename(note)

    def note(self) -> dict[str, str] | None:
        """What was kept when this job began; None: nothing yet."""
        path = self.folder / NOTE
        return json.loads(path.read_text()) if path.is_file() else None

    def keep(self, note: Mapping[str, str]) -> None:
        """For when the job is gone on with. Raises InputError where the disk is full."""
        half = self.folder / f"{NOTE}.tmp"
        try:
            half.write_text(json.dumps(note, indent=1))
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
        for pattern in COPIED:
            for one in source.glob(pattern):
                if one.name not in REPLACED:
                    shutil.copyfile(one, self.folder / one.name)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        for name, value in {"model.safetensors.index.json": index, **beside, "config.json": config}.items():
            with (self.folder / name).open("w", encoding="utf-8") as file:
                file.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
                file.flush()
                os.fsync(file.fileno())
        if self.output.exists():
            self.output.rmdir()  # it is empty
        self.folder.rename(self.output)
        (self.output / NOTE).unlink(missing_ok=True)
        (self.output / JOB).unlink()  # last: until then it says whose files these are


def check_space(folder: Path, needed: int) -> None:
    """Raises InputError where the disk has less than ``needed`` bytes."""
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise InputError(f"{folder} has {size_text(free)} free, and the checkpoint will take {size_text(needed)} more")
