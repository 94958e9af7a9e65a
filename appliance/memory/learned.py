"""What a process takes beside its tensors, as earlier starts on a device had it: kept in a small file in the user's cache.

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

log = logging.getLogger("appliance.memory")

FILE = "memory.json"
FORMAT = 1
BOUNDS = {"cpu": (200 * MIB, 600 * MIB), "cuda": (300 * MIB, 1600 * MIB)}
"""Least and most that is believed: libraries may be smaller than those that were measured, but torch is never nothing; and where
the engine is a part of a larger program, that program's memory is none of the engine's."""
KEPT = {"cpu": 6 * MIB, "cuda": 0}
"""What comes later, and cannot be seen at the start: modules that the first steps load, and what the allocator keeps of them (4
to 9 MiB were measured, docs/benchmarks/plan-check.md). A card has done its steps by then."""
STARTS = 5  # of which the one that took the most counts
MOST_KEYS = 64


def key(device: DeviceInfo, ops: str) -> str:
    """What decides how much a process takes: the device, torch, and whose kernels."""
    return f"{device.kind} | {device.name} | torch {_version('torch')} | {ops} of appliance {_version('appliance')}"


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "not installed"


def recall(device: DeviceInfo, ops: str) -> int | None:
    """Bytes of the process itself, from the starts before this one; None where there was none."""
    seen = _read().get(key(device, ops))
    if not seen:
        return None
    least, most = BOUNDS[device.kind]
    return max(least, min(max(seen) + KEPT[device.kind], most))


def record(device: DeviceInfo, ops: str, measured: int) -> None:
    """Keep what a start has measured: bytes of the process itself when it is ready. Says so where it cannot, and goes on."""
    path, known, name = cache_file(FILE), _read(), key(device, ops)
    if path is None or measured <= 0:
        return
    starts = [*known.pop(name, []), int(measured)][-STARTS:]
    known = dict([*known.items(), (name, starts)][-MOST_KEYS:])
    scratch = path.with_name(f"{FILE}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch.write_text(json.dumps({"format": FORMAT, "runtime_bytes": known}, indent=1))
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


def _read() -> dict[str, list[int]]:
    """By key, the last starts' bytes, oldest first."""
    path = cache_file(FILE)
    try:
        if path is None or not path.is_file():
            return {}
        found: Any = json.loads(path.read_text(encoding="utf-8"))
        if found["format"] != FORMAT:
            return {}
        table = {str(name): [_bytes(one) for one in starts] for name, starts in found["runtime_bytes"].items()}
    except OSError as error:
        log.info("what earlier starts measured cannot be read: %s", error)
        return {}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        log.warning("%s is damaged and is not used (%s: %s); the next start writes it anew", path, type(error).__name__, error)
        return {}
    return table


def _bytes(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{value!r} is no number of bytes")
    return value
