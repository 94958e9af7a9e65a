"""API keys over HTTP: who is let in, what stays shut, files that change while the server runs, and secrets that stay secret."""

from __future__ import annotations

import hmac
import json
import logging
import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from hashlib import sha256
from pathlib import Path
from typing import Any

import openai
import pytest

from appliance import cli
from appliance.config import EngineConfig, ServerConfig
from appliance.server import keys, run
from appliance.server.app import create_app
from appliance.server.guard import PUBLIC
from appliance.server.keys import Keyring, read_keys
from appliance.server.redact import has_key, hide
from appliance.text.tokenizer import Tokenizer
from quant.errors import InputError
from tests.server.conftest import Served, serve_in_thread
from tests.server.fake import FakeClient
from tests.server.test_lifecycle import LONG, eventually

SECRET, OTHER, OLD = "sk-hunter2-hunter2", "sk-other-other-other", "sk-old-old-old"
ASK = {"prompt": "abc", "max_tokens": 2}
Start = Callable[..., AbstractContextManager[Served]]


def digest(key: str) -> str:
    return sha256(key.encode()).hexdigest()


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.fixture
def start(tokenizer: Tokenizer, model_dir: Path) -> Start:
    def start(client: Any = FakeClient, **options: Any) -> AbstractContextManager[Served]:
        config = ServerConfig(served_model_name=("tiny",), **options)
        return serve_in_thread(client, tokenizer, EngineConfig(model=str(model_dir)), config)

    return start


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "keys.toml"
    path.write_text(f'alice = {{ sha256 = "{digest(OTHER)}" }}\nold = {{ sha256 = "{digest(OLD)}", expires = 2020-01-31 }}\n')
    return path


@pytest.fixture
def served(start: Start, file: Path) -> Iterator[Served]:
    with start(api_key=(SECRET,), api_key_file=str(file)) as one:
        yield one


def status(served: Served, key: str | None) -> int:
    with served.http as http:
        return http.post("/v1/completions", json=ASK, headers=bearer(key) if key else {}).status_code


def test_every_route_needs_a_key_but_the_public_ones(served: Served, tokenizer: Tokenizer, model_dir: Path) -> None:
    app = create_app(FakeClient(), tokenizer, EngineConfig(model=str(model_dir)), ServerConfig())
    found = {(method, path) for route in _flat(app.router.routes) for path, methods in [route] for method in methods}
    assert len(found) > 15 and {"/v1/completions", "/stats", "/metrics", "/health"} <= {path for _, path in found}
    with served.http as http:
        for method, path in found:
            response = http.request(method, path.replace("{", "").replace("}", "").replace(":path", ""))
            assert response.status_code == (200 if path in PUBLIC else 401), (method, path)
        for path in ("/nothing", "/openapi.json", "/docs", "/health/x", "/v1/health/x", "/v1/../stats", "/STATS"):
            assert http.get(path).status_code == 401, path
        assert http.post("/health").status_code == http.options("/v1/completions").status_code == 401
        assert http.get("/").status_code == 200  # a page without anybody's data


def _flat(routes: Any) -> Iterator[tuple[str, set[str]]]:
    for route in routes:
        if hasattr(route, "methods"):
            yield route.path, route.methods
        else:
            yield from _flat(getattr(route, "routes", None) or route.original_router.routes)


def test_a_key_opens(served: Served) -> None:
    with served.http as http:
        for headers in (
            bearer(SECRET),
            bearer(OTHER),
            {"authorization": f"bearer  {SECRET}"},
            {"x-api-key": SECRET},
            {"x-api-key": OTHER, "Authorization": "Basic YTpi"},
        ):
            assert http.post("/v1/completions", json=ASK, headers=headers).status_code == 200
            assert http.get("/stats", headers=headers).status_code == http.get("/metrics", headers=headers).status_code == 200


