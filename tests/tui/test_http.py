"""What the dashboard asks of servers, over real sockets: ours, vLLM's, and others."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from appliance.tui.feed import Feed
from appliance.tui.http import FeedError, Server, base_url, fetch
from quant.errors import InputError
from tests.tui.stage import VLLM_METRICS

URLS = [
    ("localhost:80/", "http://localhost:80"),
    ("https://a.b", "https://a.b"),
    ("http://[::1]:8000", "http://[::1]:8000"),
    ("a/v1/", "http://a"),
]
Answer = tuple[int, bytes]


@pytest.mark.parametrize(("given", "url"), URLS)
def test_base_url(given: str, url: str) -> None:
    assert base_url(given) == url


@pytest.mark.parametrize("given", ["ftp://a", "http://", "http://a:0", "http://a:x", "http://[bad", ""])
def test_base_url_refuses(given: str) -> None:
    with pytest.raises(InputError, match=r"is not the address of a server: it looks like http://127.0.0.1:8000"):
        base_url(given)


class Site:
    """Answers by path; ``asked`` has (method, path, key)."""

    def __init__(self, answers: dict[str, Answer | Callable[[], Answer]]) -> None:
        self.answers, self.asked, self.key = answers, [], None
        site = self

        class Handler(BaseHTTPRequestHandler):
            def answer(self) -> None:
                key = self.headers.get("Authorization")
                site.asked.append((self.command, self.path, key))
                found = site.answers.get(self.path, (404, b'{"detail":"Not Found"}'))
                status, body = found() if callable(found) else found
                if site.key is not None and key != f"Bearer {site.key}":
                    status, body = 401, b"{}"
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            do_GET = do_DELETE = answer

            def log_message(self, *args: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"


@contextmanager
def answering(**answers: Answer | Callable[[], Answer]) -> Iterator[Site]:
    """Of the path /NAME, by keyword."""
    site = Site({f"/{name}": answer for name, answer in answers.items()})
    with site.http:
        thread = threading.Thread(target=site.http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield site
        finally:
            site.http.shutdown()
            thread.join()


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        (404, b"{}", "answers 404 Not Found: is this an appliance server"),
        (500, b"{}", "answers 500 Internal Server Error"),
        (200, b"<html>", "does not answer in JSON"),
        (200, b"\xff", "does not answer in JSON"),
        (200, b"[]", "is not a JSON object"),
        (404, b'{"error":{"message":"no such model","code":"model_not_found"}}', "answers 404: no such model"),
        (400, b'{"error":{"message":"this port speaks HTTPS"}}', "answers 400: this port speaks HTTPS"),
        (400, b"<html>", "answers 400 Bad Request: is this an appliance server"),
        (400, b"[1]", "answers 400 Bad Request: is this an appliance server"),
    ],
)
def test_says_what_is_wrong(status: int, body: bytes, message: str) -> None:
    with answering(stats=(status, body)) as site:
        with pytest.raises(FeedError, match=message):
            fetch(site.url)
        with pytest.raises(FeedError, match=message):
            Server(site.url).stats()


def test_never_asks_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with answering(stats=(200, b'{"state": "ok"}')) as site:
        assert fetch(site.url) == {"state": "ok"}
    with pytest.raises(FeedError, match=f"no answer from {site.url}: Connection refused"):
        fetch(site.url)


def test_what_speaks_no_http_is_an_error_of_its_own() -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:

        def talk() -> None:
            with sock.accept()[0] as peer:
                peer.recv(65536)
                peer.sendall(b"SSH-2.0-OpenSSH_9.6\r\n\r\n")

        threading.Thread(target=talk, daemon=True).start()
        with pytest.raises(FeedError, match="does not answer by HTTP: BadStatusLine"):
            fetch(f"http://127.0.0.1:{sock.getsockname()[1]}")


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b"HTTP/1.1 500 Oops\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", "answers 500 Oops: is this an appliance server"),
        (b"HTTP/1.1 502 Oops\r\nTransfer-Encoding: chunked\r\n\r\n", "answers 502 Oops: is this an appliance server"),
        (b"HTTP/1.1 400 No\r\nContent-Length: 6\r\n\r\n<html>", "answers 400 No: is this an appliance server"),
        (b"SSH-2.0-OpenSSH_9.6\r\n\r\n", "does not answer by HTTP: BadStatusLine"),
    ],
)
def test_what_answers_everything_so_is_an_error_and_no_crash(answer: bytes, message: str) -> None:
    """As a proxy may: /metrics and /logs as well, and bodies that break off."""
    with socket.create_server(("127.0.0.1", 0)) as sock:

        def talk() -> None:
            for _ in range(3):
                with sock.accept()[0] as peer:
                    peer.recv(65536)
                    peer.sendall(answer)

        threading.Thread(target=talk, daemon=True).start()
        server = Server(f"http://127.0.0.1:{sock.getsockname()[1]}")
        for ask in (server.stats, lambda: server.log(0)):
            with pytest.raises(FeedError, match=message):
                ask()
        if answer.startswith(b"HTTP"):
            assert server.cancel("one").startswith("the server answers ")
        else:
            with pytest.raises(FeedError, match=message):
                server.cancel("one")


def test_a_server_with_keys_is_asked_with_one() -> None:
    with answering(stats=(200, b'{"version": "1"}')) as site:
        site.key = "secret"
        assert Server(site.url, "secret").stats() == {"version": "1"}
        with pytest.raises(FeedError, match="asks for a key: give one of its own as --api-key"):
            Server(site.url).stats()
        assert [key for _, _, key in site.asked] == ["Bearer secret", None]


def test_cancels_by_public_id_and_repeats_the_servers_words() -> None:
    refusal = {"error": {"message": "no running request has the id 'theirs'", "code": "request_not_found"}}
    answers = {"/v1/requests/cmpl-my%2Fown": (200, b"{}"), "/v1/requests/theirs": (404, json.dumps(refusal).encode())}
    with answering() as site:
        site.answers |= answers
        server = Server(site.url, "mine")
        assert server.cancel("cmpl-my/own") == "cmpl-my/own is cancelled"
        assert server.cancel("theirs") == "no running request has the id 'theirs'"
        assert server.cancel("strange") == "the server answers 404 Not Found"
        assert site.asked[0] == ("DELETE", "/v1/requests/cmpl-my%2Fown", "Bearer mine")
    with pytest.raises(FeedError, match="no answer from"):
        server.cancel("theirs")


def test_asks_for_one_of_several_models() -> None:
    with answering() as site:
        site.answers["/stats?model=org%2Fb"] = (200, b'{"model": "org/b"}')
        server = Server(site.url)
        server.model = "org/b"
        assert server.stats() == {"model": "org/b"}


def test_reads_the_log_from_where_it_stopped() -> None:
    with answering() as site:
        site.answers["/logs?after=0"] = (200, b'{"lines": [{"seq": 1, "level": "info", "message": "a"}], "next": 1}')
        site.answers["/logs?after=1"] = (200, b'{"lines": [], "next": 1}')
        feed = Feed(Server(site.url))
        feed.poll_log()
        feed.poll_log()
        assert [line.message for line in feed.log] == ["a"] and feed.log_error is None
        del site.answers["/logs?after=1"]
        feed.poll_log()
        assert feed.log_error is not None and "answers 404" in feed.log_error and len(feed.log) == 1


def test_a_server_with_vllms_metrics_alone() -> None:
    metrics = VLLM_METRICS.read_bytes()
    with answering(metrics=(200, metrics), version=(200, b'{"version": "0.11.0"}')) as site:
        server = Server(site.url)
        feed = Feed(server)
        feed.poll()
        feed.poll()
        assert feed.error is None and feed.view is not None
        assert (feed.view.kind, feed.view.version, feed.view.listed) == ("vllm", "0.11.0", False)
        assert feed.view.stats.running == 17 and feed.view.stats.blocks_total == 14835
        assert [path for _, path, _ in site.asked] == ["/stats", "/metrics", "/version", "/metrics"], "found out once"
        site.answers["/stats"] = (200, b'{"version": "1", "state": "ok"}')
        del site.answers["/metrics"]
        assert server.stats() == {"version": "1", "state": "ok"}, "who comes back may be another one"


@pytest.mark.parametrize("text", [b"# HELP a b\na 1\n", b"{", b"vllm:x{ 1"])
def test_other_metrics_are_told_as_a_missing_stats(text: bytes) -> None:
    with answering(metrics=(200, text)) as site, pytest.raises(FeedError, match="/stats answers 404 Not Found: is this an"):
        Server(site.url).stats()
