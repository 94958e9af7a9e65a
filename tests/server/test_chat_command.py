"""`appliance chat` as a user has it: at a terminal, and in a pipe; over a pretended engine and over a real one."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from appliance.config import EngineConfig, ServerConfig
from appliance.text.tokenizer import Tokenizer
from tests.server.conftest import Served, serve_in_thread
from tests.server.fake import FakeClient
from tests.server.test_lifecycle import eventually

ROOT = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, "-m", "appliance", "chat"]
PROMPT = r">>> (\x1b\[0m)?$"
Spawn = Callable[..., "Terminal"]


def _at_a_terminal() -> None:
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # whoever runs the tests in the background may have them ignore ctrl-C


class Terminal:
    """The command at a terminal of 80 x 24."""

    def __init__(self, arguments: list[str], environment: dict[str, str]) -> None:
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 200, 0, 0))
        self.process = subprocess.Popen(
            [*COMMAND, *arguments], stdin=slave, stdout=slave, stderr=slave, env=environment, start_new_session=True,
            preexec_fn=_at_a_terminal,
        )  # fmt: skip
        os.close(slave)
        self.text, self._seen = "", 0

    def until(self, pattern: str, seconds: float = 60) -> str:
        """Wait for it in what was not seen yet; returns that."""
        deadline = time.monotonic() + seconds
        while not (found := re.search(pattern, self.text[self._seen :])):
            assert time.monotonic() < deadline, f"{pattern!r} did not come: {self.text[self._seen :]!r}"
            if select.select([self.master], [], [], 0.1)[0]:
                try:
                    self.text += os.read(self.master, 65536).decode(errors="replace").replace("\r\n", "\n")
                except OSError:  # the other side is closed
                    deadline = 0.0
        seen = self.text[self._seen : self._seen + found.end()]
        self._seen += found.end()
        return seen

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def say(self, text: str, pattern: str = PROMPT) -> str:
        """Type a line; returns what was shown until the next prompt."""
        self.type(text + "\n")
        self.until(re.escape(text[-40:]) + "\n" if text else "\n")
        return self.until(pattern)

    def ended(self) -> int:
        return self.process.wait(60)


@pytest.fixture
def spawn(tmp_path: Path) -> Iterator[Spawn]:
    running: list[Terminal] = []

    def start(*arguments: str, **environment: str) -> Terminal:
        clean = {k: v for k, v in os.environ.items() if not k.startswith("APPLIANCE_") and k != "NO_COLOR"}
        own = {"TERM": "xterm", "XDG_STATE_HOME": str(tmp_path), "PYTHONPATH": str(ROOT), "APPLIANCE_CACHE_DIR": ""}
        running.append(Terminal(list(arguments), {**clean, **own, **environment}))
        return running[-1]

    yield start
    for one in running:
        one.process.kill()
        one.process.wait(10)
        os.close(one.master)


@contextmanager
def pretend(tokenizer: Tokenizer, model_dir: Path, client: FakeClient, **options: object) -> Iterator[Served]:
    server = ServerConfig(served_model_name=("tiny",), **options)  # type: ignore[arg-type]
    with serve_in_thread(lambda: client, tokenizer, EngineConfig(model=str(model_dir)), server) as served:
        yield served


def pipe(*arguments: str, given: str | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("APPLIANCE_") or k == "APPLIANCE_CACHE_DIR"}
    return subprocess.run(
        [*COMMAND, *arguments], input=given or "", capture_output=True, text=True, timeout=60, env={**clean, **environment}
    )


def test_a_conversation(spawn: Spawn, served: Served, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """The engine repeats the prompt, so the answer shows what was sent."""
    terminal = spawn("--url", served.url, "--max-tokens", "60", "--system", "brief")
    assert "tiny at http" in terminal.until(PROMPT)
    shown = terminal.say("hello there")
    assert "system: brief\nuser: hello there" in shown and "60 tokens" in shown and "cut off" in shown
    assert "prompt " in shown and "first after" in shown
    assert "temperature = 0.5" in terminal.say("/set temperature 0.5") and "max_tokens = 60" in terminal.say("/set")
    assert served.client.submitted[-1].params.temperature != 0.5
    assert "hello there" in terminal.say("/regen") and served.client.submitted[-1].params.temperature == 0.5
    terminal.say("/set top_p 9")
    assert "top_p must be" in terminal.say("/regen")  # which leaves the answer that there is
    assert "max_tokens = 60" in terminal.say("/set top_p")
    assert "system prompt: (none)" in terminal.say('/system ""')
    terminal.type("one\\\n")
    terminal.until(r"\.\.\. ")
    terminal.say("two")
    terminal.type('"""\n')
    terminal.until(r"\.\.\. ")
    terminal.say('three"""')
    terminal.say("//etc")
    sent = tokenizer.decode(list(served.client.submitted[-1].prompt_token_ids))
    for words in ("user: one\ntwo\n", "user: three\n", "user: /etc\n"):
        assert words in sent
    assert re.search(r"\d+ tokens of 512", terminal.say("/tokens"))
    assert "* alias/of-tiny" in terminal.say("/model alias/of-tiny") and "no model third" in terminal.say("/model third")
    assert "no command /nope" in terminal.say("/nope")
    file = tmp_path / "talk.json"
    assert "messages written" in terminal.say(f"/save {file}")
    saved = json.loads(file.read_text())
    assert [m["content"] for m in saved["messages"] if m["role"] == "user"] == ["hello there", "one\ntwo", "three", "/etc"]
    assert "taken back: /etc" in terminal.say("/undo") and "empty" in terminal.say("/clear")
    assert "nothing was asked" in terminal.say("/regen")
    assert "8 messages read" in terminal.say(f"/load {file}")
    assert "is there already" in terminal.say("/save /etc/hostname")
    terminal.type("\x04")
    assert terminal.ended() == 0
    history = tmp_path / "appliance" / "chat_history"
    assert history.stat().st_mode & 0o777 == 0o600 and "hello there" in history.read_text()


