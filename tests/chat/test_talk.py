"""The parts of `appliance chat` that need no server: wrapping, files, conversations, the history."""

from __future__ import annotations

import io
import json
import stat
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.chat.client import base_url
from appliance.chat.files import with_files
from appliance.chat.lines import Lines
from appliance.chat.run import Asked, main
from appliance.chat.screen import Screen, Wrap, cells, harmless
from appliance.chat.talk import Answer, Talk
from quant.errors import InputError

TEXT = st.text(st.sampled_from("ab cd\n\té日🎉`"), max_size=200)


def wrapped(pieces: list[str], width: int) -> str:
    wrap = Wrap(width)
    return "".join(wrap.feed(piece) for piece in pieces) + wrap.end()


@given(TEXT, st.integers(20, 40), st.lists(st.integers(0, 200), max_size=8))
def test_wrapping_changes_nothing_but_white_space(text: str, width: int, cuts: list[int]) -> None:
    """However the text was cut; and what is no code fits the width."""
    edges = sorted({0, len(text), *(cut for cut in cuts if cut <= len(text))})
    pieces = [text[a:b] for a, b in pairwise(edges)]
    found = wrapped(pieces, width)
    assert found == wrapped(list(text), width) == wrapped([text], width)
    assert "".join(found.split()) == "".join(text.split())
    if "```" not in text and "\t" not in text:
        assert all(cells(line.rstrip(" ")) <= width for line in found.split("\n"))


def test_wrapping() -> None:
    assert wrapped(["the quick brown fox jumps over"], 20) == "the quick brown fox\njumps over"
    assert wrapped(["a " * 15], 20).count("\n") == 1
    code = "```\n" + "x = 1 + 2  # " * 5 + "\n```\n"
    assert wrapped([code], 20) == code
    assert wrapped([code + "the quick brown fox jumps"], 20).endswith("fox\njumps")
    assert [cells(text) for text in ("abc", "日本", "e\u0301", "\u200b")] == [3, 4, 1, 0]


def test_nothing_steers_the_terminal() -> None:
    assert harmless("a\x1b[2Jb\x07\x9b31mc\r\nd\te\x7f\x00") == "a[2Jb31mc\nd\te"
    out = io.StringIO()
    screen = Screen(out)
    screen.begin()
    screen.piece("reasoning", "hm\x1b]0;title\x07")
    screen.piece("content", "\n\nyes")
    screen.end()
    assert out.getvalue() == "(reasoning) hm]0;title\n\n(answer) yes\n"


def test_notes_and_errors_are_not_broken_inside_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    text = "no server answers at http://127.0.0.1:18399: connection refused; start one, or name it with --url"
    for show in (Screen.note, Screen.error):
        out = io.StringIO()
        show(Screen(out), text)
        lines = out.getvalue().splitlines()
        assert len(lines) == 4 and all(cells(line) <= 40 for line in lines) and " ".join(" ".join(lines).split()) == text


