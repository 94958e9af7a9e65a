"""The dashboard under keys, on screens of all sizes, with servers that come and go."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from textual.events import Key

from appliance.tui.feed import FeedError
from appliance.tui.screens.inspect import Inspect
from tests.tui.fake_server import FakeServer
from tests.tui.stage import FakeVllm, Stage, lines, showing, tabs


def ids(text: str) -> list[str]:
    """Of the requests on the screen, in order."""
    return [word.rstrip("…") for line in text.split("\n") for word in line.split() if word.startswith("chatcmpl-")]


async def still(stage: Stage) -> str:
    """From now on nothing happens at the servers: what is on the screen stays."""
    for server in stage.servers:
        server.frozen = True
    await stage.until("serving")
    before = stage.server.asked
    for _ in range(300):
        if stage.server.asked >= before + 2:  # one may have been under way
            break
        await asyncio.sleep(0.02)
    return await stage.text()


async def test_shows_everything_on_a_large_screen() -> None:
    async with showing(size=(140, 44)) as stage:
        text = await still(stage)
        stats = stage.server.engine()
        assert "Llama-3.2-1B-Instruct-AWQ" in text and "awq 4-bit, group 128 · bfloat16 · cpu · context 8,192" in text
        assert (
            f"{stats.blocks_used:,} of 1,536 used" in text
            and f"{stats.blocks_shared} shared · {stats.blocks_kept:,} kept" in text
        )
        assert f"{stats.running} running · {stats.waiting - 1} waiting · 1 swapped · 2 preempted" in text
        assert "prefix hits 40 % (5 % in host memory)" in text and "60 swapped, 130 kept of 512" in text and "swap ▓" in text
        assert "◆" in text and "□" in text and "■ used ◆ shared □ kept · free" in text
        assert "generation" in text and "tok/s" in text and "peak" in text and "1st token" in text and "p95" in text
        assert "planned 2.38 GiB of 3.00 GiB · used 2.10 GiB resident" in text and "weights 990" in text and "KV 768" in text
        assert "CPU" in text and "64 °C" in text and "load 4.2 on 16" in text and "RAM 11.0 GiB of 32.0 GiB" in text
        first = stage.app.pane.requests.table.shown[0]
        row = next(line for line in text.split("\n") if (first.id or "?") in line)
        one = first.stat
        expected = [first.id, first.key, "decode", f"{one.prompt_tokens:,}", f"{one.output_tokens:,}", f"{one.blocks:,}"]
        assert row.split()[1:7] == expected and float(row.split()[7]) > 5


async def test_fits_a_terminal_of_80_by_24() -> None:
    async with showing(size=(80, 24)) as stage:
        text = await stage.until("Quit")  # the footer comes last
        assert len(text.split("\n")) == 24 and max(map(len, text.split("\n"))) <= 80
        for words in (
            "serving",
            "KV blocks",
            "1st token",
            "runtime 300M",
            "preempted",
            "swap ",
            "prefix hits 40 %",
            "Help",
            "°C",
        ):
            assert words in text, f"{words!r} is missing:\n{text}"
        assert len(ids(text)) >= 5 and "tok/s" in text and "▼age" in text


@pytest.mark.parametrize("size", [(40, 12), (20, 6), (180, 40)])
async def test_survives_odd_sizes_and_resizing(size: tuple[int, int]) -> None:
    async with showing(size=size) as stage:
        await stage.press("l", "down", "s", "l")
        await stage.text()
        await stage.pilot.resize_terminal(100, 30)
        await stage.until("Llama-3.2-1B-Instruct-AWQ")


async def test_shows_a_small_pool_block_by_block() -> None:
    server = FakeServer(num_blocks=64, arrivals=0.0)
    held = server.pool.allocate(3)
    assert held
    server.pool.share(held[:1])
    async with showing(server, size=(160, 40)) as stage:
        text = await stage.until("3 of 64 used, 5 %")
        assert "◆ ■ ■ · · ·" in text and "a cell is a block" in text and "1 shared" in text


async def test_says_since_when_the_server_is_away_and_comes_back() -> None:
    async with showing() as stage:
        await stage.until("● serving")
        stage.server.away = FeedError("no answer from http://127.0.0.1:8000: Connection refused")
        text = await stage.until("away since")
        assert "trying again: Connection refused" in text
        assert "KV blocks" in text and ids(text), "what was last seen stays"
        assert stage.app.pane.has_class("stale")
        stage.server.away = None
        assert "away since" not in await stage.until("awq 4-bit")
        assert not stage.app.pane.has_class("stale")


async def test_starts_without_a_server() -> None:
    server = FakeServer()
    server.away = FeedError("no answer from there: Connection refused")
    async with showing(server, polled=0) as stage:
        assert "http://127.0.0.1:8000" in await stage.until("away since")
        server.away = None
        await stage.until("● serving")


async def test_shows_how_far_loading_is() -> None:
    server = FakeServer(arrivals=0.0)
    server.state, server.loading = "loading", [512 << 20, 2 << 30]
    async with showing(server) as stage:
        text = await stage.until("◐ loading")
        assert "reading the model █████░░░░░░░░░░░░░░░ 25 % of 2.00 GiB" in text and "no pool yet" in text
        server.state, server.loading = "ok", None
        await stage.until("ready in 3.2 s")
        server.state = "dead"
        await stage.until("✖ engine dead")


async def test_pause_stops_asking() -> None:
    async with showing() as stage:
        await stage.until("serving")
        await stage.press("p")
        await stage.until("‖ paused")
        await asyncio.sleep(0.6)  # a look that was under way when the key came
        asked = stage.server.clock
        await asyncio.sleep(0.7)
        assert stage.server.clock == asked
        await stage.press("p")
        for _ in range(200):
            await asyncio.sleep(0.02)
            if stage.server.clock > asked:
                break
        assert stage.server.clock > asked and "paused" not in await stage.text()


async def test_sorts_by_every_column_both_ways() -> None:
    async with showing(FakeServer(arrivals=1.2), size=(140, 28)) as stage:
        await still(stage)
        table, seen = stage.app.pane.requests, []
        for _ in range(11):
            await stage.press("s")
            rows = list(table.table.shown)
            values = [{"key": row.key or "", "state": row.state, "request": row.name}.get(table.order) for row in rows]
            if values[0] is not None:
                assert values == sorted(values), table.order
            else:
                numbers = [_number(table.order, row) for row in rows]
                assert numbers == sorted(numbers, reverse=True), table.order
            head = next(line for line in lines(stage.app) if "prompt" in line and "output" in line)
            assert f"{table.order}▲" in head or f"▼{table.order}" in head
            seen.append(table.order)
            shown = [row.place for row in rows]
            if table.order in ("output", "state"):
                shown = [row.place for row in rows]
                await stage.press("r")
                assert table.backward and {row.place for row in table.table.shown} == set(shown)
                assert table.table.shown[0].place != shown[0]
        assert len(set(seen)) == 11 and seen[0] == "first" and seen[-1] == "age"
        await stage.press("S")
        assert table.order == "tok/s" and not table.backward


def _number(order: str, row: Any) -> float:
    one = row.stat
    known = {"prompt": one.prompt_tokens, "output": one.output_tokens, "blocks": one.blocks, "age": one.age_s}
    known |= {"cached": one.cached_tokens, "preempted": one.preemptions, "first": row.ttft_s, "tok/s": row.speed}
    return -1.0 if known[order] is None else known[order]


async def test_a_click_on_a_head_sorts_and_turns_round() -> None:
    async with showing() as stage:
        await still(stage)
        table = stage.app.pane.requests
        head = next(y for y, line in enumerate(lines(stage.app)) if "▼age" in line)
        x = lines(stage.app)[head].index("output") + 2
        await stage.pilot.click(offset=(x, head))
        assert (table.order, table.backward) == ("output", False)
        await stage.pilot.click(offset=(x, head))
        assert (table.order, table.backward) == ("output", True)


async def test_the_cursor_stays_with_its_request_while_others_come_and_go() -> None:
    async with showing() as stage:
        await stage.until("serving")
        await stage.press("down", "down", "s")  # by the time to the first token: the order changes all the time
        table = stage.app.pane.requests.table
        chosen = table.selected
        assert chosen is not None
        for _ in range(15):
            await asyncio.sleep(0.1)
            await stage.pilot.pause()
            if chosen.place not in [row.place for row in table.shown]:
                break  # it has ended
            assert table.selected is not None and table.selected.place == chosen.place


async def test_filters_by_all_words() -> None:
    async with showing(FakeServer(arrivals=2.0)) as stage:
        await still(stage)
        table = stage.app.pane.requests.table
        everything = len(table.shown)
        await stage.press("slash", *"ali", "space", *"de")
        assert 0 < len(table.shown) < everything
        assert {(row.key, row.state) for row in table.shown} == {("alice", "decode")}
        text = await stage.until("filter: ali de")
        assert f"{len(table.shown)} of " in text
        await stage.press("enter", "down")
        assert stage.app.focused is table and len(table.shown) < everything, "enter keeps it"
        await stage.press("slash", "escape")
        assert len(table.shown) == everything and stage.app.focused is table


async def test_what_is_typed_in_one_go_behind_a_slash_is_no_command() -> None:
    """As over a slow line, or pasted: x would ask to cancel a request, y say yes, p pause."""
    async with showing(FakeServer(arrivals=2.0)) as stage:
        await still(stage)
        for key in ("slash", "p", "x", "y", "q"):
            stage.app.post_message(Key(key, "/" if key == "slash" else key))
        await stage.until("filter: pxyq")
        assert not stage.app.paused and not stage.server.cancelled
        for key in ("escape", "l", "slash", "b", "e", "g"):
            stage.app.post_message(Key(key, {"escape": None, "slash": "/"}.get(key, key)))
        await stage.until("filter: beg")
        assert stage.app.pane.log_view.words == "beg", "the log has the keys as soon as it is shown"


async def test_inspects_a_request_until_it_has_ended() -> None:
    async with showing(size=(80, 24)) as stage:
        await still(stage)
        row = stage.app.pane.requests.table.selected
        assert row is not None
        await stage.press("enter")
        text = await stage.until("in the engine")
        assert isinstance(stage.app.screen, Inspect)
        for words in (row.id or "?", f"{row.stat.request_id} / 0", row.key or "?", "first token after", "temperature"):
            assert words in text + "\n".join(str(line) for line in lines(stage.app)), words
        stage.server.running = [r for r in stage.server.running if f"chatcmpl-{r['id']}" != row.id]
        for _ in range(100):
            await asyncio.sleep(0.02)
            if "not among the running ones" in str(stage.app.screen.query_one("#facts").render()):
                break
        assert "not among the running ones" in str(stage.app.screen.query_one("#facts").render())
        await stage.press("escape")
        assert not isinstance(stage.app.screen, Inspect)


async def test_cancels_after_asking_and_repeats_what_the_server_says() -> None:
    async with showing() as stage:
        await still(stage)
        table = stage.app.pane.requests.table
        mine = next(at for at, row in enumerate(table.shown) if row.key == "alice" and row.stat.state == "running")
        table.move_cursor(row=mine)
        name = table.shown[mine].id
        await stage.press("x")
        assert f"Cancel {name}?" in await stage.until("let it run")
        await stage.press("n")
        await stage.until("let it run", gone=True)
        assert stage.server.cancelled == []
        await stage.press("x", "y")
        await stage.until(f"{name} is cancelled")
        assert stage.server.cancelled == [name]
        other = next(at for at, row in enumerate(table.shown) if row.key == "bob")
        table.move_cursor(row=other)
        await stage.press("x", "y")
        await stage.until("no running request has the id")
        assert stage.server.cancelled == [name], "it is another key's"


async def test_the_log_is_shown_filtered_and_held_still() -> None:
    async with showing() as stage:
        await stage.until("serving")
        assert "POST /v1" not in await stage.text()
        await stage.press("l")
        await stage.until("POST /v1/chat/completions 200")
        view = stage.app.pane.log_view
        stage.server.say("error", "appliance.engine", "a step failed")
        assert "ERROR engine: a step failed" in await stage.until("a step failed")
        await stage.press("v", "v")
        text = await stage.until("warning and above")
        assert "a step failed" in text and "POST /v1" not in text
        await stage.press("v", "v")
        await stage.press("slash", *"beg", "enter")
        text = await stage.until("filter: beg")
        assert stage.app.focused is view and " 200 " not in text and "begins" in text
        await stage.press("slash", "escape", "space")
        await stage.until("Log · ‖ paused")
        stage.server.say("info", "appliance.engine", "unheard of")
        await asyncio.sleep(0.7)
        assert "unheard of" not in await stage.text()
        await stage.press("space")
        await stage.until("unheard of")
        await stage.press("l")
        await stage.until("POST /v1", gone=True)
        assert stage.app.focused is stage.app.pane.requests.table


async def test_the_log_takes_the_place_of_the_requests_on_a_small_screen() -> None:
    async with showing(size=(80, 24)) as stage:
        await stage.until("chatcmpl")
        await stage.press("l")
        text = await stage.until("all levels")
        assert "▼age" not in text and "INFO" in text
        await stage.press("l")
        await stage.until("▼age")


async def test_a_log_that_cannot_be_had_is_told() -> None:
    async with showing(FakeVllm()) as stage:
        await stage.press("l")
        await stage.until("Log · http://127.0.0.1:8001/logs answers 404")


async def test_several_servers_in_tabs() -> None:
    async with showing(*tabs(), interval=0.5) as stage:
        text = await stage.until("3 10.0.0.7:8000 ✖")
        assert "1 127.0.0.1:8000 ●" in text and "2 127.0.0.1:8001 ●" in text and "Llama-3.2-1B" in text
        await stage.press("2")
        await stage.until("vLLM 0.11.0")
        await stage.press("right_square_bracket")
        await stage.until("Connection refused")
        await stage.press("right_square_bracket")
        await stage.until("appliance 0.1.0")
        await stage.press("left_square_bracket", "9")
        await stage.until("Connection refused")
        y = next(y for y, line in enumerate(lines(stage.app)) if "1 127.0.0.1:8000" in line)
        await stage.pilot.click(offset=(6, y))
        await stage.until("appliance 0.1.0")


async def test_a_server_that_only_counts() -> None:
    async with showing(FakeVllm()) as stage:
        text = await stage.until("vLLM 0.11.0")
        assert "17 running · 3 waiting" in text and "5,378 of 14,835 used, 36 %" in text and "prefix hits 61 %" in text
        assert "counts its requests, and does not list them" in text and "1,802  ended with stop" in text
        assert "Memory" not in text and "Machine" not in text
        await stage.press("i", "x", "s", "r")
        await stage.until("vLLM 0.11.0")


async def test_one_of_several_models_after_the_other() -> None:
    server = FakeServer()
    body, names = server.body, ["Llama-3.2-1B-Instruct-AWQ", "second"]

    def several() -> dict[str, Any]:
        states = zip(names, ("ok", "unloaded"), strict=True)
        chosen = server.model or names[0]
        return {
            **body(),
            "model": chosen,
            "models": [{"name": name, "state": state, "waiting": 2 * (state != "ok")} for name, state in states],
        }

    server.body = several  # type: ignore[method-assign]
    async with showing(server) as stage:
        assert "● Llama-3.2-1B-Instruct-AWQ  ○ second (2 waiting)" in await stage.until("2 models (m):")
        await stage.press("m")
        await stage.until("│ second │")


async def test_help_and_quit() -> None:
    async with showing() as stage:
        await stage.until("serving")
        await stage.press("question_mark")
        await stage.until("cancel it (asks first)")
        await stage.press("down", "down")
        await asyncio.sleep(0.1)  # the feed goes on below it
        await stage.press("escape")
        await stage.until("cancel it (asks first)", gone=True)
        await stage.press("q")
    assert stage.app.return_code == 0


async def test_a_late_look_at_a_screen_that_is_gone_is_no_error() -> None:
    async with showing() as stage:
        await stage.until("serving")
    stage.app.show()
