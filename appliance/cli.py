"""The command line. Options are the fields of EngineConfig and ServerConfig; nothing heavy is imported until a command needs it.

What wins: the command line, then APPLIANCE_* in the environment, then the file of --config, then the default.
"""

from __future__ import annotations

import errno
import io
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from difflib import SequenceMatcher
from pathlib import Path
from typing import Annotated

from cyclopts import App, CycloptsError, Group, Parameter

from appliance.cli_flags import translate, translate_bench
from appliance.cli_foreign import COMMANDS
from appliance.cli_help import FORMATTER
from appliance.cli_sources import Variables, file_options, foreign_key, take_config
from appliance.config import EngineConfig, ServerConfig
from appliance.version import __version__
from quant.errors import InputError

EPILOGUE = (
    "Every option can also be set as APPLIANCE_OPTION_NAME in the environment, or in a TOML file given with --config FILE "
    "(option_name = value; tables [engine] and [server] are allowed). -q is short for --quantization."
)
NEAR = 0.8
"""Likeness (of difflib) from which on another option's name is what was meant."""
READERS = {"serve": translate, "plan": translate, "bench": translate_bench}
"""Who reads a command line before it is parsed."""
FLAT = Parameter(name="*")


CARDS = Parameter(negative=(), env_var_split=lambda _, value, **_more: [value])  # names have spaces in them
ENGINE, SERVER = EngineConfig(), ServerConfig()
EngineFlags = Annotated[EngineConfig, FLAT]
ServerFlags = Annotated[ServerConfig, FLAT]

app = App(
    name="appliance",
    help="Serve quantized language models from your own machine.",
    help_epilogue=EPILOGUE,
    group_parameters=Group("Parameters", help_formatter=FORMATTER),
    version=f"appliance {__version__}",
    version_flags=["--version"],
    result_action="return_value",
)


@app.command
def serve(model: str | None = None, /, *, engine: EngineFlags = ENGINE, server: ServerFlags = SERVER) -> int:
    """Serve a model over HTTP, with OpenAI's API.

    Parameters
    ----------
    model
        A directory with a Hugging Face checkpoint, or a name on the hub; demo, the embedded model, when left out.
    """
    from appliance.server.run import serve

    return serve(_with_model(engine, model), server)


@app.command
def doctor(model: str | None = None, /, *, port: int = SERVER.port, json: bool = False) -> int:
    """Say what this machine has, what of it will be used, what is slow, and how to mend it. Exit code 0: ready; 1: not.

    Parameters
    ----------
    model
        A model's directory, whose disk is looked at, too.
    port
        That the server is to listen on.
    json
        Print JSON instead of text.
    """
    from appliance.doctor import doctor

    return doctor(model, port, json=json)


@app.command
def plan(
    model: str | None = None,
    /,
    *,
    gpu: Annotated[tuple[str, ...], CARDS] = (),
    memory: str | None = None,
    sequences: int | None = None,
    context: str | None = None,
    svg: Path | None = None,
    check: Annotated[bool, Parameter(negative=())] = False,
    models: str | None = None,
    json: bool = False,
    engine: EngineFlags = ENGINE,
) -> int:
    """Print where the memory would go, from the checkpoint's headers alone. Exit code 0: fits; 1: does not fit; 2: bad input.

    Parameters
    ----------
    model
        A directory with a Hugging Face checkpoint, or a name on the hub; demo, the embedded model, when left out.
    gpu
        Plan for a card that need not be in this machine, as in "RTX 4090"; for several, as in "2x RTX 3090", tensor parallel.
    memory
        Plan for so much memory, as in 24GiB, instead of this machine's or of what the card has.
    sequences
        The longest context of which so many sequences fit at once. With --context: whether so many of that length do.
    context
        How many sequences of so many tokens fit at once.
    svg
        Write the memory map to this file, as a picture.
    check
        Load the model for real, and print what it takes against what was planned. Exit code 1 where that does not hold.
    models
        Plan for the models of this file (see `appliance serve --models`): which of them fit together. Exit code 1: not all.
    json
        Print JSON instead of a table.
    """
    from appliance.plan_command import Asked, plan_command

    asked = Asked(json=json, gpu=gpu, memory=memory, sequences=sequences, context=context, svg=svg, check=check)
    if models is not None:
        from appliance.plan_models import plan_models

        return plan_models(models, _with_model(engine, model), asked)
    return plan_command(_with_model(engine, model), asked)


