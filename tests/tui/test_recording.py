"""What is recorded is what is played: feeds that watched a server and feeds that watch its recording come to the same."""

from __future__ import annotations

import gzip
import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from appliance.tui.app import Dashboard
from appliance.tui.feed import Feed, FeedError
from appliance.tui.recording import Recording, Replay
from quant.errors import InputError
from tests.tui.fake_server import BEGUN, FakeServer
from tests.tui.stage import FakeVllm, Stage

SESSION = Path(__file__).parents[2] / "docs" / "session.jsonl.gz"


def record(path: Path, seconds: int = 60, **more: Any) -> list[Feed]:
    """Two servers, watched for so long; the second is away for a while."""
    servers: list[Any] = [FakeServer(), FakeServer(seed=7, url="http://10.0.0.7:8000")]
    clock = {"now": 0.0}
    recording = Recording(path, [one.url for one in servers], wall=lambda: BEGUN + clock["now"], **more)
    feeds = [Feed(one, clock=lambda: clock["now"], wall=lambda: BEGUN + clock["now"], recorder=recording) for one in servers]
    for second in range(seconds):
        servers[1].away = FeedError("no answer from there") if 20 <= second < 30 else None
        for feed in feeds:
            feed.poll()
            feed.poll_log()
        clock["now"] += 1.0
    recording.close()
    return feeds


def same(played: Feed, watched: Feed) -> None:
    assert played.view == watched.view and list(played.history) == list(watched.history)
    assert list(played.log) == list(watched.log) and played.peak == watched.peak
    assert played.trails == watched.trails and (played.error is None) == (watched.error is None)


