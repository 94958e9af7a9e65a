"""What keys have used of their days, in a file: a server that starts again goes on where it was.

While it runs a server counts by the monotonic clock (``limits``), which begins anew with the machine. The file has times of
the wall clock, which is believed when the server starts, and at no other time.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import logging
import math
import os
import threading
import time
from collections.abc import Mapping
from pathlib import Path

from appliance.server.limits import Account

log = logging.getLogger("appliance.server")

EVERY_S = 10.0  # so much is forgotten, at most, where the server is killed


class Usage:
    """The file of one server. One that cannot be read, or written, is told in the log and stops nothing."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._kept: dict[str, dict[str, float]] = {}  # as the file has it
        self._told = False
        self._lock = threading.Lock()  # a thread may write when the server ends
        self._asked = itertools.count(1)
        self._done = 0  # which of the writings that were asked for was the last one

    def read(self) -> dict[str, tuple[float, int]]:
        """Key -> (seconds since its day began, tokens used since)."""
        try:
            table = json.loads(self.file.read_text(encoding="utf-8"))
            found = {name: {"since": float(row["since"]), "tokens": int(row["tokens"])} for name, row in table.items()}
            if not all(math.isfinite(row["since"]) for row in found.values()):
                raise ValueError("a time that is none")
            self._kept = found
        except FileNotFoundError:
            pass
        except (OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
            log.warning("%s: %r; what keys have used of their days is counted from 0", self.file, error)
        now = time.time()
        return {name: (max(0.0, now - row["since"]), int(row["tokens"])) for name, row in self._kept.items()}

    def write(self, accounts: Mapping[str, Account]) -> None:
        """Keep what accounts with such a limit have used, if it has changed."""
        self._write(next(self._asked), _days(accounts))

    def _write(self, number: int, days: Mapping[str, tuple[float, int]]) -> None:
        with self._lock:
            if number > self._done:  # else a thread comes late, and newer numbers are kept
                self._done = number
                self._replace(days)

    def _replace(self, days: Mapping[str, tuple[float, int]]) -> None:
        now = time.time()
        if {name: used for name, (_, used) in days.items() if used} == {name: row["tokens"] for name, row in self._kept.items()}:
            return
        rows = {name: {"since": round(now - age, 3), "tokens": used} for name, (age, used) in days.items() if used}
        scratch = self.file.with_name(f"{self.file.name}.{os.getpid()}")
        try:
            with open(scratch, "w", encoding="utf-8", opener=_private) as file:
                json.dump(rows, file, indent=1)
                file.flush()
                os.fsync(file.fileno())
            os.replace(scratch, self.file)
        except OSError as error:
            with contextlib.suppress(OSError):
                scratch.unlink()
            if not self._told:
                log.warning("%s: %s; what keys use of their days is forgotten when the server ends", self.file, error.strerror)
            self._told = True
        else:
            self._kept, self._told = rows, False

    async def keep(self, accounts: Mapping[str, Account]) -> None:
        """Write now and then, as long as the task lives."""
        while True:
            await asyncio.sleep(EVERY_S)
            await asyncio.to_thread(self._write, next(self._asked), _days(accounts))  # accounts are the event loop's


def _days(accounts: Mapping[str, Account]) -> dict[str, tuple[float, int]]:
    return {name: account.day() for name, account in accounts.items() if account.limits.tokens_per_day is not None}


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