app.command("appliance.bench.command:app", name="bench", help="Measure a server: requests a second, latencies, errors.")
app.command("appliance.chat.command:chat", name="chat", help="Talk to a model in the terminal, or ask it one question.")
app.command("appliance.quantize.command:quantize", name="quantize", help="Make a quantized checkpoint of a model.")
app.command("appliance.eval.command:evaluate", name="eval", help="Measure models side by side: what quantizing has cost.")
app.command("appliance.tui.command:tui", name="tui", help="Watch running servers in the terminal, or start one and watch it.")


@app.command
def key(
    name: str,
    /,
    *,
    requests_per_minute: int | None = None,
    tokens_per_minute: int | None = None,
    tokens_per_day: int | None = None,
    concurrency: int | None = None,
    max_prompt_tokens: int | None = None,
    max_output_tokens: int | None = None,
    expires: str | None = None,
) -> int:
    """Make an API key: its line for --api-key-file goes to the output (append it with >>), the key itself to stderr, once.

    Parameters
    ----------
    name
        Whose key it is: what logs and messages call it.
    requests_per_minute
        Most requests in a minute.
    tokens_per_minute
        Most tokens in a minute, those of prompts and of answers together.
    tokens_per_day
        Most tokens in 24 hours.
    concurrency
        Most requests at work at a time.
    max_prompt_tokens
        Most tokens in one prompt.
    max_output_tokens
        Most tokens in one answer, which ends there.
    expires
        The last day on which it is valid, as 2027-01-31; UTC.
    """
    from appliance.server.keys import make_key
    from appliance.server.limits import Limits

    limits = Limits(requests_per_minute, tokens_per_minute, tokens_per_day, concurrency, max_prompt_tokens, max_output_tokens)
    secret, line = make_key(name, limits, expires)
    print(line, flush=True)
    print(f"appliance: the key of {name}, shown this once: {secret}", file=sys.stderr)
    return 0


@app.command
def version() -> int:
    """Print the version."""
    print(f"appliance {__version__}")
    return 0


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command and exit: 0 fine, 1 no (or the engine died), 2 bad input, told in one line on stderr."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal may know fewer characters than a model, or a dashboard
    sys.exit(run(list(sys.argv[1:] if argv is None else argv)))


def run(argv: list[str]) -> int:
    debug = _debug(argv)
    try:
        command = argv[0] if argv else ""
        if command in COMMANDS:
            raise InputError(f"there is no command {command}: {COMMANDS[command]}")
        if reader := READERS.get(command):
            argv, notes = reader(argv)
            for note in notes:
                print(f"appliance: note: {note}", file=sys.stderr)
        argv, file = take_config(argv)
        app.config = (Variables("APPLIANCE_", command=False), *foreign_key(command), *file_options(file, command))
        return app(argv, exit_on_error=False, print_error=False) or 0
    except (InputError, CycloptsError) as error:
        if debug:
            raise
        _complain(error)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # as in `| head`: nobody reads on
        _drop_output()
        return 1
    except OSError as error:
        if debug or error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EIO) or error.filename is not None:
            raise
        _drop_output()
        _complain(InputError(f"the output cannot be written: {error.strerror}"))
        return 1


def _drop_output() -> None:
    """Python must not complain again while it ends, of what it has not written yet."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _complain(error: Exception) -> None:
    text = " ".join(str(error).split()) if isinstance(error, CycloptsError) else str(error)
    guess = re.fullmatch(r"(Unknown option: ([^\s=]+)\S*\.) Did you mean (\S+)\?", text)
    if guess and SequenceMatcher(None, guess[2], guess[3]).ratio() < NEAR:
        text = guess[1]
    if unused := re.fullmatch(r"Unused Tokens: \[(.*)\]\.", text):
        text = f"{unused[1]}: nothing more is expected here"
    print(f"appliance: error: {text}", file=sys.stderr)


def _debug(argv: Sequence[str]) -> bool:
    """Whether errors shall show where they come from."""
    joined = " ".join(argv).replace("--log_level", "--log-level").replace("--log-level=", "--log-level ")
    return "--log-level debug" in joined or os.environ.get("APPLIANCE_LOG_LEVEL") == "debug"


def _with_model(engine: EngineConfig, model: str | None) -> EngineConfig:
    return engine if model is None else replace(engine, model=model)
