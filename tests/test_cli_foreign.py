"""What is said to do instead of others' flags, commands and routes can be done: all that these texts name exists."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import fields

import pytest

from appliance import cli
from appliance.cli_foreign import BENCH_INSTEAD, COMMANDS, INSTEAD
from appliance.config import EngineConfig, ServerConfig
from appliance.core.params import StructuredOutputsParams
from appliance.server.habits import UNSERVED
from appliance.server.operations import OPERATIONS
from appliance.server.responses.schemas import ResponsesRequest
from appliance.server.schemas import ChatRequest, CompletionRequest

OWN = [field for kind in (EngineConfig, ServerConfig) for field in fields(kind)]
FLAGS = {f"--{prefix}{field.name.replace('_', '-')}" for field in OWN for prefix in ("", "no-")}
ROUTES = {route.split()[1] for route in OPERATIONS} | UNSERVED.keys() | {"/openapi.json"}
NAMES = {name for kind in (ChatRequest, CompletionRequest, ResponsesRequest) for name in kind.model_fields}
NAMES |= {field.name for field in fields(StructuredOutputsParams)}
NAMES |= {"include_usage", "num_speculative_tokens", "generation_config"}


def strange(text: str, helped: str) -> Iterator[str]:
    """Names in a text that are of nothing here; ``helped``: what the commands that it names say to --help."""
    for flag in re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", text):
        if flag not in FLAGS and not re.search(rf"{flag}\b", helped):
            yield flag
    yield from {route.rstrip(".") for route in re.findall(r"(?<= )/[\w/.]+", text)} - ROUTES
    yield from set(re.findall(r"(?<!/)\b[a-z]+(?:_[a-z]+)+\b", text)) - NAMES


@pytest.mark.parametrize("told", [INSTEAD, BENCH_INSTEAD, COMMANDS, UNSERVED], ids=["flags", "of bench", "commands", "routes"])
def test_what_is_to_be_done_instead_exists(told: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    commands = {name for text in told.values() for name in re.findall(r"appliance ([a-z]+)", text)}
    assert commands <= set(cli.app)
    for command in [[name] for name in commands] + [["bench", "serve"]] * (told is BENCH_INSTEAD):
        assert cli.run([*command, "--help"]) == 0
    helped = capsys.readouterr().out + "--help"
    assert {name: found for name, text in told.items() if (found := list(strange(text, helped)))} == {}


def test_a_name_that_is_of_nothing_is_found() -> None:
    assert list(strange("use --nothing, or GET /none with no_such_field", "")) == ["--nothing", "/none", "no_such_field"]
    assert not list(strange("use --seed, or GET /stats with max_tokens; --prompt", "--prompt TEXT"))
