"""What a process takes beside its tensors, and recorded steps of a card, as earlier starts had it: in a file in the user's cache.

Where: APPLIANCE_CACHE_DIR, or the folder ``appliance`` in XDG_CACHE_HOME, or ~/.cache/appliance. An empty APPLIANCE_CACHE_DIR
turns it off. The file is a help and never a need: one that cannot be read or written is ignored.
"""

from __future__ import annotations

import json
import logging
import os
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from appliance.memory.devices import MIB, DeviceInfo
from appliance.memory.graphs import LAYER_BYTES

log = logging.getLogger("appliance.memory")

FILE = "memory.json"
FORMAT = 2
BOUNDS = {"cpu": (200 * MIB, 600 * MIB), "cuda": (300 * MIB, 1600 * MIB)}
"""Least and most that is believed: libraries may be smaller than those that were measured, but torch is never nothing; and twice
what was measured is no lesson but an accident. A process with more in it than an engine teaches nothing (startup.py)."""
KEPT = {"cpu-native": 1 * MIB, "cpu": 2 * MIB, "reference": 2 * MIB}
"""What steps leave of a CPU's process beside what is planned: their requests, and holes between small blocks
(docs/benchmarks/plan-check.md). A card has done its steps when it is measured."""
CODE = {"cpu-native": 6 * MIB, "cpu": 12 * MIB, "reference": 12 * MIB}
"""Code that steps bring into memory, until some have been seen to (docs/benchmarks/plan-check.md)."""
MOST_LAYER_BYTES = 4 * LAYER_BYTES
"""Most that is believed of a recorded step's layer: what other programs took meanwhile looks the same."""
RUNTIME, READY, STEPS, LAYERS = "runtime_bytes", "code_bytes", "code_after_steps_bytes", "recorded_layer_bytes"
TABLES = RUNTIME, READY, STEPS, LAYERS
STARTS = 5  # of which the one that took the most counts
MOST_KEYS = 64


def key(device: DeviceInfo, ops: str) -> str:
    """What decides how much a process takes: the device, torch, and whose kernels."""
    return f"{device.kind} | {device.name} | torch {torch_version()} | {ops} of appliance {_version('appliance')}"


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "not installed"


def torch_version() -> str:
    """Of what is installed; builds for CPUs end with +cpu."""
    return _version("torch")


def recall(device: DeviceInfo, ops: str, kind: str = "") -> int | None:
    """Bytes of the process itself, from the starts before this one; None where there was none.

    On a CPU what is its own, which is the same of any model, with the code that is in memory once steps have run. Of that, what
    models of the same ``kind`` (see ``code_words``) had; else the most that any had.
    """
    tables, name = _read(), key(device, ops)
    own, ready = (max(tables[table].get(name, ()), default=0) for table in (RUNTIME, READY))
    if not own:
        return None
    later = 0
    if device.kind == "cpu":
        any_model = (max(seen) for known, seen in tables[STEPS].items() if known.startswith(f"{name} | "))
        steps = max(tables[STEPS].get(f"{name} | {kind}", ()), default=0) or max(any_model, default=0)
        later = KEPT.get(ops, 0) + (steps or ready + CODE.get(ops, 0))
    least, most = BOUNDS[device.kind]
    return max(least, min(own + later, most))


def code_words(quantization: str, dtype: str) -> str:
    """What models have in common that run the same code."""
    return f"{quantization} in {dtype}"


def record(device: DeviceInfo, ops: str, own: int, code: int = 0) -> None:
    """Keep what a start has measured when it is ready: bytes of the process itself, on a CPU those of its own, and code's.

    Says so where it cannot, and goes on.
    """
    _keep(RUNTIME, key(device, ops), own)
    _keep(READY, key(device, ops), code)


def record_steps(device: DeviceInfo, ops: str, kind: str, code: int) -> None:
    """Keep how many bytes of code were in memory once steps of a model of this kind had run."""
    _keep(STEPS, f"{key(device, ops)} | {kind}", code)


def model_words(architecture: str, quantization: str, dtype: str, layers: int) -> str:
    """What models have in common that launch the same kernels."""
    return f"{architecture} | {quantization} | {dtype} | {layers} layers"


def recall_layer(device: DeviceInfo, ops: str, model: str) -> int | None:
    """Bytes that one layer in one recorded step took of a card (appliance/memory/graphs.py) in the starts before this one.

    ``model``: of ``model_words``. None where there was no such start.
    """
    seen = _read()[LAYERS].get(f"{key(device, ops)} | {model}")
    return min(max(seen), MOST_LAYER_BYTES) if seen else None


def record_layer(device: DeviceInfo, ops: str, model: str, measured: int) -> None:
    """Keep what a start has measured of that."""
    _keep(LAYERS, f"{key(device, ops)} | {model}", measured)


def _keep(table: str, name: str, measured: int) -> None:
    path, tables = cache_file(FILE), _read()
    if path is None or measured <= 0:
        return
    known = tables[table]
    starts = [*known.pop(name, []), int(measured)][-STARTS:]
    tables[table] = dict([*known.items(), (name, starts)][-MOST_KEYS:])
    scratch = path.with_name(f"{FILE}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch.write_text(json.dumps({"format": FORMAT, **tables}, indent=1))
        os.replace(scratch, path)
    except OSError as error:
        log.info("what this start measured is not kept: %s", error)


def cache_file(name: str) -> Path | None:
    """Where a file of the user's cache is; None where there is no cache."""
    given = os.environ.get("APPLIANCE_CACHE_DIR")
    if given is not None:
        return Path(given) / name if given else None
    try:
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError:  # nobody's home is known
        return None
    return Path(home) / "appliance" / name


def _read() -> dict[str, dict[str, list[int]]]:
    """Of each table, by key, the last starts' bytes, oldest first."""
    path = cache_file(FILE)
    nothing: dict[str, dict[str, list[int]]] = {table: {} for table in TABLES}
    try:
        if path is None or not path.is_file():
            return nothing
        found: Any = json.loads(path.read_text(encoding="utf-8"))
        if found["format"] != FORMAT:
            return nothing
        tables = {RUNTIME: found[RUNTIME]} | {table: found.get(table, {}) for table in (READY, STEPS, LAYERS)}
        return {
            name: {str(key): [_bytes(one) for one in starts] for key, starts in table.items()} for name, table in tables.items()
        }
    except OSError as error:
        log.info("what earlier starts measured cannot be read: %s", error)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        log.warning("%s is damaged and is not used (%s: %s); the next start writes it anew", path, type(error).__name__, error)
    return nothing


def _bytes(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{value!r} is no number of bytes")
    return value
