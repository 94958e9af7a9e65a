"""The command line: options, their sources, errors in one line, and what may not be imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from appliance import cli
from appliance.adapters import read_names
from appliance.cli_flags import translate
from appliance.cli_foreign import COMMANDS, INSTEAD, SWITCHES, VALUED
from appliance.config import EngineConfig, ServerConfig
from appliance.server.options import check_server
from appliance.version import __version__
from quant.errors import InputError
from tests.tiny_model import make_checkpoint

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[tuple[EngineConfig, ServerConfig]]:
    """What ``serve`` would be called with."""
    calls: list[tuple[EngineConfig, ServerConfig]] = []

    def serve(engine: EngineConfig, server: ServerConfig) -> int:
        calls.append((engine, server))
        return 0

    monkeypatch.setattr("appliance.server.run.serve", serve)
    for name in [name for name in os.environ if name.startswith(("APPLIANCE_", "VLLM_"))]:
        monkeypatch.delenv(name)
    return calls


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("models") / "tiny")


def test_no_arguments_is_all_defaults(served: list[Any]) -> None:
    assert cli.run(["serve"]) == 0
    assert served == [(EngineConfig(), ServerConfig())]


def test_flags(served: list[Any]) -> None:
    line = (
        "serve my/model --gpu-memory-utilization 0.5 --max_model_len 32k -q awq_marlin --swap-space=2 --port 9 "
        "--served-model-name one two --strict-requests --max-logprobs -1 --host ::1"
    )
    assert cli.run(line.split()) == 0
    engine = EngineConfig(model="my/model", gpu_memory_utilization=0.5, max_model_len="32k", quantization="awq", swap_space=2.0)
    server = ServerConfig(port=9, served_model_name=("one", "two"), strict_requests=True, max_logprobs=-1, host="::1")
    assert served == [(engine, server)]
    assert cli.run(["serve", "-q", "int8_per_channel_weight_only"]) == 0 and served.pop()[0] == EngineConfig(quantization="int8")
    given = '{"method": "ngram", "num_speculative_tokens": 4}'
    assert cli.run(["serve", "-sc", given]) == 0 and served.pop() == (EngineConfig(speculative_config=given), ServerConfig())
    cli.run(["serve", "--model", "m", "--max-model-len", "4096"])
    assert served[-1][0].model == "m" and served[-1][0].max_model_len == 4096


def test_a_model_behind_a_list_is_no_part_of_it(served: list[Any], model: Path) -> None:
    """Or the embedded one would be served, with a path for a key."""
    assert cli.run(["serve", "--api-key", "a", "b", str(model)]) == 0
    assert served[-1] == (EngineConfig(model=str(model)), ServerConfig(api_key=("a", "b")))
    assert cli.run(["serve", "--served-model-name", "one", str(model), "--port", "9"]) == 0
    assert served[-1] == (EngineConfig(model=str(model)), ServerConfig(port=9, served_model_name=("one",)))


def test_every_option_is_a_flag_a_file_key_and_a_variable(
    served: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for kind in (EngineConfig, ServerConfig):
        for field in fields(kind):
            default = getattr(kind(), field.name)
            value: Any = (not default) if isinstance(default, bool) else "3"
            if isinstance(default, float) or field.name == "gpu_memory_utilization":
                value = 3.0
            if "int" in str(field.type):
                value = 3
            expected = ("3",) if isinstance(default, tuple) else value
            flag = ("--no-" if default is True else "--") + field.name.replace("_", "-")
            cli.run(["serve", flag] if isinstance(default, bool) else ["serve", flag, str(value)])
            (tmp_path / "a.toml").write_text(f"{field.name} = {json.dumps(list(expected) if expected == ('3',) else value)}\n")
            cli.run(["serve", "--config", str(tmp_path / "a.toml")])
            with monkeypatch.context() as patch:
                patch.setenv(f"APPLIANCE_{field.name.upper()}", str(value))
                cli.run(["serve"])
            found = [getattr(engine if kind is EngineConfig else server, field.name) for engine, server in served]
            assert found == [expected] * 3, field.name
            served.clear()


def test_a_port_that_kubernetes_means_is_none(served: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """It sets such variables in all containers beside a service that is called appliance."""
    monkeypatch.setenv("APPLIANCE_PORT", "tcp://10.0.0.1:80")
    monkeypatch.setenv("APPLIANCE_HOST", "::1")
    assert cli.run(["serve"]) == 0 and served.pop() == (EngineConfig(), ServerConfig(host="::1"))
    assert cli.run(["serve", "--port", "9"]) == 0 and served.pop()[1].port == 9


def test_which_source_wins(served: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.toml"
    file.write_text('model = "file"\n[engine]\nmax-num-seqs = 1\nseed = 1\nblock_size = 1\n[server]\nport = 1\n')
    monkeypatch.setenv("APPLIANCE_CONFIG", str(file))
    monkeypatch.setenv("APPLIANCE_SEED", "2")
    monkeypatch.setenv("APPLIANCE_BLOCK_SIZE", "2")
    assert cli.run(["serve", "--block-size", "3"]) == 0
    engine, server = served[-1]
    assert (engine.model, engine.max_num_seqs, engine.seed, engine.block_size, server.port) == ("file", 1, 2, 3, 1)
    assert cli.run(["serve", "mine"]) == 0 and served[-1][0].model == "mine"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("serve --port x", 'Invalid value for --port: unable to convert "x" into int.'),
        ("serve --frobnicate 3", "Unknown option: --frobnicate."),
        ("serve a b", "'b': nothing more is expected here"),
        ("serve a --model b", "'b': nothing more is expected here"),
        ("serve --model", "--model needs a value"),
        ("serve --config", "--config needs the name of a TOML file"),
        ("serve --config nowhere.toml", "--config nowhere.toml: No such file or directory"),
        ("serve -tp 2", "--tensor-parallel-size 2: only one device is supported: leave it out, or use 1"),
        ("serve --tensor_parallel_size=2", "--tensor-parallel-size 2: only one device"),
        ("serve --lora-modules", "--lora-modules needs a value"),
        ("serve --lora-modules a", "--lora-modules has 'a': NAME=DIRECTORY is needed"),
        ("serve --lora-modules a=x a=y", "--lora-modules names 'a' twice"),
        ("serve --lora-modules demo=.", "--lora-modules: 'demo' is a name of the model itself"),
        ("serve --lora-modules a=/no/such", "no such directory: /no/such"),
        ("serve --lora-modules a=.", "/"),
        ('serve --lora-modules {"name":"a"}', '--lora-modules has \'{"name":"a"}\': name and path are needed'),
        ('serve --lora-modules {"name":"a","dir":"b"}', "--lora-modules: there is no field 'dir'"),
        ("serve --lora-modules {", "--lora-modules has '{', which is no JSON"),
        ("serve --max-loras 0", "--max-loras is 0: a whole number of at least 1 is needed"),
        ("serve --max-cpu-loras 4", "--max-cpu-loras: adapters stay where the model is, all that are loaded: use --max-loras"),
        ("serve --lora a.gguf", "--lora: use --lora-modules NAME=DIRECTORY, of an adapter as PEFT writes it"),
        ("serve --lora-dtype float32", "--lora-dtype float32: adapters are computed in what --dtype says"),
        ("serve --lora-unheard-of", "--lora-unheard-of: not supported: LoRA adapters are given with --lora-modules"),
        ("serve --allowed-origins [1]", "--allowed-origins is an origin, as https://chat.example, or a list of them in JSON"),
        ("plan --kv-cache-dtype fp7", "--kv-cache-dtype is 'fp7': one of auto, fp8, fp8_e4m3"),
        ("plan /no/such/model", "no such directory: /no/such/model"),
        ("frobnicate", 'Unknown command "frobnicate".'),
        ("run llama3", "there is no command run: appliance chat MODEL talks to a model, appliance serve MODEL serves one"),
        ("serve m --max-modellen 5", "Unknown option: --max-modellen. Did you mean --max-model-len?"),
        ("serve m --prot 5", "Unknown option: --prot. Did you mean --port?"),
        ("serve m --temper 0.7", "Unknown option: --temper.\n"),
        ("serve m --nonesuch=3", "Unknown option: --nonesuch.\n"),
        (
            "serve m --temperature 0.7",
            "--temperature: requests say it; for those that do not, the model's generation_config.json",
        ),
        ("serve m -c 4096", "-c: use --max-model-len"),
        ("serve -hf org/model", "-hf: name the model as the first argument: organisation/model"),
        ("serve m -ctk q8_0", "-ctk: use --kv-cache-dtype, which is for keys and values: fp8, int8 or int4"),
        ("serve m --fully-sharded-loras", "--fully-sharded-loras: only one device is supported"),
        ("serve m --enable-chunked-prefill False", "--enable-chunked-prefill False: prompts are always computed in chunks"),
        ("serve m --speculative-disable-by-batch-size 4", "--speculative-disable-by-batch-size: there are no draft models"),
        (
            "serve m --default-chat-template-kwargs [1]",
            "--default-chat-template-kwargs is '[1]': an object of the template's variables",
        ),
        ("serve m --default-chat-template-kwargs {", "--default-chat-template-kwargs is '{': JSON is needed, as"),
        (
            'serve m --default-chat-template-kwargs {"tools":[]}',
            "--default-chat-template-kwargs may not hold 'tools': that is said by",
        ),
        ("serve m --structured-outputs-config.reasoning_parser x", "--structured-outputs-config x: only a backend may be named"),
        ("serve m --nnodes 2", "--nnodes 2: only one device is supported"),
        ("serve m --mem-fraction-static 0.8", "--mem-fraction-static: use --gpu-memory-utilization"),
        ("serve m --hf-overrides {1}", "--hf-overrides {1}: not supported: edit config.json in the model's directory"),
    ],
)
def test_errors_are_one_line(line: str, message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.run(line.split()) == 2
    output = capsys.readouterr()
    assert output.err.startswith(f"appliance: error: {message}") and len(output.err.splitlines()) == 1 and not output.out


def test_bad_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "a.toml"
    for text, words in (("port = ", "is not valid TOML"), ("prot = 3", "there is no option 'prot'"), ('port = "x"', "port")):
        file.write_text(text)
        assert cli.run(["serve", "--config", str(file)]) == 2
        error = capsys.readouterr().err
        assert words in error and len(error.splitlines()) == 1


def test_foreign_flags(capsys: pytest.CaptureFixture[str], served: list[Any]) -> None:
    line = "serve m --disable-log-stats -tp 1 --disable-log-requests --trust_remote_code --use-v2-block-manager"
    assert cli.run(line.split()) == 0 and served == [(EngineConfig(model="m"), ServerConfig(enable_log_requests=False))]
    notes = capsys.readouterr().err.splitlines()
    assert len(notes) == 4 and notes[0] == "appliance: note: --disable-log-stats changes nothing here"
    own = {"--" + field.name.replace("_", "-") for kind in (EngineConfig, ServerConfig) for field in fields(kind)}
    assert not own & (SWITCHES | VALUED.keys() | INSTEAD.keys())
    for name, values in VALUED.items():
        assert translate(["serve", name, values[0] if values else "x"]) == (["serve"], [f"{name} changes nothing here"])
    for name in INSTEAD:
        with pytest.raises(InputError, match=name):
            translate(["serve", f"{name}=something-else"])
    sizes = ["serve", "--cudagraph-capture-sizes", "1", "2", "4", "m", "-O3", "--cuda-graph-sizes=8", "16"]
    assert translate(sizes)[0] == ["serve", "m"]
    backend = ["--structured-outputs-config", '{"backend": "xgrammar"}', "--structured-outputs-config.backend=guidance"]
    assert translate(["serve", *backend])[0] == ["serve"]
    parts = [
        "--compilation-config.mode",
        "3",
        "-cc.level=2",
        "--limit-mm-per-prompt.image",
        "0",
        "--attention-config.backend",
        "x",
    ]
    assert translate(["serve", *parts, "m"])[0] == ["serve", "m"]
    assert translate(
        [
            "serve",
            "--enable-chunked-prefill",
            "True",
            "--no-enable-reasoning",
            "--no-fully-sharded-loras",
            "--enable-chunked-prefill=true",
        ]
    )[0] == ["serve"]
    assert not any(name.startswith("-") for name in COMMANDS) and not COMMANDS.keys() & set(cli.app)
    assert translate(["serve", "-q", "gptq_marlin"])[0] == ["serve", "--quantization", "gptq"]


def test_adapters(served: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    two = ("a=/x", "b=/y")
    assert cli.run(["serve", "--lora-modules", *two, "m", "--max-loras", "3"]) == 0
    assert served.pop()[0] == EngineConfig(model="m", lora_modules=two, max_loras=3)
    told = '{"name": "a", "path": "/x", "base_model_name": "m"}'
    line = ["serve", "--lora-modules", told, "--lora-modules=b=/y", "--enable-lora", "--max-lora-rank", "8"]
    assert cli.run([*line, "--allow-runtime-lora-updating"]) == 0
    engine, server = served.pop()
    assert engine == EngineConfig(lora_modules=(told, "b=/y"), enable_lora=True, max_lora_rank=8)
    assert read_names(engine.lora_modules) == {"a": Path("/x"), "b": Path("/y")} and server.allow_runtime_lora_updating
    (tmp_path / "a.toml").write_text('lora_modules = ["a=/with a space"]\nallow_runtime_lora_updating = true')
    assert cli.run(["serve", "--config", str(tmp_path / "a.toml")]) == 0
    assert served[-1] == (EngineConfig(lora_modules=("a=/with a space",)), ServerConfig(allow_runtime_lora_updating=True))
    assert cli.run(["serve", "--lora-paths", "a=/x", "--no-enable-lora"]) == 0 and served.pop()[0].lora_modules == ("a=/x",)
    monkeypatch.setenv("APPLIANCE_LORA_MODULES", "a=/x b=/y")
    assert cli.run(["serve"]) == 0 and served.pop()[0].lora_modules == two


def test_a_key_of_vllm_in_the_environment_is_asked_for(
    served: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "sk two words, and a comma")
    (tmp_path / "a.toml").write_text('api_key = ["of the file"]')
    assert cli.run(["serve"]) == cli.run(["serve", "--config", str(tmp_path / "a.toml")]) == 0
    assert cli.run(["serve", "--api-key", "of the flag"]) == 0
    monkeypatch.setenv("APPLIANCE_API_KEY", "ours")
    assert cli.run(["serve"]) == 0
    keys = [server.api_key for _engine, server in served]
    assert keys == [("sk two words, and a comma",)] * 2 + [("of the flag",), ("ours",)]
    monkeypatch.setenv("VLLM_API_KEY", "")
    monkeypatch.delenv("APPLIANCE_API_KEY")
    assert cli.run(["serve"]) == 0 and served[-1][1].api_key == ()


def test_variables_of_a_server_are_no_options_of_its_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container, where both run with the same environment."""
    asked: list[Any] = []
    for command in ("bench.serve.serve", "chat.run.main"):
        monkeypatch.setattr(f"appliance.{command}", lambda *args: asked.append(args[0]) or 0)
    for name, value in {
        "MODEL": "/srv/m",
        "SERVED_MODEL_NAME": "a b",
        "INSECURE": "1",
        "SSL_CA_CERTS": "/ca",
        "API_KEY": "k",
    }.items():
        monkeypatch.setenv(f"APPLIANCE_{name}", value)
    assert cli.run(["bench", "serve", "--url", "http://x"]) == cli.run(["chat", "--url=http://x"]) == 0
    bench, chat = asked
    assert bench.base_url == chat.url == "http://x" and bench.api_key == chat.api_key == "k"
    assert bench.model is bench.served_model_name is chat.model is None
    assert not bench.insecure and bench.ssl_ca_certs is None and chat.tls == {"ca_certs": None, "insecure": False}


