"""Work in processes of their own, watched: one that crashes, hangs or loses the card costs what it was at, and no more.

A child notes what it begins and what it finds, each a line of JSON, in the file that GPU_NOTES names. One that ended badly
begins once more, and leaves out what it had begun.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
NOTES = "GPU_NOTES"
SILENT_S = 180.0  # some compile many kernels for one test
AGAIN = 4  # times that one is begun once more, at most
GRACE = 40.0  # seconds after the deadline for what has begun
DIES_S = 8.0  # until one that was killed is gone; not one that waits in the driver for a card that hangs
LOG_BYTES = 400_000  # of a child's output that are kept, its end
Note = dict[str, Any]


class Notebook:
    """A child's side: what it notes, and what those before it in its place have begun. Keeps nothing where no file is given."""

    def __init__(self) -> None:
        path = os.environ.get(NOTES)
        self.path = Path(path) if path else None
        self.begun = {note["begun"] for note in notes(self.path) if "begun" in note} if self.path else set()

    def __call__(self, **note: Any) -> None:
        if self.path is not None:
            with open(self.path, "a") as file:  # in one piece: several may write
                file.write("\n" + json.dumps(note) + "\n")

    def compilations(self) -> None:
        """From here on note every kernel that Triton compiles, with the seconds that it took: no silence while there are many."""
        from triton import knobs

        before = knobs.compilation.listener

        def listen(*args: Any, metadata: dict[str, Any], times: Any, cache_hit: bool, **facts: Any) -> None:
            if not cache_hit:
                self(compiled=str(metadata.get("name")), seconds=round(times.total / 1e6, 2))
            if before is not None:
                before(*args, metadata=metadata, times=times, cache_hit=cache_hit, **facts)

        knobs.compilation.listener = listen


def own_folders() -> None:
    """Make ``tests`` and ``scripts`` those of this checkout: folders without an __init__.py are found last of all, behind
    whatever package of a machine full of packages is called so.
    """
    for name in ("tests", "scripts"):
        module = ModuleType(name)
        module.__path__ = [str(ROOT / name)]
        sys.modules.setdefault(name, module)


def card_answers(*, recording: bool = True) -> bool:
    """Whether CUDA does what this process asks of it, where it uses it at all: a kernel that reads where it must not ends that
    for good, and a recording (of a graph) that failed ends others (``recording``).
    """
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return True
    try:
        torch.cuda.synchronize()
        if recording:
            number = torch.zeros(1, device="cuda")
            with torch.cuda.graph(torch.cuda.CUDAGraph()):
                number.add_(1)
            torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def notes(path: Path) -> list[Note]:
    """All whole lines: one who was killed may have left part of one."""
    found = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        with suppress(json.JSONDecodeError):
            found.append(json.loads(line))
    return found


class Child:
    """A program, and all that those said which ran in its place."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        folder: Path,
        *,
        fine: Sequence[int] = (0,),
        silent: float = SILENT_S,
        **environment: str,
    ) -> None:
        """``folder``: for its files, named like it; ``fine``: exit codes after which it is not begun again; ``silent``: seconds
        without a note after which it is taken to hang.
        """
        self.name, self.command, self.fine, self.silent, self.environment = name, list(command), fine, silent, environment
        plain = "".join(letter if letter.isalnum() else "_" for letter in name)
        plain = plain if len(plain) < 200 else plain[:80] + plain[-100:]
        self.notes_at, self.log = folder / f"{plain}.notes", folder / f"{plain}.log"
        self.faults: list[str] = []  # one for each that ended badly
        self.ended_at: list[str] = []  # what these were at
        self.code: int | None = None  # of the last one
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def notes(self) -> list[Note]:
        return notes(self.notes_at)

    def of(self, kind: str) -> list[Any]:
        """What was noted as that."""
        return [note[kind] for note in self.notes if kind in note]

    @property
    def output(self) -> str:
        """The end of all that it printed."""
        if not self.log.is_file():
            return ""
        return self.log.read_bytes()[-LOG_BYTES:].decode(errors="replace")

    def start(self) -> None:
        environment = {**os.environ, **self.environment, NOTES: str(self.notes_at), "PYTHONUNBUFFERED": "1"}
        paths = [str(ROOT), str(ROOT / "scripts"), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment["PYTHONPATH"] = os.pathsep.join(paths)
        self._before, self._seen, self._heard = len(self.of("begun")), -1, time.monotonic()
        with open(self.log, "ab") as file:
            self._process = subprocess.Popen(self.command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, env=environment)

    def over(self, deadline: float) -> bool:
        """Whether nothing more is to come of it. Starts another one in the place of one that ended badly, before the deadline."""
        assert self._process is not None
        now, size = time.monotonic(), self.notes_at.stat().st_size if self.notes_at.is_file() else 0
        if size != self._seen:
            self._seen, self._heard = size, now
        fault = ""
        if now > deadline + GRACE:
            fault = "cut off"
        elif now > self._heard + self.silent:
            fault = f"said nothing for {self.silent:.0f} s"
        elif self._process.poll() is None:
            return False
        if fault:
            self._process.kill()
        try:
            self.code = self._process.wait(DIES_S)
        except subprocess.TimeoutExpired:
            fault += ", and cannot be killed"
        if not fault and self.code in self.fine:
            return True
        at = self.of("begun")[self._before :][-1:]
        self.faults.append(" in ".join([fault or f"ended with exit code {self.code}", *at]))
        self.ended_at += at
        if at and len(self.faults) <= AGAIN and now < deadline:
            self.start()
            return False
        return True


def run(child: Child, deadline: float, seen: Callable[[], None] = lambda: None) -> Child:
    """To its end. ``seen`` is called every few seconds."""
    child.start()
    last = time.monotonic()
    while not child.over(deadline):
        time.sleep(0.1)
        if time.monotonic() > last + 5:
            seen()
            last = time.monotonic()
    return child
