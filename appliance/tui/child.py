"""``--serve``: a server that is started here, watched, and ended with the dashboard."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Sequence

from appliance import leash
from appliance.tui.feed import LogLine
from quant.errors import InputError

LINES = 1000
LEVELS = {"DEBUG": "debug", "INFO": "info", "WARNING": "warning", "ERROR": "error", "CRITICAL": "critical"}
PATIENCE_S = 10.0  # beyond what its running requests get


class Child:
    """``appliance serve MODEL FLAGS`` on a free port, unless the flags have one. Its output is read line by line."""

    def __init__(self, model: str, flags: Sequence[str]) -> None:
        self.flags = list(flags)
        port = self._flag("--port") or os.environ.get("APPLIANCE_PORT") or ""
        host = self._flag("--host") or os.environ.get("APPLIANCE_HOST") or "127.0.0.1"
        self._held: socket.socket | None = None
        if not port or port == "0":
            self._held = hold_port(host)
            port = str(self._held.getsockname()[1])
            self.flags = [*_without(self.flags, "--port"), "--port", port]
        if not port.isdigit():
            raise InputError(f"--port {port!r} is not a port")
        if host in ("0.0.0.0", "::", ""):
            host = "127.0.0.1" if host != "::" else "::1"
        scheme = "https" if self._flag("--ssl-certfile") else "http"
        self.url = f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"
        self.api_key = self._flag("--api-key")
        self.command = [sys.executable, "-m", "appliance", "serve", model, *self.flags]
        self.lines: deque[LogLine] = deque(maxlen=LINES)
        self.total = 0
        self._process: subprocess.Popen[str] | None = None

    def _flag(self, name: str) -> str | None:
        """The value of a flag, as ``--name value`` or ``--name=value``."""
        for at, one in enumerate(self.flags):
            if one.startswith(f"{name}="):
                return one.partition("=")[2]
            if one == name:
                return self.flags[at + 1] if at + 1 < len(self.flags) else ""
        return None

    def start(self) -> None:
        self._process, self._leash = leash.start(
            self.command,
            {**os.environ, "PYTHONUNBUFFERED": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            errors="replace",
        )
        self._reader = threading.Thread(target=self._read, name="server-output", daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process is not None and self._process.stdout is not None
        for line in self._process.stdout:
            if words := line.rstrip("\n"):
                self.lines.append(as_log(words))
                self.total += 1
        os.close(self._leash)
        if self._held:
            self._held.close()

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def ended(self) -> str | None:
        """Why it runs no longer: its exit code and its last words."""
        if self._process is None or (code := self._process.poll()) is None:
            return None
        last = next((line.message for line in reversed(self.lines) if line.message.startswith("appliance: error")), "")
        how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
        return f"the server has ended {how}" + (f": {last.removeprefix('appliance: error: ')}" if last else "")

    @property
    def code(self) -> int:
        """Its exit code; 0 where it was ended from here."""
        code = self._process.poll() if self._process else 0
        return 0 if code is None else code if code >= 0 else 1

    def stop(self) -> None:
        """Ask it to end, as ctrl-C does: running requests get the time that --shutdown-timeout gives them. Waits for it."""
        if self._process is None or not self.running:
            return
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(self._timeout() + PATIENCE_S)
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            self._process.kill()
            self._process.wait()
        self._reader.join(1.0)

    def _timeout(self) -> float:
        try:
            return float(self._flag("--shutdown-timeout") or os.environ.get("APPLIANCE_SHUTDOWN_TIMEOUT") or 5)
        except ValueError:
            return 5.0


def hold_port(host: str) -> socket.socket:
    """Has a free port of the host, or of 127.0.0.1 where that is none of this machine's: the server will say so.

    While it is open the system gives the port to nobody who asks for any, and a server, which names it (and says SO_REUSEADDR,
    too), can listen there. Raises OSError where no port is to be had.
    """
    try:
        return _bound(host)
    except (OSError, UnicodeError):
        return _bound("127.0.0.1")


def _bound(host: str) -> socket.socket:
    family, kind, protocol, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
    except OSError:
        sock.close()
        raise
    return sock


def _without(flags: Sequence[str], name: str) -> list[str]:
    kept, skip = [], False
    for one in flags:
        if not skip and one != name and not one.startswith(f"{name}="):
            kept.append(one)
        skip = one == name and not skip
    return kept


def as_log(line: str) -> LogLine:
    """A line of the server's output: ``DATE TIME LEVEL LOGGER: MESSAGE`` where the log wrote it, else words."""
    parts = line.split(" ", 4)
    if len(parts) == 5 and parts[2] in LEVELS and parts[3].endswith(":"):
        return LogLine(f"{parts[0]}T{parts[1]}", LEVELS[parts[2]], parts[3][:-1], parts[4])
    return LogLine("", "error" if line.startswith("appliance: error") else "", "", line)
