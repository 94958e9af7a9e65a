"""The server's API as far as a conversation needs it, with the standard library alone."""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Generator
from typing import Any

from appliance.tls import base_url, no_answer, opener
from quant.errors import InputError

TIMEOUT_S = 10.0  # for everything but answers, which take as long as they take
ASK_S = 0.3  # between two looks whether the model is loaded


class ChatError(Exception):
    """What a server says no to, or that there is none: one line for the user. ``status`` 0: it does not answer."""

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


class Server:
    """One server, asked itself and never through a proxy."""

    def __init__(self, url: str, api_key: str | None = None, *, ca_certs: str | None = None, insecure: bool = False) -> None:
        """Raises InputError for an address or a key that is none, and a file of certificates that does not do."""
        self.url = base_url(url)
        if api_key and not (api_key.isascii() and api_key.isprintable()):
            raise InputError("--api-key has characters that no key has")
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._opener = opener(self.url, ca_certs, insecure=insecure)

    def _open(self, path: str, body: dict[str, Any] | None = None, timeout: float | None = TIMEOUT_S) -> Any:
        """The response. Raises ChatError in the server's own words."""
        data, headers = None, dict(self._headers)
        if body is not None:
            data, headers["Content-Type"] = json.dumps(body).encode(), "application/json"
        request = urllib.request.Request(f"{self.url}{path}", data, headers)
        try:
            return self._opener.open(request, timeout=timeout)
        except urllib.error.HTTPError as error:
            with error:
                raise ChatError(_words(error), error.code) from None
        except OSError as error:
            raise ChatError(no_answer(self.url, error)) from None
        except http.client.HTTPException as error:
            raise ChatError(f"no answer from {self.url}: {error}") from None

    def _json(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        with self._open(path, body) as response:
            try:
                found = json.load(response)
            except (OSError, ValueError, http.client.HTTPException):
                found = None
        if not isinstance(found, dict):
            raise ChatError(f"{self.url}{path} does not answer in JSON: is this a server with OpenAI's API?", 200)
        return found

    def models(self) -> dict[str, int | None]:
        """Names of models, and their longest contexts in tokens where the server says. Raises ChatError."""
        try:
            return {card["id"]: card.get("max_model_len") for card in self._json("/v1/models")["data"]}
        except (KeyError, TypeError):
            raise ChatError(f"{self.url}/v1/models is not understood: is this a server with OpenAI's API?", 200) from None

    def count(self, model: str | None, messages: list[dict[str, Any]]) -> int:
        """Tokens of a prompt of these messages. Raises ChatError."""
        return int(self._json("/tokenize", {"model": model, "messages": messages})["count"])

    def wait(self, told: Callable[[str], None]) -> None:
        """Wait while the model loads; ``told`` hears how far it is. Raises ChatError where no server answers, or a dead one."""
        while True:
            state = self.health()
            if state.get("status") == "loading":
                done, whole = state.get("loaded_bytes", 0), state.get("total_bytes", 0)
                told(f"the model is being loaded{f', {100 * done // whole} %' if whole else ''}")
            elif state.get("status") in ("draining", "dead"):
                raise ChatError(state["error"]["message"], 503)
            else:
                return
            time.sleep(ASK_S)

    def health(self) -> dict[str, Any]:
        """The body of /health; {} where a server of another make has none. Raises ChatError where nobody answers."""
        try:
            with self._opener.open(f"{self.url}/health", timeout=TIMEOUT_S) as response:
                raw = response.read()
        except urllib.error.HTTPError as error:
            with error:
                raw = error.read()
        except OSError as error:
            raise ChatError(no_answer(self.url, error)) from None
        except http.client.HTTPException as error:
            raise ChatError(f"no answer from {self.url}: {error}") from None
        try:
            found = json.loads(raw)
        except ValueError:
            return {}
        return found if isinstance(found, dict) else {}

    def stream(self, body: dict[str, Any]) -> Generator[dict[str, Any], None, None]:
        """Chunks of a chat completion as they come; closing this ends the request. Raises ChatError."""
        with self._open("/v1/chat/completions", {**body, "stream": True}, timeout=None) as response:
            try:
                for line in response:
                    if not line.startswith(b"data:"):
                        continue
                    data = line[5:].strip()
                    if data == b"[DONE]":
                        return
                    chunk = json.loads(data)
                    if "error" in chunk:
                        raise ChatError(_message(chunk) or "the server says that there is an error", 500)
                    yield chunk
            except (OSError, ValueError, http.client.HTTPException):
                raise ChatError("the connection to the server broke off in the middle of the answer") from None
        raise ChatError("the server ended the answer before it was complete")


def _words(error: urllib.error.HTTPError) -> str:
    """What the body of an error says."""
    try:
        body = json.loads(error.read())
    except (OSError, ValueError, http.client.HTTPException):
        body = None
    words = _message(body) or f"the server answers {error.code} {error.reason}"
    return f"{words} (--api-key KEY, or APPLIANCE_API_KEY)" if error.code == 401 else words


def _message(body: Any) -> str | None:
    error = body.get("error") if isinstance(body, dict) else None
    found = error.get("message") if isinstance(error, dict) else error
    return found if isinstance(found, str) else None