@pytest.mark.parametrize(
    ("headers", "words"),
    [
        ({}, "an API key is needed"),
        ({"Authorization": ""}, "an API key is needed"),
        ({"Authorization": "Bearer"}, "an API key is needed"),
        ({"Authorization": SECRET}, "an API key is needed"),
        ({"Authorization": f"Basic {SECRET}"}, "an API key is needed"),
        (bearer(SECRET[:-1]), "is not one of this server's"),
        (bearer(SECRET + "x"), "is not one of this server's"),
        (bearer(SECRET.upper()), "is not one of this server's"),
        (bearer(digest(OTHER)), "is not one of this server's"),  # who reads the file has no key
        (bearer(OLD), "'old' has expired"),
        ({"x-api-key": "nonsense"}, "is not one of this server's"),
        ({b"x-api-key": b"\xff\xfe"}, "is not one of this server's"),
    ],
)
def test_refusals(served: Served, headers: Any, words: str) -> None:
    with served.http as http:
        response = http.post("/v1/completions", json=ASK, headers=headers)
    error = response.json()["error"]
    assert response.status_code == 401 and words in error["message"]
    assert (error["type"], error["code"], error["param"]) == ("authentication_error", "invalid_api_key", None)
    assert response.headers["www-authenticate"].startswith("Bearer") and response.headers["x-request-id"]
    assert not served.client.submitted


def test_openai_client(served: Served) -> None:
    client = served.openai
    with pytest.raises(openai.AuthenticationError) as caught:
        client.completions.create(model="tiny", prompt="abc")
    assert caught.value.code == "invalid_api_key"
    assert client.with_options(api_key=SECRET).completions.create(model="tiny", prompt="abc").choices[0].text


