"""Pages of other places may not use a server without keys: by a name of theirs (DNS rebinding), nor by sending blindly."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from appliance.config import EngineConfig, ServerConfig
from appliance.text.tokenizer import Tokenizer
from tests.server.conftest import Served, serve_in_thread
from tests.server.fake import FakeClient

BODY = {"prompt": "ab", "max_tokens": 2}
OURS = ["127.0.0.1:8000", "[::1]:8000", "10.1.2.3", "localhost", "LOCALHOST:8000", "localhost.", "a.localhost", "pi.local:8000"]
OURS += ["appliance:8000", "host.docker.internal:8000"]
THEIRS = ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "localhost.evil.example", "1.2.3", "a.b:x", "[::1"]


@pytest.fixture
def start(tokenizer: Tokenizer, model_dir: Path) -> Iterator[Callable[..., Served]]:
    with ExitStack() as stack:

        def begin(**options: Any) -> Served:
            server = ServerConfig(served_model_name=("tiny",), **options)
            return stack.enter_context(serve_in_thread(FakeClient, tokenizer, EngineConfig(model=str(model_dir)), server))

        yield begin


def test_names_that_a_page_can_have(served: Served) -> None:
    with served.http as http:
        for host in OURS:
            assert http.get("/v1/models", headers={"Host": host}).status_code == 200, host
        for host in THEIRS:
            answer = http.get("/v1/models", headers={"Host": host})
            assert answer.status_code == 403 and answer.json()["error"]["code"] == "host_not_allowed", host
            assert http.post("/v1/completions", json=BODY, headers={"Host": host}).status_code == 403
            assert http.get("/health", headers={"Host": host}).status_code == 200


def test_who_may_come_by_other_names(start: Callable[..., Served]) -> None:
    allowed = {"allowed_origins": ("https://chat.example",)}, {"allowed_origins": ("*",)}, {"insecure": True}
    for options in allowed:
        with start(**options).http as http:
            assert http.get("/v1/models", headers={"Host": "chat.example"}).status_code == 200
    with start(api_key=("k",)).http as http:
        assert http.get("/v1/models", headers={"Host": "evil.example", "Authorization": "Bearer k"}).status_code == 200
        assert http.get("/v1/models", headers={"Host": "evil.example"}).status_code == 401


def test_pages_of_other_places_do_not_even_send(start: Callable[..., Served]) -> None:
    served = start(allowed_origins=("https://chat.example",))
    cross = {"Sec-Fetch-Site": "cross-site", "Content-Type": "text/plain"}
    with served.http as http:
        for origin in ("https://evil.example", "null", "http://chat.example"):
            answer = http.post("/v1/completions", json=BODY, headers={**cross, "Origin": origin})
            assert answer.status_code == 403 and answer.json()["error"]["code"] == "origin_not_allowed"
        assert http.post("/v1/completions", json=BODY, headers=cross).status_code == 403
        assert not served.client.submitted
        for headers in ({**cross, "Origin": "https://chat.example"}, {"Sec-Fetch-Site": "same-origin", "Origin": served.url}, {}):
            assert http.post("/v1/completions", json=BODY, headers=headers).status_code == 200
