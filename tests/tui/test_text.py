from __future__ import annotations

import random

import pytest

from appliance.tui.text import chart, duration, fill_map, fit, seconds, segments, short_size, size

SIZES = [(0, "0 B"), (512, "512 B"), (1536, "1.50 KiB"), (12 << 20, "12.0 MiB"), (300 << 20, "300 MiB"), (5 << 40, "5120 GiB")]


@pytest.mark.parametrize(("n", "text"), SIZES)
def test_size(n: int, text: str) -> None:
    assert size(n) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(-1, "0.0 s"), (9.94, "9.9 s"), (59.9, "59 s"), (65, "1m 05s"), (7800, "2h 10m"), (270000, "3d 3h")]
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


TIMES = [
    (None, "-"),
    (0.0004, "0.4 ms"),
    (0.00996, "10 ms"),
    (0.9994, "999 ms"),
    (0.9996, "1.00 s"),
    (12.34, "12.3 s"),
    (75, "1m 15s"),
]


@pytest.mark.parametrize(("value", "text"), TIMES)
def test_seconds(value: float | None, text: str) -> None:
    assert seconds(value) == text


def test_what_fits() -> None:
    assert short_size(990 << 20) == "990M" and short_size(3 << 30) == "3.00G" and short_size(5) == "5B"
    assert fit(["long words", "short"], 9) == "short" and fit(["long words", "short"], 3) == "sho" and fit(["a"], -1) == ""


def test_chart_fills_from_below_with_the_newest_to_the_right() -> None:
    assert chart([0, 1, 8, 16], width=5, height=2, top=16) == ["    █", "  ▁██"]
    assert chart([5, 1, 8], width=2, height=1, top=8) == ["▁█"], "older values fall off to the left"
    assert chart([1e-9, 0], width=2, height=1, top=1e9) == ["▁ "], "a little is not nothing"
    assert chart([0, 0], width=3, height=2, top=0) == ["   ", "   "]
    assert chart([4, None, 8], width=3, height=1, top=8) == ["▄ █"], "None is a gap"
    assert chart([], width=0, height=1, top=0) == [""]


def test_map_shows_each_block_where_there_is_room() -> None:
    assert fill_map("##..#", 5) == "■■··■" and fill_map("#+.&", 4) == "■□·◆"
    assert fill_map("", 5) == ""


def test_map_shades_runs_of_blocks() -> None:
    assert fill_map("####" + "...#" + "#..#" + "####" + "...." + ".###", 6) == "█░▒█·▓"
    assert fill_map("#.", 0) == ""
    assert fill_map("&&&&" + "&.#." + "&.##" + "&+++", 4) == "◆◆▓◆", "shared where at least half of the used ones are"
    assert fill_map("##++" + "++++" + "...+" + "....", 4) == "▒□□·", "what is kept shows where nothing is used"


def test_map_never_hides_a_used_or_a_free_block() -> None:
    rng = random.Random(1)
    for _ in range(200):
        n, cells = rng.randint(2, 400), rng.randint(1, 100)
        blocks = "".join(rng.choice("#..") for _ in range(n))
        text = fill_map(blocks, cells)
        assert len(text) == min(n, cells)
        if n > cells:
            runs = [blocks[i * n // cells : (i + 1) * n // cells] for i in range(cells)]
            assert [c == "·" for c in text] == ["#" not in run for run in runs]
            assert [c == "█" for c in text] == ["." not in run for run in runs]


def test_segments_keep_the_proportions_and_the_width() -> None:
    assert segments([50, 25, 0, 25], 8, 100) == [4, 2, 0, 2]
    assert segments([1, 1000], 10, 2000) == [1, 5], "what is there is seen"
    rng = random.Random(2)
    for _ in range(200):
        parts = [rng.choice([0, rng.random(), 100 * rng.random()]) for _ in range(4)]
        widths = segments(parts, width := rng.randint(4, 80), sum(parts))
        assert sum(widths) <= width and all((w > 0) == (p > 0) for w, p in zip(widths, parts, strict=True))
    assert segments([1e30], 8, 10) == [8], "at once, and not one by one"
    assert segments([1], 0, 1) == segments([1], 5, 0) == [0]