@pytest.mark.parametrize("name", ["session.jsonl", "session.jsonl.gz"])
def test_what_is_played_is_what_was_seen(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    feeds = record(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    replay = Replay(path)
    assert replay.urls == [feed.url for feed in feeds] and replay.length == 59.0 and replay.begun == BEGUN
    while not replay.ended:
        replay.advance(0.7)
    for played, watched in zip(replay.feeds, feeds, strict=True):
        same(played, watched)
    assert not replay.playing, "it stops at its end"


def test_any_place_can_be_gone_to(tmp_path: Path) -> None:
    path = tmp_path / "s.gz"
    record(path)
    replay = Replay(path)
    for target in (25.0, 50.0, 10.0, 25.0, 59.0, 0.0, 24.0, 1000.0, -5.0, 25.0):
        replay.seek(target)
        straight = Replay(path)
        straight.show_until(min(max(target, 0.0), straight.length))
        for played, watched in zip(replay.feeds, straight.feeds, strict=True):
            same(played, watched)
    assert replay.feeds[1].error == "no answer from there" and replay.feeds[1].away_since == BEGUN + 20


def test_speed_and_pause(tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    record(path)
    replay = Replay(path)
    replay.faster(2)
    replay.advance(1.0)
    assert replay.speed == 4 and replay.position == 4
    replay.faster(-9)
    assert replay.speed == 0.25
    replay.playing = False
    replay.advance(100.0)
    assert replay.position == 4
    replay.faster(99)
    assert replay.speed == 64


def test_a_recording_that_broke_off_is_played_as_far_as_it_goes(tmp_path: Path) -> None:
    path = tmp_path / "s.gz"
    record(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    cut = Replay(path)
    assert 5 < cut.length < 59
    plain = tmp_path / "s.jsonl"
    record(plain)
    text = plain.read_bytes()
    plain.write_bytes(text[: len(text) // 2])
    assert 5 < Replay(plain).length < 59


def test_a_recording_is_bounded_and_says_so(tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    recording = Recording(path, ["http://127.0.0.1:8000"], most=200_000)
    feed = Feed(FakeServer(), recorder=recording)
    while not recording.stopped:
        feed.poll()
    size = path.stat().st_size
    feed.poll()
    recording.close()
    assert 200_000 <= path.stat().st_size < 230_000 and path.stat().st_size >= size and recording.stopped == "0 MiB are full"
    infos = [line for line in path.read_text().splitlines() if '"info":' in line]
    assert len(infos) == 1, "what does not change is told once"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_ends_the_recording_alone() -> None:
    recording = Recording(Path("/dev/full"), ["http://127.0.0.1:8000"])
    feed = Feed(FakeServer(), recorder=recording)
    for _ in range(30):
        feed.poll()
    assert "No space left" in recording.stopped and feed.view is not None and feed.error is None
    recording.close()


DAMAGED = [
    (b"", "this is no recording"),
    (b"{}\n", "this is no recording"),
    (b"hello\n", "this is no recording"),
    (b'{"recording": 2, "time": 1, "servers": ["a"]}\n', r"by a later version \(form 2, known is 1\)"),
    (b'{"recording": 1, "time": 1, "servers": ["a"]}\n{"t": 1, "s": 0}\n', "line 2 is damaged"),
    (b'{"recording": 1, "time": 1, "servers": ["a"]}\n{"t": 1, "s": 4, "log": []}\n', "line 2 is of a server that is not there"),
]


@pytest.mark.parametrize(("data", "message"), DAMAGED)
def test_refuses_what_is_no_recording(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "s.jsonl"
    path.write_bytes(data)
    with pytest.raises(InputError, match=message):
        Replay(path)
    packed = tmp_path / "s.gz"
    packed.write_bytes(b"no gzip at all")
    with pytest.raises(InputError, match="this is no gzip file"):
        Replay(packed)
    with pytest.raises(InputError, match=r"--record .*: No such file or directory"):
        Recording(tmp_path / "nowhere" / "s.gz", ["a"])


def test_vllms_metrics_are_recorded_as_they_are_shown(tmp_path: Path) -> None:
    server = FakeVllm()
    recording = Recording(tmp_path / "v.gz", [server.url])
    feed = Feed(server, recorder=recording, clock=lambda: server.clock)
    for _ in range(5):
        feed.poll()
    recording.close()
    replay = Replay(tmp_path / "v.gz")
    replay.show_until(replay.length)
    assert replay.feeds[0].view == feed.view


def test_the_session_of_the_documentation() -> None:
    """A real one: small, nobody's keys or paths in it."""
    assert SESSION.stat().st_size < 100_000
    text = gzip.decompress(SESSION.read_bytes()).decode()
    assert "sk-" not in text and "/home" not in text and "/root" not in text and "/work" not in text and "/tmp" not in text
    assert json.loads(text.splitlines()[0])["recording"] == 1
    replay = Replay(SESSION)
    replay.show_until(30.0)
    view = replay.feeds[0].view
    assert view is not None and view.stats.blocks_shared > 0 and view.stats.running > 5 and view.ttft.p50_s
    assert {row.key for row in view.rows} == {"alice", "bob", "batch-jobs"} and len(replay.feeds[0].log) > 50


async def test_keys_of_a_replay() -> None:
    replay = Replay(SESSION)
    app = Dashboard(replay=replay)
    async with app.run_test(size=(100, 30)) as pilot:
        stage = Stage(app, (), pilot)
        await stage.until("▶ replay ×1")
        await stage.press("right", "right", "right")
        assert replay.position >= 30 and "serving" in await stage.until("running")
        await stage.press("greater_than_sign", "greater_than_sign", "space")
        text = await stage.until("‖ replay ×4")
        at = replay.position
        assert "Requests" in text and "cmpl-" in text
        await stage.press("left")
        assert replay.position == pytest.approx(at - 10)
        await stage.press("shift+right")
        await stage.until("■ replay ×4" if replay.ended else "‖ replay")
        await stage.press("x", "y")
        await stage.press("shift+left", "shift+left", "space")
        await stage.until("▶ replay ×4")
        await stage.press("less_than_sign", "q")
    assert app.return_code == 0
