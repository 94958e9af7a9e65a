"""What tests ask of other processes."""

from __future__ import annotations

import psutil


def gone(process: psutil.Process | int) -> bool:
    """Whether it has ended. It may be collected between two questions, so that even its state cannot be asked for."""
    try:
        process = psutil.Process(process) if isinstance(process, int) else process
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
