"""Python processes that need not begin at the beginning: forks of one that has imported others' libraries and nothing of ours.

    run("-c", script, str(folder), cwd=folder, input="{}")      # as subprocess.run([sys.executable, ...]), text captured

To import torch and transformers takes seconds, which many tests would spend for an oracle's half a second. The one that is forked
stays as long as this process does, has no thread, and is in a folder of its own without this repository on its path.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import runpy
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

ORACLES = ("torch", "transformers.generation", "transformers.models.auto", "transformers.models.llama.modeling_llama")
COMPILER = ("torch", "triton", "triton.backends.nvidia.compiler", "pytest")
DOWNLOADS = ("asyncio", "anyio", "httpx2", "cyclopts", "yaml", "tqdm.auto", "filelock", "numpy")
INTERPRETER = ("TRITON_INTERPRET=1", "torch", "triton", "triton.runtime.interpreter")
OFFLINE = {"HF_HUB_OFFLINE": "1"}  # read when it is imported


def run(
    *args: str,
    cwd: Path,
    input: str = "",
    env: Mapping[str, str] | None = None,
    imported: tuple[str, ...] = ORACLES,
) -> subprocess.CompletedProcess[str]:
    """``args``: of Python, ``-c CODE ..``, ``-m MODULE ..`` or ``FILE ..``; ``env``: all of its variables (this process's, less
    the path and offline, if None); ``imported``: what it begins with, behind variables (NAME=VALUE) that are read meanwhile."""
    given = plain() | OFFLINE if env is None else dict(env)
    process = template(imported)
    assert process.stdin is not None and process.stdout is not None
    with tempfile.TemporaryDirectory() as folder:
        files = {name: str(Path(folder, name)) for name in ("stdin", "stdout", "stderr")}
        Path(files["stdin"]).write_text(input, encoding="utf-8")
        process.stdin.write(json.dumps({"args": args, "cwd": str(cwd), "env": given, **files}) + "\n")
        process.stdin.flush()
        if not (answer := process.stdout.readline()):
            template.cache_clear()
            raise RuntimeError(f"what is forked for {args} has ended with exit code {process.wait()}")
        out, errors = (Path(files[name]).read_text(encoding="utf-8", errors="replace") for name in ("stdout", "stderr"))
    return subprocess.CompletedProcess([sys.executable, *args], int(answer), out, errors)


def plain() -> dict[str, str]:
    """This process's variables, without a path on which our packages are."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


@cache
def template(imported: tuple[str, ...]) -> subprocess.Popen[str]:
    """Ends when this process does, or closes its input."""
    command = [sys.executable, str(Path(__file__).resolve()), *(name for name in imported if "=" not in name)]
    given = {name: value for name, value in plain().items() if name != "TRITON_INTERPRET"} | OFFLINE
    given |= dict(name.split("=", 1) for name in imported if "=" in name)
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=given, cwd=tempfile.gettempdir()
    )


def main() -> None:
    del sys.path[0]  # this folder, whose packages are called like ours
    for name in sys.argv[1:]:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # a collection in a fork would copy all of it
    answers = os.dup(1)
    for line in sys.stdin:
        child = os.fork()
        if not child:
            os.close(answers)
            become(json.loads(line))
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        os.write(answers, f"{code}\n".encode())
    os._exit(0)  # some of those libraries tell at an ordinary end what they have leaked


def become(asked: dict[str, Any]) -> NoReturn:
    """The process that was asked for, to its end."""
    code = 1
    try:
        for number, name in enumerate(("stdin", "stdout", "stderr")):
            mode = "w" if number else "r"
            with open(asked[name], mode) as file:
                os.dup2(file.fileno(), number)
            setattr(sys, name, os.fdopen(number, mode, encoding="utf-8"))
        os.environ.clear()
        os.environ.update(asked["env"])
        os.chdir(asked["cwd"])
        code = execute(asked["args"])
    except BaseException:
        traceback.print_exc()
    with suppress(Exception):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def execute(args: list[str]) -> int:
    """What ``python ARGS`` does; its exit code."""
    what, *rest = args
    first = str(Path(what).resolve().parent) if what not in ("-c", "-m") else os.getcwd() if what == "-m" else ""
    sys.path.insert(0, first)
    sys.path[1:1] = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    sys.modules.pop("sitecustomize", None)  # that of this path, which says perhaps where packages are
    with suppress(ImportError):
        importlib.import_module("sitecustomize")
    try:
        if what == "-c":
            sys.argv = ["-c", *rest[1:]]
            sys.modules["__main__"] = main = ModuleType("__main__")
            exec(compile(rest[0], "<string>", "exec"), main.__dict__)
        elif what == "-m":
            sys.argv = [what, *rest[1:]]
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        else:
            sys.argv = args
            runpy.run_path(what, run_name="__main__")
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    main()
