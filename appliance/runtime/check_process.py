"""``plan --check`` in a process that has what a server's engine has and nothing else: a command's own libraries are no engine's.

The process is started with ``python -m appliance.runtime.check_process``. It reads its task from stdin, and writes the report,
or the error, to stdout; both are pickled.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

from appliance.config import EngineConfig
from appliance.memory.report import CheckReport
from quant.errors import InputError


def check_apart(directory: Path, config: EngineConfig) -> CheckReport:
    """``check``, there. Raises what it raises, as RuntimeError where it is of a library; also where the process was ended."""
    task = pickle.dumps((directory, config))
    done = subprocess.run(
        [sys.executable, "-m", "appliance.runtime.check_process"], input=task, stdout=subprocess.PIPE, check=False
    )
    if done.returncode:
        raise RuntimeError(f"the process that checks the plan ended with code {done.returncode} before it had an answer")
    found = pickle.loads(done.stdout)  # our own process's
    if isinstance(found, CheckReport):
        return found
    raise found


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # ctrl-C reaches both, and the command tells it
    answer = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print is no part of it
    directory, config = pickle.load(sys.stdin.buffer)
    from appliance.runtime.check import check  # imports torch

    found: CheckReport | Exception
    try:
        found = check(directory, config)
    except (InputError, MemoryError, OSError) as error:
        found = error
    except RuntimeError as error:
        found = RuntimeError(str(error))
    with answer:
        pickle.dump(found, answer)


if __name__ == "__main__":
    main()
