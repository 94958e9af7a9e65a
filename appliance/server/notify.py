"""What systemd is told of a service of ``Type=notify``: that it is ready, stops, is alive. Without systemd nothing happens.

The protocol: a datagram of NAME=VALUE lines to the socket in NOTIFY_SOCKET, as sd_notify(3) has it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket


def notify(*lines: str) -> None:
    """Never raises and never waits: a manager that does not listen is no reason to serve nobody."""
    path = os.environ.get("NOTIFY_SOCKET", "")
    if path[:1] not in ("/", "@"):
        return
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        sock.setblocking(False)
        sock.sendto("\n".join(lines).encode(), "\0" + path[1:] if path[0] == "@" else path)


def watchdog_s() -> float | None:
    """Seconds between two signs of life: half of what the manager waits for (WatchdogSec=). None where it does not wait."""
    usec, pid = os.environ.get("WATCHDOG_USEC", ""), os.environ.get("WATCHDOG_PID", "")
    if not usec.isdecimal() or int(usec) == 0 or pid not in ("", str(os.getpid())):
        return None
    return int(usec) / 2e6


async def beat() -> None:
    """A sign of life now and then, as long as the event loop turns: a server that answers nobody is started again."""
    if (period := watchdog_s()) is None:
        return
    while True:
        notify("WATCHDOG=1")
        await asyncio.sleep(period)
