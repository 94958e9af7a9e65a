"""What a connection may cost: headers, slow and silent clients; other origins; TLS."""

from __future__ import annotations

import json
import logging
import re
import resource
import socket
import ssl
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from appliance import cli
from appliance.chat import run as chat
from appliance.chat.client import ChatError
from appliance.chat.client import Server as ChatServer
from appliance.config import EngineConfig, ServerConfig
from appliance.server import http as server_http
from appliance.server import respond
from appliance.text.tokenizer import Tokenizer
from tests.server.conftest import Served, serve_in_thread
from tests.server.fake import FakeClient
from tests.server.test_keys import bearer
from tests.server.test_lifecycle import LONG, eventually

Start = Callable[..., AbstractContextManager[Served]]
SOON_S = 0.75 * server_http.READ_S  # what took less was ended by the shorter time that a test has set


@pytest.fixture
def start(tokenizer: Tokenizer, model_dir: Path) -> Start:
    def start(delay_s: float = 0.0, **options: Any) -> AbstractContextManager[Served]:
        config = ServerConfig(served_model_name=("tiny",), **options)
        return serve_in_thread(lambda: FakeClient(delay_s=delay_s), tokenizer, EngineConfig(model=str(model_dir)), config)

    return start


def connect(served: Served) -> socket.socket:
    url = urlsplit(served.url)
    return socket.create_connection((url.hostname, url.port), timeout=20)


def ping(sock: socket.socket) -> None:
    sock.sendall(b"GET /ping HTTP/1.1\r\nhost: a\r\n\r\n")
    found = b""
    while not found.endswith(b"}"):
        found += sock.recv(65536)
    assert found.startswith(b"HTTP/1.1 200 OK")


def rest(sock: socket.socket) -> bytes:
    """What still comes until the server closes."""
    found = b""
    with suppress(ConnectionResetError):
        while data := sock.recv(65536):
            found += data
    return found


@pytest.mark.parametrize("headers", [{f"x-{i}": "1" for i in range(101)}, {"x-long": "a" * 33000}, {"cookie": "a" * 40000}])
def test_header_floods(served: Served, headers: dict[str, str]) -> None:
    with served.http as http:
        response = http.post("/v1/completions", json={"prompt": "a"}, headers=headers)
    if response.headers["content-type"] == "application/json":
        assert response.status_code == 431 and "the limit is 100 headers of 32768 bytes" in response.json()["error"]["message"]
    else:
        assert response.status_code == 400  # they came in pieces, and the connection was closed
    with served.http as http:
        assert http.get("/ping", headers={f"x-{i}": "1" for i in range(50)}).status_code == 200


def test_headers_without_an_end(served: Served) -> None:
    with connect(served) as sock:
        sock.sendall(b"GET /ping HTTP/1.1\r\n")
        try:
            for i in range(10_000):
                sock.sendall(b"x-%d: y\r\n" % i)
        except OSError:
            pass  # it was closed on the way
        found = rest(sock)
        assert found.startswith(b"HTTP/1.1 400") or not found


@pytest.mark.parametrize("head", [b"", b"GET", b"GET /ping HTTP/1.1\r\nhost: a\r\n"])
def test_clients_that_stop_before_they_have_asked(start: Start, head: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_http, "READ_S", 0.5)
    with start() as served:
        begun = time.monotonic()
        with connect(served) as sock, suppress(ConnectionError):
            sock.sendall(head)
            sock.settimeout(0.1)
            data = None
            while data != b"" and time.monotonic() - begun < SOON_S:
                with suppress(TimeoutError):
                    data = sock.recv(9)
                sock.sendall(head and b"a")  # a byte now and then buys no time
        assert 0.4 < time.monotonic() - begun < SOON_S
        monkeypatch.undo()
        assert served.post("/v1/completions", prompt="a", max_tokens=1).status_code == 200


