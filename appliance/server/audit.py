"""--audit-log FILE: who asked what of the server, when, and what it cost; a JSON object a line.

A thread writes, so that no disk delays an answer. A line that cannot be written is lost and counted; requests never fail by it.
"""

from __future__ import annotations

import errno
import logging
import os
import queue
import select
import stat
import threading
from pathlib import Path
from typing import Any

from pydantic_core import to_json

from quant.errors import InputError

log = logging.getLogger("appliance.server")

MAX_BYTES, FILES = 100 * 1000**2, 10  # a file is put aside at this size; so many are kept: FILE, FILE.1, ... FILE.9
MAX_QUEUE, MAX_WAITING = 10_000, 64 * 2**20  # lines that wait for the disk, and bytes: content may be megabytes a line
PATIENCE_S = 1.0  # with the reader of a pipe that is full


def _open(file: str | Path) -> int:
    """Of a pipe that nobody reads it is an error, and no wait."""
    return os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK, 0o600)


def check_writable(file: str) -> None:
    """Raises InputError."""
    try:
        os.close(_open(file))
    except OSError as error:
        why = "a pipe that nobody reads" if error.errno == errno.ENXIO else error.strerror
        raise InputError(f"--audit-log {file}: {why}") from None


class AuditLog:
    def __init__(self, file: str, *, max_bytes: int = MAX_BYTES, files: int = FILES) -> None:
        """Raises InputError where the file cannot be written now."""
        self.path, self.max_bytes, self.files = Path(file), max_bytes, files
        self.lost = 0  # lines that could not be written
        self._failing = False
        self._torn = False  # whether the last that went into a pipe is a part of a line
        self._queue: queue.Queue[bytes | None] = queue.Queue(MAX_QUEUE)
        self._given = self._taken = 0  # bytes of lines, ever; the first is the event loop's to count, the other the thread's
        check_writable(file)
        self._thread = threading.Thread(target=self._run, name="audit-log", daemon=True)
        self._thread.start()

    def add(self, record: dict[str, Any]) -> None:
        """Never waits, never raises."""
        try:
            line = to_json(record) + b"\n"
            if (waiting := self._given - self._taken) and waiting + len(line) > MAX_WAITING:
                raise queue.Full
            self._queue.put_nowait(line)
            self._given += len(line)
        except queue.Full:
            self._lose("the disk is too slow")
        except ValueError as error:  # text that is no Unicode
            self._lose(str(error))

    def close(self, timeout_s: float = 2.0) -> None:
        """Write what waits, for so long at most."""
        try:
            self._queue.put(None, timeout=timeout_s)
        except queue.Full:
            return
        self._thread.join(timeout_s)

    def _run(self) -> None:
        while (line := self._queue.get()) is not None:
            self._taken += len(line)
            try:
                self._write(line)
            except OSError as error:
                self._lose(error.strerror or str(error))
            else:
                if self._failing:
                    self._failing = False
                    log.warning("the audit log %s is written again; %d lines were lost so far", self.path, self.lost)

    def _write(self, line: bytes) -> None:
        """Opened for each line: a file that is moved away, deleted, or on a disk that has room again needs no signal."""
        file = _open(self.path)
        try:
            found = os.fstat(file)
            size = found.st_size
            if not stat.S_ISREG(found.st_mode):
                return self._feed(file, line)
            if size and size + len(line) > self.max_bytes:
                self._rotate()
                os.close(file)
                file = _open(self.path)
                size = 0
            written = os.write(file, line)
            if written < len(line):  # the disk is full: a part of a line is worse than none
                os.ftruncate(file, size)
                raise OSError(None, "no space for a whole line")
        finally:
            os.close(file)

    def _feed(self, file: int, line: bytes) -> None:
        """Into a pipe, which takes a long line in parts. A reader who was waited for in vain is not again until it reads."""
        rest = line = b"\n" * self._torn + line
        poller = select.poll()  # of a descriptor above 1023, too
        poller.register(file, select.POLLOUT)
        try:
            while rest:
                if not poller.poll(0 if self._failing else 1000 * PATIENCE_S):
                    raise OSError(None, "nobody reads the pipe")
                rest = rest[os.write(file, rest) :]
        finally:
            if len(rest) < len(line):
                self._torn = bool(rest)

    def _rotate(self) -> None:
        names = [self.path, *(Path(f"{self.path}.{k}") for k in range(1, self.files))]
        for older, newer in zip(names[:0:-1], names[-2::-1]):
            if newer.exists():
                os.replace(newer, older)
        if self.files == 1:
            self.path.unlink()

    def _lose(self, why: str) -> None:
        self.lost += 1
        if not self._failing:
            self._failing = True
            log.error("the audit log %s cannot be written: %s; requests are answered all the same", self.path, why)