def test_flags_of_vllms_bench(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    asked: list[Any] = []
    monkeypatch.setattr("appliance.bench.serve.serve", lambda config: asked.append(config) or 0)
    line = "bench serve --model m --tokenizer t --tokenizer-mode=auto --trust-remote-code --plot a.svg --random_input_len 7"
    assert cli.run(line.split()) == 0 and capsys.readouterr().err.count("changes nothing here") == 3
    assert (asked[0].model, asked[0].svg, asked[0].random_input_len) == ("m", "a.svg", 7)
    assert cli.run(["bench", "serve", "--use-beam-search"]) == 2 and "--extra-body" in capsys.readouterr().err


def test_debug_shows_where_an_error_comes_from() -> None:
    with pytest.raises(InputError):
        cli.run(["plan", "/no/such/model", "--config", "nowhere", "--log-level", "debug"])


def test_plan(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["plan", str(model)]) == 0
    assert "KV cache" in capsys.readouterr().out
    assert cli.run(["plan", str(model), "--json", "--max-model-len", "64"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["fits"] is True and plan["max_model_len"] == 64
    assert cli.run(["plan", str(model), "--kv-cache-memory-bytes", "64", "--json"]) in (1, 2)
    assert cli.run(["plan", str(model), "--gpu-memory-utilization", "1.5"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("appliance: error: ") and "1.5" in error


def test_a_plan_tells_of_a_missing_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bare = str(make_checkpoint(tmp_path / "bare", tokenizer=False))
    assert cli.run(["plan", bare]) == 0
    error = capsys.readouterr().err
    assert (
        error
        == f"appliance: note: {bare} has no tokenizer: `appliance serve` needs --tokenizer DIRECTORY, or --skip-tokenizer-init\n"
    )
    assert cli.run(["plan", bare, "--skip-tokenizer-init"]) == 0 and not capsys.readouterr().err
    assert cli.run(["plan", bare, "--tokenizer", "some/where"]) == 0 and not capsys.readouterr().err, "on the hub it may be"
    nowhere = str(tmp_path / "nowhere")
    for given, told in (
        (nowhere, f"--tokenizer: no such directory: {nowhere}\n"),
        (bare, error.removeprefix("appliance: note: ")),
    ):
        assert cli.run(["plan", bare, "--tokenizer", given]) == 0
        assert capsys.readouterr().err == f"appliance: note: {told}"


def test_plan_that_does_not_fit(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["plan", str(model), "--gpu-memory-utilization", "0.0001"]) == 1
    output = capsys.readouterr()
    assert output.err.startswith("appliance: error: ") and not output.out
    assert cli.run(["plan", str(model), "--gpu-memory-utilization", "0.0001", "--json"]) == 1
    answer = json.loads(capsys.readouterr().out)
    assert answer["fits"] is False and answer["error"]


def python(code: str, *args: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, env=env, timeout=60)


def test_help_and_plan_import_nothing_heavy_and_open_no_socket(model: Path) -> None:
    code = (
        "import socket, sys\n"
        "def blocked(*a, **k): raise AssertionError('a socket was opened')\n"
        "socket.socket = socket.create_connection = socket.getaddrinfo = blocked\n"
        "from appliance.cli import run\n"
        "code = run(sys.argv[1:])\n"
        "heavy = {'torch', 'transformers', 'fastapi', 'pydantic', 'uvicorn', 'textual', 'huggingface_hub', 'tokenizers'}\n"
        "print('HEAVY', sorted(heavy & sys.modules.keys()), file=sys.stderr)\n"
        "sys.exit(code)\n"
    )
    for args in (["--help"], ["serve", "--help"], ["version"], ["plan", str(model)]):
        result = python(code, *args)
        assert result.returncode == 0 and result.stderr.splitlines()[-1] == "HEAVY []", (args, result.stderr)
    help_text = python(code, "serve", "--help").stdout
    for kind in (EngineConfig, ServerConfig):
        assert all("--" + field.name.replace("_", "-") in help_text for field in fields(kind))


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    for args in (["version"], ["--version"]):
        assert cli.run(args) == 0
        assert capsys.readouterr().out.strip() == f"appliance {__version__}"
    result = subprocess.run([sys.executable, "-m", "appliance", "version"], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert result.returncode == 0 and result.stdout.strip() == f"appliance {__version__}"


def test_a_terminal_that_knows_few_characters() -> None:
    """Of a language that is none of UTF-8: what it cannot show is not there, but the rest is."""
    env = {**os.environ, "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "appliance", "tui", "--replay", "docs/session.jsonl.gz", "--once"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env, timeout=60)
    assert result.returncode == 0 and result.stdout.startswith(f"appliance {__version__} ? "), result.stderr


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--port", "99999"], "--port is 0 to 65535, got 99999"),
        (["--host", "no.such.host.invalid"], "--host no.such.host.invalid: "),
        (["--idle-unload", "-1"], "--idle-unload is -1: seconds, 0 or more, are needed"),
        (["--engine-step-timeout", "nan"], "--engine-step-timeout is nan: seconds, 0 or more, are needed"),
        (["--served-model-name", ""], "--served-model-name is empty: clients need a name to ask for"),
        (["--shutdown-timeout", "nan"], "--shutdown-timeout is nan: seconds, 0 or more, are needed"),
        (["--shutdown-timeout", "inf"], "--shutdown-timeout is inf: "),
        (["--shutdown-timeout", "-1"], "--shutdown-timeout is -1: "),
        (["--max-stored-responses", "-2"], "--max-stored-responses is at least 0 (0 for none), or -1 for no limit, got -2"),
        (["--max-output-tokens", "0"], "--max-output-tokens is 0: at least 1 is needed; what the context holds when left out"),
        (["--max-logprobs", "-5"], "--max-logprobs is at least 0 (0 for none), or -1 for no limit, got -5"),
        (["--max-num-queued-reqs", "0"], "--max-num-queued-reqs is at least 1, or -1 for no limit, got 0"),
        (["--api-key-file="], "--api-key-file is empty: give it a value, or leave it out"),
        (["--ssl-certfile="], "--ssl-certfile is empty: "),
        (["--swap-space", "1e300"], "--swap-space is 1e+300: a number of GiB, 0 or more, or as 512MiB, is needed"),
        (["--host", "nonsense.."], "--host nonsense.. cannot be a name: "),
        (
            ["--allowed-origins", "chat.example"],
            "--allowed-origins is 'chat.example': what browsers call an origin is needed, as ",
        ),
        (["--forwarded-allow-ips", "nonsense"], "--forwarded-allow-ips is 'nonsense': an address (10.0.0.1), a network "),
        (["--forwarded-allow-ips", "10.0.0.1/8"], "--forwarded-allow-ips is '10.0.0.1/8': "),
        (["--forwarded-allow-ips", "*", "--forwarded-allow-ips", "10.0.0.1"], "--forwarded-allow-ips is * and more: "),
        (["--log-level", "loud"], "--log-level is one of debug, info, warning, error, got 'loud'"),
    ],
)
def test_serve_refuses(model: Path, args: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["serve", str(model), *args]) == 2
    assert capsys.readouterr().err.startswith(f"appliance: error: {words}")


def test_origins_are_what_browsers_send() -> None:
    good = "* null https://chat.example http://localhost:3000 http://[::1]:8080 https://a.example:80 tauri://localhost moz-extension://1-a"
    check_server(
        ServerConfig(allowed_origins=tuple(good.split()), forwarded_allow_ips=("::1", "10.0.0.0/8"), max_stored_responses=-1)
    )
    bad = "chat.example https://chat.example/ https://chat.example/a https://chat.example:443 http://a:80 https://Chat.example "
    bad += "https:// https://a@b https://a? https://a# https://a:b https://a: https://ä.example https://a,https://b //a"
    for one in bad.split():
        with pytest.raises(InputError, match=r"^--allowed-origins is "):
            check_server(ServerConfig(allowed_origins=(one,)))


REFUSED = {
    "serve plan": "--dtype fp16 --kv-cache-dtype q8_0 --gpu-memory-utilization 1.5 --max-model-len many --lm-head-dtype int3 "
    "--threads 0 --preemption-mode leave --preemption-mode swap --scheduling-policy best",
    "serve": "--reasoning-parser nonesuch --tool-call-parser nonesuch --chat-template /no/such/file --generation-config /no/such",
    "plan": "--context many --memory much",
}
ONES = [(c, *pair) for cs, line in REFUSED.items() for c in cs.split() for pair in zip(line.split()[::2], line.split()[1::2])]


@pytest.mark.parametrize(("command", "option", "value"), ONES)
def test_an_option_is_refused_before_a_model_is_looked_for(
    command: str, option: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Or else a download of hours may come before a typing error is told."""
    port = ["--port", "0"] if command == "serve" else []
    assert cli.run([command, "/no/such/model", *port, option, value]) == 2
    assert capsys.readouterr().err.startswith(f"appliance: error: {option} ")


EARLY = {
    "quantize": "--output /etc --output /etc/passwd/made --output / --calibration /no/such/file --device tpu --threads 0 "
    "--method magic --bits 5 --target-bits 20 --target-bits 1.5 --fit nonesuch",
    "quantize --fit 24GB": "--context many --sequences 0 --kv-cache-dtype fp7",
    "eval --text TEXT": "--kv-cache-dtype fp7 --dtype fp16 --threads 0 --device tpu --questions /no/such/file --plot a.png",
    "eval --text TEXT --length 64": "--stride 65",
    "eval --questions TEXT": "--text /no/such/file",
}
EARLY_ONES = [(c, *pair) for c, line in EARLY.items() for pair in zip(line.split()[::2], line.split()[1::2])]


@pytest.mark.parametrize(("command", "option", "value"), EARLY_ONES)
def test_an_option_of_other_commands_is_refused_before_a_model_is_looked_for(
    command: str, option: str, value: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text('{"question": "a", "answer": "b", "text": "c"}')
    name, *given = command.replace("TEXT", str(text)).split()
    assert cli.run([name, "/no/such/model", *given, option, value]) == 2
    told = capsys.readouterr().err
    assert option in told or value in told, told
    assert "no such directory" not in told


def test_an_option_of_one_of_several_models_is_refused_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text").write_text("text")
    for wrong, words in (("kv_cache_dtype=fp7", "--kv-cache-dtype is 'fp7'"), ("nonesuch=1", "'nonesuch' is no option")):
        assert cli.run(["eval", "/no/such/model", f"/no/such/other@{wrong}", "--text", str(tmp_path / "text")]) == 2
        assert words in capsys.readouterr().err


def test_a_method_is_refused_before_a_model_is_looked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["plan", "/no/such/model", "-q", "gguf"]) == 2
    assert capsys.readouterr().err.startswith("appliance: error: quantization: 'gguf' is not known; one of awq, gptq")
    assert cli.run(["plan", "/no/such/model", "-q", "awq_marlin"]) == 2
    assert capsys.readouterr().err.startswith("appliance: error: no such directory: /no/such/model")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
@pytest.mark.parametrize("command", ["version", "plan"])
def test_a_full_disk_behind_the_output_is_a_line(command: str) -> None:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    with open("/dev/full", "w") as full:
        args = [sys.executable, "-m", "appliance", command]
        found = subprocess.run(args, stdout=full, stderr=subprocess.PIPE, text=True, env=env, timeout=60)
    assert (found.returncode, found.stderr) == (1, "appliance: error: the output cannot be written: No space left on device\n")


def test_the_demo_model_is_served_when_none_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from appliance import hub
    from appliance.server import run

    monkeypatch.setattr(run, "demo_model", lambda: tmp_path)
    engine, server = run.locate(EngineConfig(), ServerConfig())
    assert (engine.model, engine.tokenizer, server.served_model_name) == (str(tmp_path), str(tmp_path), ("demo",))
    engine, server = run.locate(EngineConfig(model=str(tmp_path)), ServerConfig())
    assert server.served_model_name == (str(tmp_path),)
    monkeypatch.setattr(run, "resolve", lambda name, revision: tmp_path)
    assert run.locate(EngineConfig(model="https://huggingface.co/org/tiny"), ServerConfig())[1].served_model_name == ("org/tiny",)
    monkeypatch.setattr(hub, "__file__", str(tmp_path / "hub.py"))
    with pytest.raises(InputError, match=r"^no model given, and this installation has no demo model: name a directory"):
        hub.demo_model()


def test_a_model_that_cannot_be_loaded(model: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    make_checkpoint(broken)
    (broken / "tokenizer.json").unlink()
    result = subprocess.run(
        [sys.executable, "-m", "appliance", "serve", str(broken), "--port", "0", "--log-level", "warning"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=90,
    )
    assert result.returncode == 2 and result.stderr.startswith("appliance: error: ") and len(result.stderr.splitlines()) == 1
    assert "tokenizer" in result.stderr