def test_the_second_request_of_a_connection_has_its_time_too(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    with start() as served, connect(served) as sock:
        ping(sock)
        monkeypatch.setattr(server_http, "READ_S", 0.5)
        ping(sock)
        time.sleep(1.0)  # idle between requests: that is what keep-alive is for
        ping(sock)
        begun = time.monotonic()
        sock.sendall(b"GET /ping")
        rest(sock)
        assert 0.4 < time.monotonic() - begun < SOON_S


def test_a_long_answer_is_no_slow_client(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_http, "READ_S", 1.0)
    monkeypatch.setattr(respond, "BODY_S", 1.0)
    body = json.dumps({"prompt": "abc", "max_tokens": 75, "ignore_eos": True}).encode()
    with start(0.02) as served:
        begun = time.monotonic()
        with connect(served) as sock:  # all of it at once: there is nothing to wait for
            sock.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
            assert sock.recv(65536).startswith(b"HTTP/1.1 200") and time.monotonic() - begun > 1.4


def test_a_body_that_does_not_come(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(respond, "BODY_S", 0.3)
    with start() as served, connect(served) as sock:
        ping(sock)
        monkeypatch.setattr(server_http, "READ_S", 0.3)
        begun = time.monotonic()
        sock.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: 1000\r\n\r\n{")
        found = rest(sock)
        assert found.startswith(b"HTTP/1.1 408") and b'"code":"request_timeout"' in found
        assert time.monotonic() - begun < SOON_S
        assert not served.state.jobs


def test_a_slow_body_that_comes(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(respond, "BODY_S", 0.3)
    monkeypatch.setattr(respond, "BODY_RATE", 1)
    body = json.dumps({"prompt": "abc", "max_tokens": 1}).encode()
    with start() as served, connect(served) as sock:
        head = b"POST /v1/completions HTTP/1.1\r\nhost: a\r\nconnection: close\r\ncontent-length: %d\r\n\r\n" % len(body)
        sock.sendall(head + body[:10])
        for byte in body[10:]:  # 0.6 s in all, faster than the rate asks for
            time.sleep(0.02)
            sock.sendall(bytes([byte]))
        assert rest(sock).startswith(b"HTTP/1.1 200")


def test_a_refused_body_is_not_waited_for(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    with start(api_key=("sk-x",)) as served, connect(served) as sock:
        ping(sock)
        monkeypatch.setattr(server_http, "READ_S", 0.3)
        begun = time.monotonic()
        sock.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: 100000\r\n\r\n")
        assert rest(sock).startswith(b"HTTP/1.1 401") and time.monotonic() - begun < SOON_S


def test_a_client_that_does_not_read(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_http, "WRITE_S", 0.5)
    body = json.dumps({**LONG, "n": 100, "temperature": 1, "logprobs": 5, "stream": True}).encode()
    with start(0.002) as served, socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        url = urlsplit(served.url)
        sock.connect((url.hostname, url.port))
        sock.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
        eventually(lambda: served.state.jobs)
        eventually(lambda: not served.state.jobs)  # its place is free, though it never said that it had gone
        eventually(lambda: served.client.aborted)
        assert served.client.tokens < 100 * 400
        assert served.post("/v1/completions", prompt="a", max_tokens=1).status_code == 200


def test_machines_that_go_away_without_a_word_are_noticed(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as one machine can show it: the kernel is told to look after the peer."""
    seen: list[list[int]] = []
    made = server_http.Protocol.connection_made

    def connection_made(self: Any, transport: Any) -> None:
        made(self, transport)
        sock = transport.get_extra_info("socket")
        found = [sock.getsockopt(socket.IPPROTO_TCP, getattr(socket, name)) for name, _ in server_http.PEER]
        seen.append([sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE), *found])

    monkeypatch.setattr(server_http.Protocol, "connection_made", connection_made)
    with start() as served:
        assert served.post("/v1/completions", prompt="a", max_tokens=1).status_code == 200
    assert seen == [[1, 30, 10, 3, 60_000]]


def test_as_many_open_files_as_the_system_allows() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 512), hard))
        server_http.raise_file_limit()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (min(hard, 65_536), hard)
        server_http.raise_file_limit()
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == min(hard, 65_536)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_no_other_origins_by_default(served: Served) -> None:
    page = {"Origin": "https://chat.example", "Access-Control-Request-Method": "POST"}
    with served.http as http:
        for response in (http.options("/v1/chat/completions", headers=page), http.get("/v1/models", headers=page)):
            assert not [name for name in response.headers if name.startswith("access-control")]


def test_allowed_origins(start: Start) -> None:
    page = {"Origin": "https://chat.example"}
    wish = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}
    with start(allowed_origins=("https://chat.example",), api_key=("sk-x",)) as served, served.http as http:
        leave = http.options("/v1/chat/completions", headers={**page, **wish})  # without a key: browsers send none here
        assert leave.status_code == 200 and leave.headers["access-control-allow-origin"] == "https://chat.example"
        assert "authorization" in leave.headers["access-control-allow-headers"].lower()
        body = {"prompt": "abc", "max_tokens": 1}
        for key, status in (("sk-x", 200), ("sk-y", 401)):
            answer = http.post("/v1/completions", json=body, headers={**page, **bearer(key)})
            assert answer.status_code == status and answer.headers["access-control-allow-origin"] == "https://chat.example"
            assert "x-request-id" in answer.headers["access-control-expose-headers"].lower()
            assert "access-control-allow-credentials" not in answer.headers
        other = {"Origin": "https://evil.example"}
        refused = http.options("/v1/completions", headers={**other, **wish})
        assert refused.status_code == 400 and refused.json()["error"]["code"] == "origin_not_allowed"
        assert refused.headers["vary"].startswith("Origin") and "access-control-allow-origin" not in refused.headers
        answer = http.post("/v1/completions", json=body, headers={**other, **bearer("sk-x")})
        assert "access-control-allow-origin" not in answer.headers
    with start(allowed_origins=("*",)) as served, served.http as http:
        assert http.get("/v1/models", headers={"Origin": "null"}).headers["access-control-allow-origin"] == "*"


@pytest.fixture(scope="module")
def papers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An authority, and certificates that it signed for the server and for a client."""
    place = tmp_path_factory.mktemp("tls")

    def openssl(*args: str) -> None:
        subprocess.run(["openssl", *args], cwd=place, check=True, capture_output=True)

    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1")
    openssl("req", "-x509", *key, "-nodes", "-keyout", "ca.key", "-out", "ca.pem", "-subj", "/CN=test", "-days", "2")
    (place / "names").write_text("subjectAltName=IP:127.0.0.1,DNS:localhost\n")
    for name in ("server", "client"):
        openssl("req", "-new", *key, "-nodes", "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}")
        sign = ("-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2", "-extfile", "names")
        openssl("x509", "-req", "-in", f"{name}.csr", *sign, "-out", f"{name}.pem")
    openssl("ec", "-in", "server.key", "-aes256", "-passout", "pass:secret", "-out", "locked.key")
    return place


def test_plain_http_to_a_port_of_https(start: Start, papers: Path) -> None:
    """Is told so; whoever does not encrypt at all, and whoever does, is treated as ever."""
    trust = ssl.create_default_context(cafile=str(papers / "ca.pem"))
    with start(ssl_certfile=str(papers / "server.pem"), ssl_keyfile=str(papers / "server.key")) as served:
        port = int(served.url.rpartition(":")[2])
        for path in ("/v1/models", "/" + "x" * 5000):
            answer = httpx.get(f"http://127.0.0.1:{port}{path}", trust_env=False)
            assert answer.status_code == 400 and "https://" in answer.json()["error"]["message"]
        posted = httpx.post(f"http://127.0.0.1:{port}/v1/completions", json={"prompt": "x" * 100_000}, trust_env=False)
        assert posted.status_code == 400
        with socket.create_connection(("127.0.0.1", port)) as rubbish:
            rubbish.sendall(b"\r\n\r\nwhat?")
            assert b"HTTP" not in rubbish.recv(1000)
        assert httpx.get(f"https://localhost:{port}/health", verify=trust, trust_env=False).status_code == 200


def test_tls(start: Start, papers: Path) -> None:
    trust = ssl.create_default_context(cafile=str(papers / "ca.pem"))
    with start(ssl_certfile=str(papers / "server.pem"), ssl_keyfile=str(papers / "server.key")) as served:
        with httpx.Client(base_url=served.url, verify=trust, trust_env=False, timeout=10) as http:
            assert http.base_url.scheme == "https" and http.get("/health").json() == {"status": "ok"}
            with http.stream("POST", "/v1/completions", json={"prompt": "abc", "max_tokens": 2, "stream": True}) as response:
                assert list(response.iter_lines())[-2] == "data: [DONE]"
        with pytest.raises(httpx.ConnectError):  # an authority that it does not know
            httpx.get(f"{served.url}/health", trust_env=False)
        with connect(served) as sock:
            sock.sendall(b"GET /health HTTP/1.1\r\nhost: a\r\n\r\n")
            assert sock.recv(100_000).startswith(b"HTTP/1.1 400 Bad Request\r\n")


def test_clients_that_keep_a_connection_hold_up_no_end(start: Start, papers: Path, caplog: pytest.LogCaptureFixture) -> None:
    """They read nothing until they ask again, the end of TLS neither; it is there for them all the same."""
    trust = ssl.create_default_context(cafile=str(papers / "ca.pem"))
    with start(ssl_certfile=str(papers / "server.pem"), ssl_keyfile=str(papers / "server.key")) as served:
        sock = trust.wrap_socket(connect(served), server_hostname="127.0.0.1", suppress_ragged_eofs=False)
        sock.sendall(b"GET /ping HTTP/1.1\r\nhost: a.local\r\n\r\n")
        assert sock.recv(9).startswith(b"HTTP/1.1")
    assert not [one for one in caplog.records if "timeout graceful shutdown exceeded" in one.getMessage()]
    with sock:
        assert b"".join(iter(lambda: sock.recv(9000), b"")).endswith(b'{"status":"ok"}')


def test_our_own_clients_trust_whom_they_are_told_to(
    start: Start, papers: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hint = "is not trusted (unable to get local issuer certificate): --ssl-ca-certs FILE says whose certificates are trusted"
    monkeypatch.setenv("APPLIANCE_INSECURE", "1")  # which is for servers
    monkeypatch.setenv("APPLIANCE_SSL_CA_CERTS", str(papers / "ca.pem"))
    trusting = (["--ssl-ca-certs", str(papers / "ca.pem")], ["--insecure"])
    with start(ssl_certfile=str(papers / "server.pem"), ssl_keyfile=str(papers / "server.key")) as served:
        assert cli.run(["tui", "--once", "--url", served.url]) == 1 and hint in capsys.readouterr().err
        for flags in trusting:
            assert cli.run(["tui", "--once", "--url", served.url, *flags]) == 0
        asked: list[chat.Asked] = []
        with monkeypatch.context() as patch:
            patch.setattr(chat, "main", lambda one: asked.append(one) or 0)
            for flags in ([], *trusting):
                assert cli.run(["chat", "--url", served.url, *flags]) == 0
        with pytest.raises(ChatError, match=re.escape(hint)):
            ChatServer(served.url, **asked[0].tls).health()
        assert [list(ChatServer(served.url, **one.tls).models()) for one in asked[1:]] == [["tiny"], ["tiny"]]
    assert cli.run(["tui", "--once", "--url", served.url, "--ssl-ca-certs", str(papers / "names")]) == 2
    assert f"--ssl-ca-certs {papers / 'names'}: no certificate" in capsys.readouterr().err


def test_clients_that_must_show_a_certificate(start: Start, papers: Path) -> None:
    options = {"ssl_certfile": "server.pem", "ssl_keyfile": "server.key", "ssl_ca_certs": "ca.pem"}
    with start(**{name: str(papers / file) for name, file in options.items()}) as served:
        trust = ssl.create_default_context(cafile=str(papers / "ca.pem"))
        with pytest.raises(httpx.TransportError):
            httpx.get(f"{served.url}/health", verify=trust, trust_env=False)
        trust.load_cert_chain(papers / "client.pem", papers / "client.key")
        assert httpx.get(f"{served.url}/health", verify=trust, trust_env=False).status_code == 200


@pytest.fixture
def tls(start: Start, papers: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    """Over TLS, with few connections."""
    monkeypatch.setattr(server_http, "most_connections", lambda: 4)
    with start(ssl_certfile=str(papers / "server.pem"), ssl_keyfile=str(papers / "server.key")) as served:
        yield served


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """With little time for handshakes, of the server that starts behind this."""
    monkeypatch.setattr(server_http, "READ_S", 1.0)


@pytest.mark.parametrize("hello", [b"", b"\x16\x03\x01\x02\x00\x01", b"\x16\x03"])
def test_handshakes_have_an_end(impatient: None, tls: Served, hello: bytes) -> None:
    begun = time.monotonic()
    with connect(tls) as sock:
        sock.sendall(hello)
        rest(sock)
        assert 0.9 < time.monotonic() - begun < SOON_S


def test_a_client_that_says_nothing_after_its_handshake(tls: Served, papers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a server that has time for handshakes, but not for heads."""
    monkeypatch.setattr(server_http, "READ_S", 1.0)
    trust = ssl.create_default_context(cafile=str(papers / "ca.pem"))
    begun = time.monotonic()
    with connect(tls) as sock, trust.wrap_socket(sock, server_hostname="127.0.0.1") as secure:
        with pytest.raises(OSError):  # without the words of TLS for the end
            secure.sendall(b"GET /ping HTTP/1.1\r\n")
            assert not secure.recv(9)
            raise ConnectionResetError
        assert 0.9 < time.monotonic() - begun < SOON_S


def test_handshakes_count_as_connections(tls: Served, papers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    accepted: list[server_http.Accepted] = []
    take = server_http.Accepted

    def noted(*args: Any) -> server_http.Accepted:
        accepted.append(take(*args))
        return accepted[-1]

    monkeypatch.setattr(server_http, "Accepted", noted)
    silent = [connect(tls) for _ in range(4)]
    eventually(lambda: len(accepted) == 4)
    begun = time.monotonic()
    with connect(tls) as one_more:
        assert rest(one_more) == b"" and time.monotonic() - begun < SOON_S, "at once, and without an answer"
    trust = ssl.create_default_context(cafile=str(papers / "ca.pem"))
    with httpx.Client(base_url=tls.url, verify=trust, trust_env=False, timeout=10) as http:
        with pytest.raises(httpx.TransportError):
            http.get("/ping")
        for sock in silent:
            sock.close()
        eventually(lambda: _answers(http))
    _not_counted_any_more(tls, trust)


def test_handshakes_that_came_to_nothing_do_not_count(impatient: None, tls: Served, papers: Path) -> None:
    silent = [connect(tls) for _ in range(4)]
    for sock in silent:
        rest(sock)
    _not_counted_any_more(tls, ssl.create_default_context(cafile=str(papers / "ca.pem")))
    for sock in silent:
        sock.close()


def _not_counted_any_more(tls: Served, trust: ssl.SSLContext) -> None:
    """Three times as many as there may be at once."""
    for _ in range(12):
        with httpx.Client(base_url=tls.url, verify=trust, trust_env=False, timeout=10) as http:
            eventually(lambda http=http: _answers(http))
        connect(tls).close()


def _answers(http: httpx.Client) -> bool:
    try:
        return http.get("/ping").status_code == 200
    except httpx.TransportError:
        return False


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--ssl-keyfile server.key", "--ssl-keyfile needs --ssl-certfile"),
        ("--ssl-ca-certs ca.pem", "--ssl-ca-certs needs --ssl-certfile"),
        ("--ssl-certfile none.pem", "--ssl-certfile none.pem: no such file or directory"),
        ("--ssl-certfile server.pem", "--ssl-certfile server.pem holds no private key: name its file with --ssl-keyfile"),
        (
            "--ssl-certfile server.key --ssl-keyfile server.pem",
            "--ssl-certfile server.key holds no certificate (PEM), but a private key, which is for --ssl-keyfile",
        ),
        ("--ssl-certfile names", "--ssl-certfile names holds no certificate (PEM)"),
        ("--ssl-certfile server.pem --ssl-keyfile ca.pem", "--ssl-keyfile ca.pem holds no private key (PEM)"),
        (
            "--ssl-certfile server.pem --ssl-keyfile client.key",
            "--ssl-certfile server.pem --ssl-keyfile client.key: key values mismatch",
        ),
        (
            "--ssl-certfile server.pem --ssl-keyfile locked.key",
            "--ssl-keyfile locked.key: keys with a password are not supported",
        ),
        ("--ssl-certfile server.pem --ssl-keyfile server.key --ssl-ca-certs names", "--ssl-ca-certs names: "),
    ],
)
def test_papers_that_do_not_do(
    flags: str, words: str, papers: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(papers)
    assert cli.run(["serve", *flags.split()]) == 2
    error = capsys.readouterr().err
    assert error.startswith("appliance: error: ") and words in error and len(error.splitlines()) == 1


def test_500_connections_that_say_nothing(
    start: Start, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(server_http, "READ_S", 2.0)
    server_http.raise_file_limit()  # both ends are in this process
    with start() as served:
        silent = [connect(served) for _ in range(500)]
        assert served.post("/v1/completions", prompt="a", max_tokens=1).status_code == 200
        for sock in silent:
            rest(sock)
            sock.close()
        assert served.post("/v1/completions", prompt="a", max_tokens=1).status_code == 200
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


@pytest.fixture
def served(start: Start) -> Iterator[Served]:
    with start() as one:
        yield one
