"""A server of its own for a conversation: started on a free port, with a key that nobody else knows, ended with it."""

from __future__ import annotations

import os
import re
import secrets
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from appliance import leash
from appliance.chat.client import ChatError, Server
from quant.errors import InputError

READY = re.compile(r"appliance: ready at (https?://\S+)/v1 ")
STOP_S = 10.0


class Child:
    """``appliance serve WORDS`` as a child."""

    def __init__(self, words: Sequence[str]) -> None:
        self.key = secrets.token_urlsafe(24)  # other users of this machine can reach its port as well
        self._lines: deque[str] = deque(maxlen=50)
        self._url: str | None = None
        self._process, self._leash = leash.start(
            [sys.executable, "-m", "appliance", "serve", *words, *([] if _has(words, "--port") else ["--port", "0"])],
            {**os.environ, "APPLIANCE_API_KEY": self.key},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            errors="replace",
            start_new_session=True,  # ctrl-C is for the answer, and not for the server
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.append(line.rstrip())
            if found := READY.match(line):
                self._url = found[1]
        os.close(self._leash)

    def server(self, told: Callable[[str], None], **tls: Any) -> Server:
        """Wait until it is ready; ``tls``: as Server takes it. Raises InputError with the child's own words, else ChatError."""
        begun = time.monotonic()
        while self._url is None:
            if self._process.poll() is not None:
                self._reader.join(1.0)
                raise self._reason()
            told(f"the model is being loaded, {time.monotonic() - begun:.0f} s")
            time.sleep(0.05)
        return Server(self._url, self.key, **tls)

    def _reason(self) -> Exception:
        for line in self._lines:
            if line.startswith("appliance: error: "):
                return InputError(line.removeprefix("appliance: error: "))
        return ChatError("\n".join(["the server that was started has ended:", *list(self._lines)[-5:]]))

    def stop(self) -> None:
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()


def _has(words: Sequence[str], flag: str) -> bool:
    return any(word == flag or word.startswith(f"{flag}=") for word in words)
