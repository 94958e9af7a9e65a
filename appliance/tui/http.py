"""How the dashboard talks to a server: /stats, or /metrics under vLLM's names; the log; an end to a request."""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.request
from typing import Any, Protocol
from urllib.parse import quote
from urllib.request import OpenerDirector

from appliance.tls import base_url, no_answer, opener
from appliance.tui.vllm import NotVllm, VllmMetrics
from quant.errors import InputError

TIMEOUT = 5.0  # seconds to wait for an answer
MOST_BYTES = 32 << 20  # of an answer


class FeedError(InputError):
    """The server does not answer, or not as expected; says which."""


class NotOurs(FeedError):
    """Something answers, but no server of ours: /metrics may tell more."""


class Source(Protocol):
    """Where a feed has its news from."""

    url: str
    model: str | None

    def stats(self) -> dict[str, Any]: ...
    def log(self, after: int) -> dict[str, Any]: ...
    def cancel(self, request_id: str) -> str: ...


def ask(url: str, api_key: str | None = None, *, method: str = "GET", by: OpenerDirector | None = None) -> bytes:
    """The body of an answer with a status below 300. Asks the server itself, never a proxy. Raises HTTPError, OSError."""
    headers = {} if not api_key else {"Authorization": f"Bearer {api_key}"}
    request = urllib.request.Request(url, headers=headers, method=method)
    with (by or opener(url, None)).open(request, timeout=TIMEOUT) as answer:
        body: bytes = answer.read(MOST_BYTES)
        return body


def _get(url: str, path: str, api_key: str | None, by: OpenerDirector | None) -> bytes:
    """Raises FeedError; NotOurs where there is no such route."""
    try:
        return ask(f"{url}{path}", api_key, by=by)
    except urllib.error.HTTPError as error:
        if error.code == 401:
            raise FeedError(f"{url} asks for a key: give one of its own as --api-key, or in APPLIANCE_API_KEY") from error
        words = _words(error)
        told = error.code == 400 or (error.code == 404 and b'"model_not' in words)  # as of a port of HTTPS
        if told and (said := _message(words)) is not None:
            raise FeedError(f"{url}{path} answers {error.code}: {said}") from error
        kind = NotOurs if error.code in (404, 405) else FeedError
        raise kind(f"{url}{path} answers {error.code} {error.reason}: is this an appliance server?") from error
    except Exception as error:
        raise _no_answer(url, error) from error


def _no_answer(url: str, error: Exception) -> FeedError:
    if isinstance(error, OSError):
        return FeedError(no_answer(url, error))
    return FeedError(f"{url} does not answer by HTTP: {type(error).__name__}: {error}")  # http.client has many ways to say so


def _words(error: urllib.error.HTTPError) -> bytes:
    """The body of an error; nothing where it does not come."""
    try:
        return error.read(2000)
    except (OSError, ValueError, http.client.HTTPException):
        return b""


def _message(body: bytes) -> str | None:
    """Of an error in OpenAI's form; None of another."""
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return None


def fetch(url: str, api_key: str | None = None, path: str = "/stats", *, by: OpenerDirector | None = None) -> dict[str, Any]:
    """GET ``url`` + ``path``: a JSON object. Raises FeedError."""
    try:
        body = json.loads(_get(url, path, api_key, by))
    except ValueError as error:
        if isinstance(error, FeedError):
            raise
        raise NotOurs(f"{url}{path} does not answer in JSON: is this an appliance server?") from error
    if not isinstance(body, dict):
        raise NotOurs(f"{url}{path} is not a JSON object: is this an appliance server?")
    return body


class Server:
    """A server by HTTP. What has no /stats is asked for vLLM's /metrics, which come in the shape of /stats."""

    def __init__(self, url: str, api_key: str | None = None, *, ca_certs: str | None = None, insecure: bool = False) -> None:
        """Raises InputError for an address that is none, and a file of certificates that does not do."""
        self.url, self.api_key = base_url(url), api_key
        self._opener = opener(self.url, ca_certs, insecure=insecure)
        self.model: str | None = None  # of several, the one that is asked about
        self._metrics: VllmMetrics | None = None  # once it was found out that these are all there is

    def stats(self) -> dict[str, Any]:
        """Raises FeedError."""
        if self._metrics is not None:
            try:
                return self._metrics.body(self._text("/metrics"), time.monotonic(), time.time())
            except (FeedError, NotVllm):
                self._metrics = None  # who comes back may be another one
        try:
            return self._json(f"/stats?model={quote(self.model, safe='')}" if self.model else "/stats")
        except NotOurs as error:
            return self._vllm(error)

    def _vllm(self, error: NotOurs) -> dict[str, Any]:
        """The first look at /metrics. Raises what is wrong with /stats where they are none of vLLM's."""
        try:
            text = self._text("/metrics")
            metrics = VllmMetrics(self._version())
            body = metrics.body(text, time.monotonic(), time.time())
        except (NotOurs, NotVllm):
            raise error from None
        self._metrics = metrics
        return body

    def _version(self) -> str:
        try:
            return str(self._json("/version").get("version", ""))
        except FeedError:
            return ""

    def _text(self, path: str) -> str:
        return _get(self.url, path, self.api_key, self._opener).decode(errors="replace")

    def _json(self, path: str) -> dict[str, Any]:
        return fetch(self.url, self.api_key, path, by=self._opener)

    def log(self, after: int) -> dict[str, Any]:
        """``{"lines": [...], "next": N}``. Raises FeedError."""
        return self._json(f"/logs?after={after}")

    def cancel(self, request_id: str) -> str:
        """Abort a request. Returns what the server says to it; never raises for an answer, FeedError for none."""
        url = f"{self.url}/v1/requests/{quote(request_id, safe='')}"
        try:
            ask(url, self.api_key, method="DELETE", by=self._opener)
        except urllib.error.HTTPError as error:
            return _message(_words(error)) or f"the server answers {error.code} {error.reason}"
        except Exception as error:
            raise _no_answer(self.url, error) from error
        return f"{request_id} is cancelled"
