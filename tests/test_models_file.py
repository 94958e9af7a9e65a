"""The file of --models: what it says, what it leaves to the command line, and what is wrong with it in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from appliance import cli
from appliance.config import EngineConfig, ServerConfig
from appliance.models_file import read_models
from quant.errors import InputError
from tests.memory.test_planner import awq_checkpoint
from tests.memory.test_shard import LLAMA_8B

GOOD = """
[chat]
model = "here"
aliases = ["gpt-4o", "chat/latest"]
max-model-len = "8k"
swap_space = 2
reasoning_parser = "qwen3"
idle_unload = 600
[small]
model = "someone/small"
load = "demand"
"""


def write(folder: Path, text: str) -> str:
    (folder / "models.toml").write_text(text)
    return str(folder / "models.toml")


def test_what_it_says(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    chat, small = read_models(write(tmp_path, GOOD), EngineConfig(seed=7, max_num_seqs=4), ServerConfig(idle_unload=60.0))
    assert chat.engine == EngineConfig(model=str(tmp_path / "here"), max_model_len="8k", swap_space=2.0, seed=7, max_num_seqs=4)
    assert chat.server.served_model_name == ("chat", "gpt-4o", "chat/latest") and chat.load == "start"
    assert (chat.server.reasoning_parser, chat.server.idle_unload) == ("qwen3", 600.0)
    assert small.engine == EngineConfig(model="someone/small", seed=7, max_num_seqs=4)
    assert (small.server.served_model_name, small.server.idle_unload, small.load) == (("small",), 60.0, "demand")


def test_adapters_lie_beside_it_too(tmp_path: Path) -> None:
    (tmp_path / "sql").mkdir()
    text = '[chat]\nmodel = "m"\nlora_modules = ["sql=sql", "tone=org/tone"]\nmax_loras = 4'
    (chat,) = read_models(write(tmp_path, text), EngineConfig(), ServerConfig())
    assert chat.engine.lora_modules == (f"sql={tmp_path / 'sql'}", "tone=org/tone") and chat.engine.max_loras == 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "names no model"),
        ("[a", "is not valid TOML"),
        ("a = 1", r"\[a\] is no table"),
        ("[a]", r"\[a\]: model is missing"),
        ("[a]\nmodel = 3", r"\[a\]: model is missing"),
        ('[a]\nmodel = "m"\nport = 80', r"\[a\]: there is no option 'port' for a model; there are activation_dtype"),
        ('[a]\nmodel = "m"\ndevice = "cpu"', "no option 'device'"),
        ('[a]\nmodel = "m"\ncpu_offload_gb = "much"', r"\[a\]: cpu_offload_gb is 'much': input should be a valid number"),
        ('[a]\nmodel = "m"\nenforce_eager = "perhaps"', r"\[a\]: enforce_eager is 'perhaps': input should be a valid boolean"),
        ('[a]\nmodel = "m"\nidle_unload = -5', r"\[a\]: idle_unload is -5: seconds, 0 or more, are needed"),
        ('[a]\nmodel = "m"\nidle_unload = nan', r"\[a\]: idle_unload is nan"),
        ('[a]\nmodel = "m"\nload = "later"', r'load is \'later\': "start" or "demand" is needed'),
        ('[a]\nmodel = "m"\naliases = "b"', "aliases is 'b': a list of names is needed"),
        ('["a b"]\nmodel = "m"', "'a b' cannot be a model's name"),
        ('[a]\nmodel = "m"\n[b]\nmodel = "m"\naliases = ["a"]', "two models answer to the name 'a'"),
        ('[a]\nmodel = "m"\n[b]\nmodel = "m"\nlora_modules = ["a=x"]', "two models answer to the name 'a'"),
        ('[a]\nmodel = "m"\nlora_modules = ["x"]', r"\[a\]: --lora-modules has 'x': NAME=DIRECTORY is needed"),
        ('[a]\nmodel = "m"\nlora_modules = 3', r"\[a\]: lora_modules is 3: "),
    ],
)
def test_what_is_wrong_with_it(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        read_models(write(tmp_path, text), EngineConfig(), ServerConfig())
    assert "\n" not in str(error.value) and str(error.value).startswith("--models ")


def test_a_file_that_is_not_there() -> None:
    with pytest.raises(InputError, match="No such file"):
        read_models("nowhere.toml", EngineConfig(), ServerConfig())


def test_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "large").mkdir()
    awq_checkpoint(tmp_path / "large", LLAMA_8B)
    file = write(tmp_path, '[a]\nmodel = "large"\n[b]\nmodel = "large"')
    assert cli.run(["plan", "--models", file, "--gpu", "RTX 4090"]) == 0
    assert "All of them fit together" in capsys.readouterr().out
    assert cli.run(["plan", "--models", file, "--gpu", "RTX 4060", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert not found["fits"] and found["fit_together"] == [["a"], ["b"]] and found["models"]["a"]["total_bytes"] > 5e9
    assert cli.run(["plan", "--models", file, "--memory", "2GiB"]) == 1
    assert "a: " in (err := capsys.readouterr().err) and "does not fit" in err
    typo = write(tmp_path, '[a]\nmodel = "/no/such/model"\n[b]\nmodel = "/no/such/model"\ndtype = "fp16"')
    for command in (["plan"], ["serve", "--port", "0"]):
        assert cli.run([*command, "--models", typo]) == 2
        assert "error: b: --dtype 'fp16' is not known" in capsys.readouterr().err
    for flags, word in ((["--context", "4k"], "--context"), (["--check"], "--check"), (["--gpu", "2x RTX 4090"], "several")):
        assert cli.run(["plan", "--models", file, *flags]) == 2
        assert word in capsys.readouterr().err
    assert cli.run(["serve", "here", "--models", file]) == 2
    assert "names the models: leave out here" in capsys.readouterr().err
