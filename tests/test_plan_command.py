"""``appliance plan`` as people call it: cards that are not here, questions, pictures, and refusals with their exit codes."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest

from appliance import cli, plan_command
from appliance.config import EngineConfig
from appliance.memory.cards import find_card
from appliance.memory.plan import PlanError
from appliance.memory.sizes import parse_size
from quant.errors import InputError
from tests.memory.test_planner import awq_checkpoint
from tests.memory.test_shard import LLAMA_8B


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = awq_checkpoint(tmp_path_factory.mktemp("llama"), LLAMA_8B)
    (folder / "tokenizer.json").write_text("{}")  # a plan reads nothing of it
    return str(folder)


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = cli.run(["plan", *arguments])
    out, err = capsys.readouterr()
    return code, out, err


def test_a_card_that_is_not_here(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, model, "--gpu", "4090", "--sequences", "16", "--context", "4k")
    assert (code, err) == (0, "")
    for part in (
        "NVIDIA GeForce RTX 4090 (cuda): 23.99 GiB",
        "16 sequences at once: up to 8,",
        "Sequences of 4,000 tokens: 3",
        "16 sequences of 4,000 tokens fit at once",
        "With other caches",
        "Predicted speed, not measured",
    ):
        assert part in out, part


def test_json(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, model, "--gpu", "RTX 4090", "--json", "--sequences", "9999999")
    found = json.loads(out)
    assert (code, err, found["fits"]) == (1, "", False) and found["asked"]["longest_context"] == 0
    code, out, err = run(
        capsys, model, "--gpu", "RTX 4090", "--json", "--max-model-len", "8192", "--gpu-memory-utilization", "0.26"
    )
    found = json.loads(out)
    assert code == 1 and found["fits"] is False and "does not fit" in found["error"]
    first = found["remedies"][0]
    assert first["flags"].startswith("--gpu-memory-utilization") and first["effect"] and first["tokens"] >= 8192
    assert find_card(found["cards_that_fit"][0]).memory > 24564
    assert first["command"].startswith(f"appliance serve {model} ") and err.startswith("appliance: error: ")


def test_a_refusal_names_what_would_fit_with_its_effect(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, model, "--gpu", "4090", "--max-model-len", "8192", "--gpu-memory-utilization", "0.26")
    lines = err.splitlines()
    assert code == 1 and not out and lines[0].startswith("appliance: error: ") and len(lines) >= 2
    assert all(": " in line and "room for" in line for line in lines[1:-1])
    assert lines[-1].startswith("  another card: the smallest that would do are GeForce RTX 5090 (31.84 GiB), ")


@pytest.mark.parametrize("question", [("--sequences", "64"), ("--context", "4k"), ("--sequences", "12", "--context", "2k")])
def test_a_refusal_is_about_what_was_asked_for(model: str, question: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    """A card on which not even the model fits: each remedy, and each card, makes fit what was asked for, or none is named."""
    asked = model, "--json", *question
    where = *asked, "--gpu", "RTX 2060"
    code, out, _ = run(capsys, *where)
    found = json.loads(out)
    assert code == 1 and "does not fit" in found["error"] and found["remedies"] and found["cards_that_fit"]
    for one in found["remedies"]:
        code, out, _ = run(capsys, *where, *one["flags"].split())
        assert code == 0 and json.loads(out)["fits"], one["flags"]
        assert ("--max-num-seqs" in one["command"]) and ("--max-model-len" in one["command"]) == ("--context" in question)
    assert run(capsys, *asked, "--gpu", found["cards_that_fit"][0])[0] == 0


def test_a_refusal_says_where_nothing_makes_fit_what_was_asked_for(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, model, "--memory", "4GiB", "--device", "cuda", "--sequences", "100000")
    assert code == 1 and "What would fit: --cpu-offload-gb" in err
    assert ". Nothing makes 100000 sequences of 256 tokens fit at once\n" in err


def test_what_would_make_so_many_fit_of_a_model_that_fits(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    where = model, "--gpu", "4060", "--max-num-seqs", "8"
    blocks = json.loads(run(capsys, *where, "--json")[1])["kv_cache"]["num_blocks"]
    code, out, _ = run(capsys, *where, "--sequences", f"{blocks + 1}")
    assert code == 1 and f"{blocks + 1} sequences at once: they do not fit, however short" in out
    assert f"What would make that fit (--max-num-seqs {blocks + 1}, and one of these)\n  --" in out
    assert "  another card: the smallest that would do are " in out


def test_a_refusal_names_who_holds_the_card(
    model: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = "Process ID : 991\\nName : /usr/bin/game\\nUsed GPU Memory : 6000 MiB\\n"
    script = tmp_path / "nvidia-smi"
    script.write_text(
        f'#!/bin/sh\nif [ "$1" = -q ]; then printf "{process}"; else echo "NVIDIA GeForce RTX 3070, 8.6, 8192, 1800"; fi\n'
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    code, out, err = run(capsys, model, "--device", "cuda")
    assert code == 1 and not out
    assert "\n  fewer programs on the card: 6.24 GiB held by the driver and others: game (pid 991, 5.86 GiB)\n" in err


def test_memory_for_grammars_follows_the_number_of_sequences(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = {
        number: json.loads(run(capsys, model, "--memory", "48GiB", "--max-num-seqs", str(number), "--json")[1])
        for number in (1, 64)
    }
    places = {number: plan["grammars_bytes"]["masks and places"] for number, plan in found.items()}
    assert 0 < places[1] < 200 << 10 and places[64] == 64 * places[1]
    assert found[1]["total_bytes"] < found[64]["total_bytes"]


def test_several_cards(model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    first = run(capsys, model, "--gpu", "2x RTX 3090")
    assert first[0] == 0 and first[1].startswith("Tensor parallel over 2 cards (NVIDIA GeForce RTX 3090)")
    assert run(capsys, model, "--gpu", "3090", "--gpu", "3090") == first == run(capsys, model, "--gpu", "3090,3090")
    monkeypatch.setenv("APPLIANCE_GPU", "2x RTX 3090")
    assert run(capsys, model) == first
    monkeypatch.delenv("APPLIANCE_GPU")
    code, out, _ = run(capsys, model, "--gpu", "3090,4060", "--json")
    found = json.loads(out)
    assert code == 0 and found["device"]["name"] == "NVIDIA GeForce RTX 4060" and len(found["tensor_parallel"]["cards"]) == 2
    assert run(capsys, model, "--gpu", "3x 3090")[0] == 2


def test_another_size_of_memory(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, model, "--memory", "48GiB")
    assert code == 0 and "a machine with 48.00 GiB (cpu): 48.00 GiB" in out and "No speed is predicted" in out
    code, out, _ = run(capsys, model, "--gpu", "4090", "--memory", "48G")
    assert code == 0 and "RTX 4090 (cuda): 48.00 GiB, 47.55 GiB available" in out
    assert "a card with 16.00 GiB (cuda)" in run(capsys, model, "--device", "cuda", "--memory", "16GiB")[1]
    sizes = {"24GiB": 24 << 30, "24g": 24 << 30, "24 GB": 24 * 10**9, "512MiB": 1 << 29, "1.5T": 3 << 39, "2kb": 2000}
    assert {text: parse_size("--memory", text) for text in sizes} == sizes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--gpu 9090", "--gpu '9090' is not in the table of"),
        ("--gpu A100", "--gpu 'A100' is one of several: "),
        ("--gpu 4090 --device cpu", "--gpu plans for a card, and --device cpu for none"),
        ("--memory 24", "--memory is '24': a size is needed"),
        ("--memory 0G", "--memory is '0G': a size is needed"),
        ("--device tpu --memory 24G", "--device 'tpu' is not known"),
        ("--gpu 4090 --context auto", "--context is 'auto': a whole number of at least 2 tokens"),
        ("--gpu 4090 --context 1", "--context is '1': a whole number of at least 2 tokens"),
        ("--gpu 4090 --context 9000", "--context is 9000, but the model was made for at most 8192"),
        ("--gpu 4090 --sequences 0", "--sequences is 0: at least 1 is needed"),
        ("--gpu 4090 --sequences x", "Invalid value for --sequences"),
        ("--gpu 4090 --svg /no/such/folder/a.svg", "--svg /no/such/folder/a.svg: No such file or directory"),
    ],
)
def test_bad_input_is_one_line(model: str, arguments: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, model, *arguments.split())
    assert code == 2 and not out and len(err.splitlines()) == 1
    assert err.startswith(f"appliance: error: {message}")


def test_the_picture(model: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "map.svg"
    code, out, err = run(capsys, model, "--gpu", "4090", "--svg", str(path), "--json")
    assert code == 0 and json.loads(out)["fits"] and str(path) in err
    words = "".join(ElementTree.parse(path).getroot().itertext())
    assert "on NVIDIA GeForce RTX 4090" in words and "Predicted decode speed, not measured" in words
    for drawn, older in ((tmp_path / "new.svg", ""), (path, "; the file there is older")):
        before = path.read_bytes()
        code, out, err = run(capsys, model, "--memory", "16M", "--device", "cpu", "--svg", str(drawn))
        assert code == 1 and not out and f"note: no memory map is written to {drawn}: there is no plan to draw{older}\n" in err
        assert path.read_bytes() == before and not (tmp_path / "new.svg").exists()


class Report:
    """As appliance.memory.report has it."""

    steps = 3

    def __init__(self, holds: bool) -> None:
        self.holds = holds
        self.plan = SimpleNamespace(table=lambda: "the plan")

    def table(self) -> str:
        return "the rows"

    def to_dict(self) -> dict[str, object]:
        return {"holds": self.holds, "rows": []}


@pytest.mark.parametrize("holds", [True, False])
def test_check(model: str, holds: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Path, EngineConfig]] = []

    def check(directory: Path, config: EngineConfig) -> Report:
        asked.append((directory, config))
        return Report(holds)

    monkeypatch.setattr(plan_command, "check_apart", check)
    code, out, err = run(capsys, model, "--check", "--max-model-len", "64")
    assert (code, err) == (0 if holds else 1, "") and asked == [(Path(model), EngineConfig(model=model, max_model_len=64))]
    assert out.startswith("the plan\n\nPlanned against measured, after 3 steps") and "the rows" in out
    code, out, _ = run(capsys, model, "--check", "--json")
    assert code == (0 if holds else 1) and json.loads(out) == {"fits": True, "holds": holds, "rows": []}


def test_check_of_what_does_not_fit_or_is_not_here(
    model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def check(directory: Path, config: EngineConfig) -> Report:
        raise PlanError("the model does not fit", ())

    monkeypatch.setattr(plan_command, "check_apart", check)
    assert run(capsys, model, "--check") == (1, "", "appliance: error: the model does not fit\n")
    for flags in ("--gpu 4090", "--memory 8G", "--sequences 3", "--context 512", "--svg a.svg"):
        code, _, err = run(capsys, model, "--check", *flags.split())
        assert code == 2 and err.startswith(f"appliance: error: --check loads the model on this machine, so {flags.split()[0]} ")


def test_sizes_that_are_none() -> None:
    for text in ("", "GiB", "-1G", "1e3G", "nanG", "24 GiB free", "24PB"):
        with pytest.raises(InputError, match="--memory is"):
            parse_size("--memory", text)
