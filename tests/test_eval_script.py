"""The table of all fixtures: what it asks for exists, and what is written agrees with the figures beside it."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest

from appliance import cli
from appliance.eval.picture import picture

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
quality = importlib.import_module("quality")


def test_every_flag_and_option_exists() -> None:
    from appliance.eval.variants import OPTIONS

    ours = [one for one in quality.CHECKPOINTS if one.flags]
    for one in ours:
        _, bound, *_ = cli.app.parse_args(["quantize", "model", "--output", "made", *one.flags], exit_on_error=False)
        assert bound.arguments["output"] == "made" and set(bound.arguments) > {"model", "output"}
    names = [one.name for one in quality.CHECKPOINTS]
    assert (
        len(set(names)) == len(names)
        and quality.LOADED in names
        and {one.kind for one in quality.CHECKPOINTS} == set(quality.KINDS)
    )
    assert {option.partition("=")[0] for option in quality.OPTIONS} <= set(OPTIONS)


def test_tables_and_picture_are_those_of_the_figures() -> None:
    report = json.loads(quality.OUT.with_suffix(".json").read_text())
    assert quality.OUT.with_suffix(".md").read_text() == quality.markdown(report)
    rows = [row for row in report["served"] if row["label"] in report["kinds"]]
    assert quality.OUT.with_suffix(".svg").read_text() == picture(rows, quality.TITLE)


@pytest.mark.realdata
def test_all_of_the_others_checkpoints_are_in_it(shared_data: Path) -> None:
    theirs = {one.name for one in quality.CHECKPOINTS if not one.flags}
    assert theirs == {path.parent.name for path in (shared_data / "quantized").glob("*/config.json")}


def test_the_text_is_cut_between_stories(tmp_path: Path) -> None:
    stories = tmp_path / "stories.txt"
    stories.write_text("<|endoftext|>\n".join(f"story {k}\n" for k in range(5)))
    calibration, held_out = quality.halves(stories, tmp_path)
    assert calibration.read_text() == "story 0\n\nstory 1" and held_out.read_text() == "story 2\n\nstory 3\n\nstory 4"