def test_a_conversation_is_kept_in_a_file(tmp_path: Path) -> None:
    talk = Talk("m", "be brief", {"temperature": 0.5, "seed": 1, "stop": ["x"]})
    answer = {"role": "assistant", "content": "é🎉", "reasoning_content": "hm"}
    talk.messages = [{"role": "user", "content": "hello"}, answer]
    path = tmp_path / "talk.json"
    talk.save(path)
    saved = json.loads(path.read_text())
    assert saved["settings"] == {"temperature": 0.5, "more": '{"seed": 1, "stop": ["x"]}'}
    again = Talk("other")
    again.load(path)
    assert (again.system, again.messages, again.settings) == (talk.system, talk.messages, talk.settings)
    assert again.body()["messages"][0] == {"role": "system", "content": "be brief"} and again.body()["seed"] == 1
    path.write_text('[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "stats": {"tokens": 1}}]')
    again.load(path)
    assert again.messages[1] == {"role": "assistant", "content": "b"} and again.settings == {} and again.system == ""
    assert again.undo() == "a" and again.messages == [] and again.undo() is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("nonsense", "not JSON"),
        ("{}", "messages"),
        ('{"messages": 1}', "messages"),
        ('[{"role": "robot"}]', "'robot'"),
        ('[{"role": "user", "content": [1]}]', "message 1 is not text"),
        ("[1]", "role of message 1"),
    ],
)
def test_files_that_are_no_conversation(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    talk = Talk(messages=[{"role": "user", "content": "kept"}])
    with pytest.raises(InputError, match=words):
        talk.load(path)
    assert talk.messages == [{"role": "user", "content": "kept"}]


def test_settings() -> None:
    talk = Talk()
    for name, value in (("temperature", "0.7"), ("stop", '["a"]'), ("user", "me")):
        talk.set(name, value)
    assert talk.settings == {"temperature": 0.7, "stop": ["a"], "user": "me"}
    talk.set("stop", "")
    assert "stop" not in talk.settings
    for name in ("messages", "stream", "a b", ""):
        with pytest.raises(InputError):
            talk.set(name, "1")


def chunk(delta: dict[str, Any], tokens: int) -> dict[str, Any]:
    return {"choices": [{"delta": delta, "finish_reason": None}], "usage": {"completion_tokens": tokens, "prompt_tokens": 3}}


def test_an_answer_as_it_comes() -> None:
    call = {"index": 0, "id": "c", "function": {"name": "f", "arguments": '{"a"'}}
    deltas = [{"role": "assistant", "content": ""}, {"reasoning": "hm"}, {"content": "yes"}, {"tool_calls": [call]}]
    deltas.append({"tool_calls": [{"index": 0, "function": {"arguments": ":1}"}}]})
    answer = Answer()
    assert list(answer.follow(chunk(d, i) for i, d in enumerate(deltas))) == [("reasoning", "hm"), ("content", "yes")]
    assert answer.message()["tool_calls"][0]["function"] == {"name": "f", "arguments": '{"a":1}'}
    assert answer.tokens == 4 and answer.first_s is not None and "prompt 3" in answer.figures()


def test_files_named_in_a_message(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("two\nlines\n")
    assert with_files(f"sum up @{path} for me@home.example @nobody") == (
        f"sum up @{path} for me@home.example @nobody\n\n{path}:\n```\ntwo\nlines\n```"
    )
    for none in ("@" + "x" * 400, "@~nobody-of-that-name/x"):
        assert with_files(none) == none
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="UTF-8"):
        with_files(f"@{path}")


def test_the_history_is_nobody_elses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    (tmp_path / "appliance").mkdir()
    file = tmp_path / "appliance" / "chat_history"
    file.write_text("old\n")
    file.chmod(0o644)
    with Lines([]):
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.stat().st_mode) == 0o600 and "old" in file.read_text()


def test_addresses() -> None:
    assert base_url("localhost:8000/v1/") == "http://localhost:8000" and base_url("https://h/x") == "https://h/x"
    for url in ("", "ftp://h", "http://", "http://h:0", "http://h:x"):
        with pytest.raises(InputError, match="--url"):
            base_url(url)


@pytest.mark.parametrize(
    ("words", "url", "said"),
    [
        (("How are you?",), None, "'How are you.' is no model to start a server for: a question is asked with --prompt"),
        (("How are you? " * 40,), None, "a question is asked with --prompt"),
        (("How are you?",), "http://127.0.0.1:9", "a question is asked with --prompt"),
        (("org/model",), "http://127.0.0.1:9", "--url is for a server that runs, and 'org/model' for one that is to be started"),
    ],
)
def test_words_that_start_no_server(words: tuple[str, ...], url: str | None, said: str) -> None:
    """They are refused before anything is read or started."""
    with pytest.raises(InputError, match=said):
        main(Asked(words, url, None, None, None, "", {}))