def test_all_keys_are_compared_always(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = 0

    def counted(a: bytes, b: bytes) -> bool:
        nonlocal seen
        seen += 1
        return hmac.compare_digest(a, b)

    monkeypatch.setattr(keys, "hmac", type("hmac", (), {"compare_digest": staticmethod(counted)}))
    for key, expected in ((SECRET, 200), (OTHER, 200), ("wrong", 401)):
        seen = 0
        assert status(served, key) == expected and seen == 3


def test_the_file_is_read_again_when_it_changes(served: Served, file: Path, caplog: pytest.LogCaptureFixture) -> None:
    good = file.read_text()
    assert status(served, "sk-new") == 401
    file.write_text(good + f'new = {{ sha256 = "{digest("sk-new")}" }}\n')
    assert status(served, "sk-new") == 200
    broken = ["new = {", 'new = "sk-new"', "[alice]\nsha256 = 3", 'alice = { sha256 = "ab" }', "\xff\x00"]
    for text in broken:
        caplog.clear()
        file.write_text(text)
        assert [status(served, key) for key in ("sk-new", OTHER, SECRET)] == [200, 200, 200]
        told = [r.getMessage() for r in caplog.records if r.levelno == logging.ERROR]
        assert len(told) == 1 and str(file) in told[0] and "stay valid" in told[0]
    caplog.clear()
    file.unlink()
    assert [status(served, key) for key in ("sk-new", OTHER)] == [200, 200]
    assert sum("is gone" in r.getMessage() for r in caplog.records) == 1
    other = file.with_name("other")
    other.write_text(good)
    os.replace(other, file)  # as editors and deployments do
    assert [status(served, key) for key in ("sk-new", OTHER)] == [401, 200]
    file.write_text("")  # everybody is shut out on purpose
    assert [status(served, key) for key in (OTHER, SECRET)] == [401, 200]


def test_json_file(start: Start, tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    file.write_text(json.dumps({"a b": {"sha256": digest(OTHER), "expires": "2999-01-01T00:00:00+02:00", "concurrency": 3}}))
    with start(api_key_file=str(file)) as served:
        assert status(served, OTHER) == 200 and status(served, None) == 401
        assert served.state.keys._kept[0].limits.concurrency == 3


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is neither TOML nor JSON"),
        ("[]", "is neither TOML nor JSON"),
        ("a = 3", "key 'a': expected { sha256"),
        ("a = 3\na = 3", "has a name twice (Cannot overwrite a value"),
        ("a = { }", "key 'a': sha256 must be 64 hexadecimal digits"),
        (f'a = {{ sha256 = "{SECRET}" }}', "key 'a': sha256 must be 64 hexadecimal digits"),
        (
            f'a = {{ sha256 = "{digest("a")}", rpm = 3 }}',
            "there is no field 'rpm': they are sha256, expires, requests_per_minute",
        ),
        (f'a = {{ sha256 = "{digest("a")}", concurrency = 0 }}', "concurrency must be an integer at least 1, got 0"),
        (f'a = {{ sha256 = "{digest("a")}", concurrency = true }}', "concurrency must be an integer at least 1, got True"),
        (f'a = {{ sha256 = "{digest("a")}", expires = 7 }}', "expires must be a date, as 2027-01-31"),
        (f'a = {{ sha256 = "{digest("a")}", expires = "soon" }}', "expires must be a date, as 2027-01-31"),
        (f'a = {{ sha256 = "{digest("a")}" }}\nb = {{ sha256 = "{digest("a")}" }}', "two names have the same sha256"),
        (f'a = {{ sha256 = "{digest(SECRET)}" }}', "the name or the key of 'a' is taken by --api-key"),
        (f'api-key-1 = {{ sha256 = "{digest("a")}" }}', "the name or the key of 'api-key-1' is taken"),
    ],
)
def test_files_that_do_not_do(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "keys"
    file.write_text(text)
    with pytest.raises(InputError) as caught:
        Keyring((SECRET,), str(file))
    assert words in str(caught.value) and str(file) in str(caught.value) and SECRET not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_date_ends_with_its_day(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("\n".join(f'k{i} = {{ sha256 = "{digest(str(i))}", expires = {when} }}' for i, when in enumerate(
        ("2027-01-31", '"2027-01-31"', "2027-01-31T12:00:00", "2027-01-31T12:00:00+02:00")
    )))  # fmt: skip
    assert [key.expires for key in read_keys(file)] == [1801440000.0, 1801440000.0, 1801396800.0, 1801389600.0]


def test_the_key_command(start: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["key", "bob", "--requests-per-minute", "60", "--tokens-per-day", "1000000", "--expires", "2999-12-31"]) == 0
    line, told = capsys.readouterr()
    secret = told.split()[-1]
    assert len(line.splitlines()) == 1 and secret not in line and secret.startswith("sk-") and len(secret) >= 40
    assert cli.run(["key", "eve"]) == 0
    second, told = capsys.readouterr()
    assert told.split()[-1] != secret
    file = tmp_path / "keys.toml"
    file.write_text(line + second)
    ring = Keyring(file=str(file))
    assert hide(f"xx{secret}yy") == "xx***yy" and has_key(f"id-{secret}") and not has_key(f"id-{secret[:-1]}")
    file.write_text(f'{line}{second}mine = {{ sha256 = "{digest("hunter2-hunter2")}" }}\n')
    assert ring.find([(b"x-api-key", b"hunter2-hunter2")])[0].name == "mine" and hide("bhunter2-hunter22") == "b***2"
    with start(api_key_file=str(file)) as served:
        assert status(served, secret) == status(served, told.split()[-1]) == 200 and status(served, "sk-x") == 401
    for args, words in (
        (["key", "a b"], "a key's name has letters, digits, - and _, got 'a b'"),
        (["key", "a", "--expires", "soon"], "key 'a': expires must be a date"),
        (["key", "a", "--expires", "2020-01-01"], "key 'a': expires is 2020-01-01, and that is over"),
        (["key", "a", "--concurrency", "0"], "key 'a': concurrency must be an integer at least 1"),
    ):
        assert cli.run(args) == 2
        assert capsys.readouterr().err.startswith(f"appliance: error: {words}")


def test_secrets_show_nowhere(start: Start, file: Path, caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    caplog.set_level(logging.DEBUG)
    logging.getLogger("httpx").setLevel("WARNING")
    logging.getLogger("httpcore").setLevel("WARNING")  # the client's side of this test
    config = ServerConfig(api_key=(SECRET,), api_key_file=str(file), log_level="debug")
    options = {"api_key": (SECRET,), "api_key_file": str(file), "log_level": "debug", "audit_log": str(tmp_path / "audit")}
    shown = [repr(config), str(config)]
    with start(**options) as served:
        served.client.fail_at = 1
        with served.http as http:
            for headers in (bearer(SECRET), bearer(OTHER), {"x-api-key": SECRET}, bearer("sk-wrong-wrong"), {}):
                for path in ("/stats", "/metrics", "/v1/models", "/nothing"):
                    shown.append(http.get(path, headers=headers).text)
                shown.append(http.post("/v1/completions", json=ASK, headers=headers).text)  # fails in the engine
            served.client.generate = None  # type: ignore[assignment,method-assign]
            assert http.post("/v1/completions", json=ASK, headers=bearer(SECRET)).status_code == 500  # a traceback in the log
        shown += [repr(vars(served.state.keys)), repr(served.state.server_config)]
        eventually(lambda: '"status":500' in (tmp_path / "audit").read_text())
    assert "Traceback" in caplog.text
    shown += [caplog.text, (tmp_path / "audit").read_text()]
    for text in shown:
        assert not any(secret in text for secret in (SECRET, OTHER, OLD, "sk-wrong-wrong"))


def test_help_does_not_show_keys(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("APPLIANCE_API_KEY", SECRET)
    for args in (["serve", "--help"], ["serve", "--port", "x"], ["serve", "--frobnicate"]):
        try:
            cli.run(args)
        except InputError as error:
            assert SECRET not in "".join(traceback.format_exception(error))
        output = capsys.readouterr()
        assert SECRET not in output.out + output.err


@pytest.mark.parametrize("key", ["", "a b", "k\u00e9y", "a\n"])
def test_keys_that_cannot_be_sent(key: str) -> None:
    with pytest.raises(InputError, match="--api-key is empty, or has characters that a header cannot carry"):
        Keyring((key,))


def test_a_file_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str], model_dir: Path) -> None:
    assert cli.run(["serve", str(model_dir), "--api-key-file", str(tmp_path / "no")]) == 2
    error = capsys.readouterr().err
    assert "No such file or directory; `appliance key NAME >>" in error and len(error.splitlines()) == 1


def test_an_empty_file_lets_nobody_in(start: Start, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "keys").touch()
    with start(api_key_file=str(tmp_path / "keys")) as served:
        assert status(served, None) == status(served, "x") == 401 and "holds no key" in caplog.text


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_beyond_this_machine_only_with_keys(
    host: str, file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def reached(*args: Any) -> Any:
        raise InputError("it would listen")

    monkeypatch.setattr(run, "locate", reached)
    line = ["serve", "--port", "0", "--host"]
    assert cli.run([*line, host]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"appliance: error: --host {host} lets other machines in") and len(error.splitlines()) == 1
    assert "--api-key-file" in error and "--insecure" in error
    for more in (["--insecure"], ["--api-key", "k1", "k2"], ["--api-key-file", str(file)]):
        assert cli.run([*line, host, *more]) == 2 and "it would listen" in capsys.readouterr().err
    for local in ("127.0.0.1", "localhost", "::1", "127.8.8.8", "::ffff:127.0.0.1"):
        assert cli.run([*line, local]) == 2 and "it would listen" in capsys.readouterr().err


def test_nobody_aborts_the_requests_of_others(start: Start, file: Path) -> None:
    with start(lambda: FakeClient(delay_s=0.02), api_key=(SECRET,), api_key_file=str(file)) as served, served.http as http:
        body = {**LONG, "stream": True, "request_id": "mine"}
        with http.stream("POST", "/v1/completions", json=body, headers=bearer(SECRET)) as response:
            lines = response.iter_lines()
            assert next(lines)
            assert http.delete("/v1/requests/mine", headers=bearer(OTHER)).status_code == 404
            assert http.delete("/v1/requests/mine").status_code == 401
            assert http.delete("/v1/requests/mine", headers=bearer(SECRET)).status_code == 200
            assert '"finish_reason":"abort"' in "".join(lines)


def test_without_keys_any_key_does(start: Start) -> None:
    with start() as served:
        assert status(served, None) == status(served, "anything") == 200


def test_a_refused_body_is_not_read(served: Served) -> None:
    with served.http as http:
        response = http.post("/v1/completions", content=b"x" * 2**20)
        assert response.status_code == 401
        assert http.post("/v1/completions", json=ASK, headers=bearer(SECRET)).status_code == 200  # the connection lives
