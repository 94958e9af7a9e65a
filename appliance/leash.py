"""A server that was started by another program of ours ends with that one, however it ends: a pipe closes, even after SIGKILL."""

from __future__ import annotations

import asyncio
import os
import stat
import subprocess
from collections.abc import Callable, Sequence
from typing import Any

NAME = "APPLIANCE_LEASH"  # the environment's: the number of the pipe's end


def start(command: Sequence[str], env: dict[str, str], **more: Any) -> tuple[subprocess.Popen[str], int]:
    """(the process, a file of ours: when nobody has it open any more, the process ends). Arguments as Popen's."""
    theirs, ours = os.pipe()
    try:
        process = subprocess.Popen(command, env={**env, NAME: str(theirs)}, pass_fds=[theirs], text=True, **more)
    except BaseException:
        os.close(ours)
        raise
    finally:
        os.close(theirs)
    return process, ours


def hold(loop: asyncio.AbstractEventLoop, let_go: Callable[[], None]) -> None:
    """Call ``let_go`` when whoever started this process is gone. Nothing where nobody holds it."""
    given = os.environ.pop(NAME, "")
    try:
        if not given.isdecimal() or not stat.S_ISFIFO(os.fstat(int(given)).st_mode):
            return
    except (OSError, OverflowError):  # no such file
        return

    def read() -> None:
        if not os.read(int(given), 1):
            loop.remove_reader(int(given))
            let_go()

    loop.add_reader(int(given), read)
