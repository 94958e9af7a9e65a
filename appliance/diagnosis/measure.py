"""Two quick measurements: how fast memory is read, and how fast the disk under a model is. Half a second each."""

from __future__ import annotations

import os
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

CHUNK = 64 * 1024**2  # bytes a thread reads at a time: more than caches hold
PASSES = 4
SAMPLE = 256 * 1024**2  # bytes of a file
NETWORK = {
    "nfs",
    "nfs4",
    "cifs",
    "smb3",
    "smbfs",
    "9p",
    "ceph",
    "glusterfs",
    "lustre",
    "fuse.sshfs",
    "fuse.rclone",
    "fuse.s3fs",
    "virtiofs",
}


def memory_speed(threads: int) -> float:
    """Bytes a second that so many threads read from memory, each a part of its own: the best of some passes.

    What they compute is the cheapest that numpy has; sums of floats would be bound by the additions.
    """
    import numpy as np

    parts = [np.ones(CHUNK // 8, np.int64) for _ in range(threads)]  # written: pages never touched are all the same one
    best = 0.0
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(PASSES):
            begun = time.perf_counter()
            list(pool.map(np.bitwise_or.reduce, parts))  # without Python's lock
            best = max(best, threads * CHUNK / (time.perf_counter() - begun))
    return best


def disk_speed(file: Path) -> float | None:
    """Bytes a second of the file's first part, past the system's cache where that lets go of it. None: too small to tell."""
    size = min(SAMPLE, file.stat().st_size)
    if size < SAMPLE // 16:
        return None
    handle = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(handle, 0, size, os.POSIX_FADV_DONTNEED)
        begun, done = time.perf_counter(), 0
        while done < size and time.perf_counter() - begun < 1.0:
            done += len(os.pread(handle, 8 * 1024**2, done))
        return done / (time.perf_counter() - begun)
    finally:
        os.close(handle)


def file_system(folder: Path, mounts: str) -> str | None:
    """The type of the file system that ``folder`` is on, by the text of /proc/mounts."""
    best, kind = "", None
    for line in mounts.splitlines():
        words = line.split()
        if len(words) < 3:
            continue
        place = re.sub(r"\\(\d{3})", lambda match: chr(int(match[1], 8)), words[1])
        inside = folder == Path(place) or Path(place) in folder.parents
        if inside and len(place) >= len(best):
            best, kind = place, words[2]
    return kind