def test_ctrl_c_stops_the_answer_and_not_the_program(spawn: Spawn, tokenizer: Tokenizer, model_dir: Path) -> None:
    client = FakeClient(delay_s=0.03)
    with pretend(tokenizer, model_dir, client) as served:
        terminal = spawn("--url", served.url, NO_COLOR="1")
        terminal.until(PROMPT)
        terminal.say("hello", "user: h")
        terminal.type("\x03")
        assert "stopped" in terminal.until(PROMPT)
        eventually(lambda: client.aborted and not client.running)
        terminal.type("half a line\x03")
        assert "ctrl-D or /quit" in terminal.until(PROMPT)
        client.fail_at = 3
        assert "the step failed" in terminal.say("again")
        served.run(client.die, "the engine was killed")
        assert "the engine was killed" in terminal.say("more")
        terminal.type("/quit\n")
        assert terminal.ended() == 0
        assert "\x1b[" not in re.sub(r"\x1b\[\?2004[hl]", "", terminal.text), "colours, though NO_COLOR is set"


def test_in_a_pipe_only_the_answer(served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = pipe("--url", served.url, "--max-tokens", "12", given="hello")
    assert found.returncode == 0 and re.fullmatch("user: hello\n?", found.stdout)
    assert found.stderr == "appliance: note: the answer was cut off: the limit of tokens is reached\n"
    Path("notes.txt").write_text("in a file")
    found = pipe("--url", served.url, "-p", "sum up @notes.txt", "--max-tokens", "200", given="and this")
    for words in ("sum up", "in a file", "and this"):
        assert words in found.stdout
    question = "Wie heißt du? 日本"
    ascii_ = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    for found in (pipe("--url", served.url, "-p", question, **ascii_), pipe("--url", served.url, given=question, **ascii_)):
        assert found.returncode == 0 and "user: Wie hei" in found.stdout
    latin = pipe("--url", served.url, "-p", "a", "--max-tokens", "5", PYTHONIOENCODING="ascii")
    assert latin.returncode == 0


def test_failures_in_a_pipe(tokenizer: Tokenizer, model_dir: Path) -> None:
    client = FakeClient()
    with pretend(tokenizer, model_dir, client, api_key=("right",)) as served:
        found = pipe("--url", served.url, "-p", "hello")
        assert found.returncode == 1 and found.stdout == "" and "--api-key KEY, or APPLIANCE_API_KEY" in found.stderr
        found = pipe("--url", served.url, "-p", "hello", "--max-tokens", "5", APPLIANCE_API_KEY="right")
        assert found.returncode == 0 and found.stdout
        client.fail_at = 3
        found = pipe("--url", served.url, "-p", "hello", "--api-key", "right")
        assert found.returncode == 1 and found.stderr == "appliance: error: the step failed\n"
    found = pipe("--url", served.url, "-p", "hello")
    assert found.returncode == 1 and "no answer from" in found.stderr and "Traceback" not in found.stderr
    for arguments in (["--url", "ftp://x", "-p", "a"], ["--url", served.url], ["--url", served.url, "model", "-p", "a"]):
        assert pipe(*arguments).returncode == 2


def servers_of(process: psutil.Process) -> list[psutil.Process]:
    return [
        child for child in process.children(recursive=True) if "serve" in child.cmdline() or "worker" in " ".join(child.cmdline())
    ]


def test_with_a_server_of_its_own(spawn: Spawn) -> None:
    """It is started, survives ctrl-C, and ends with the program, even where that is killed."""
    terminal = spawn("--kv-cache-memory-bytes", "20000000", "--threads", "1", "--reference-ops", "--served-model-name", "own")
    assert "own at http" in terminal.until(PROMPT, 60)
    assert "7 plus 5 is 12." in terminal.say("What is 7 plus 5?")
    terminal.say("/set ignore_eos true")
    terminal.say("/set min_tokens 400")
    for _ in range(5):  # on a busy machine the answer may end before it is stopped
        terminal.say("/clear")
        terminal.say("Spell the word garden.", "garden")
        terminal.type("\x03")
        if stopped := "stopped" in terminal.until(PROMPT):
            break
    assert stopped
    terminal.say("/set ignore_eos")
    terminal.say("/set min_tokens")
    terminal.say("/clear")
    assert "12." in terminal.say("What is 7 plus 5?")
    servers = servers_of(psutil.Process(terminal.process.pid))
    assert servers
    terminal.process.send_signal(signal.SIGKILL)
    gone, alive = psutil.wait_procs(servers, timeout=60)
    assert gone and not alive


def test_a_pipe_with_a_server_of_its_own() -> None:
    found = pipe("--max-model-len", "128", "--threads", "1", given="Spell the word garden.")
    assert (found.returncode, found.stdout, found.stderr) == (0, "garden is spelled g-a-r-d-e-n.\n", "")
    found = pipe("./no-such-model", "-p", "a")
    assert found.returncode == 2 and found.stderr == "appliance: error: no such directory: ./no-such-model\n"
