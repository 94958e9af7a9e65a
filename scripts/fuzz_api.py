"""schemathesis over the server's own OpenAPI document, against a running server of the demo model, with and without keys,
and of the same model for embeddings.

    .venv/bin/python scripts/fuzz_api.py [--examples 100] [--seconds 300] [--report docs/benchmarks/api-fuzz.md]

Looks for answers of 5xx, statuses, media types, headers and bodies that the document does not have, bodies that do not fit it and
are accepted, methods that are not refused, routes that a request without a key gets into. Exit code 1 where there is any.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil

ROOT = Path(__file__).resolve().parents[1]
READY = re.compile(r"appliance: ready at (http://127\.0\.0\.1:\d+)/v1")
KEY = "a-key-for-this-run-alone"
LEFT_OUT = "positive_data_acceptance"  # as tests/server/fuzz.py says
# Of each run: options of the server, and of schemathesis.
RUNS: dict[str, tuple[list[str], list[str]]] = {
    "without keys": ([], []),
    "with keys": (["--api-key", KEY], ["--header", f"Authorization: Bearer {KEY}"]),
    "a model for embeddings": (
        ["--runner", "pooling"],
        ["--include-path", "/v1/embeddings", "--phases", "examples,coverage,fuzzing"],
    ),
}


@contextmanager
def server(log: Path, *flags: str) -> Iterator[tuple[str, psutil.Process]]:
    """A server of the demo model: its address and process."""
    command = [sys.executable, "-m", "appliance", "serve", "--port", "0", "--log-level", "warning", *flags]
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, cwd=ROOT)
    try:
        for _ in range(600):
            if found := READY.search(log.read_text()):
                break
            assert process.poll() is None, log.read_text()
            time.sleep(0.1)
        assert found, log.read_text()
        yield found[1], psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait(30)


def fuzz(url: str, folder: Path, args: argparse.Namespace, *more: str) -> dict[str, Any]:
    """One run of schemathesis: its exit code, its last words, and how many answers of which status each route gave."""
    events = folder / "events.ndjson"
    command = [str(Path(sys.executable).parent / "schemathesis"), "run", f"{url}/openapi.json", "--continue-on-failure"]
    command += ["--max-examples", str(args.examples), "--seed", str(args.seed), "--exclude-checks", LEFT_OUT]
    command += ["--request-timeout", "60", "--report", "ndjson", "--report-ndjson-path", str(events), "--no-color", *more]
    env = {**os.environ, "SCHEMATHESIS_HOOKS": "tests.server.fuzz", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=args.seconds)
    return {"code": done.returncode, "text": done.stdout + done.stderr, "answers": answers(events)}


def answers(events: Path) -> Counter[tuple[str, int]]:
    """(route, status) -> how often; methods that a route does not have are one route."""
    found: Counter[tuple[str, int]] = Counter()
    for line in events.read_text().splitlines():
        recorder = json.loads(line).get("ScenarioFinished", {}).get("recorder", {})
        for name, one in recorder.get("interactions", {}).items():
            case = recorder["cases"][name]["value"]
            route = f"{case['method'].upper()} {case['path']}"
            status = (one.get("response") or {}).get("status_code", 0)
            found["a method that the path does not have" if status == 405 else route, status] += 1
    return found


def state(url: str, process: psutil.Process, headers: dict[str, str]) -> dict[str, Any]:
    """What must be as before when all is over: nothing runs, no block is held; and the memory of server and engine."""
    with httpx.Client(base_url=url, headers=headers, trust_env=False, timeout=30) as http:
        assert http.get("/health").status_code == 200
        engine = http.get("/stats").json()["engine"]
    memory = {one.pid: one.memory_info().rss for one in (process, *process.children())}
    return {"used": engine["blocks_used"], "running": engine["running"] + engine["waiting"], "rss": sum(memory.values())}


def table(runs: dict[str, dict[str, Any]]) -> list[str]:
    every: Counter[tuple[str, int]] = sum((run["answers"] for run in runs.values()), Counter())
    statuses = sorted({status for _, status in every})
    lines = ["| route | " + " | ".join(map(str, statuses)) + " |", "|---|" + "---:|" * len(statuses)]
    for route in sorted({route for route, _ in every}, key=lambda route: route.split()[::-1]):
        lines.append(f"| `{route}` | " + " | ".join(str(every[route, status] or "") for status in statuses) + " |")
    return lines


def report(runs: dict[str, dict[str, Any]], args: argparse.Namespace) -> str:
    git = ["git", "describe", "--always", "--dirty", "--abbrev=10"]
    commit = subprocess.run(git, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    about = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":")[1].strip() for line in about if "model name" in line), platform.machine())
    command = shlex.join(["scripts/fuzz_api.py", "--examples", str(args.examples), "--seed", str(args.seed)])
    lines = [f"- {time.strftime('%Y-%m-%d', time.gmtime())}, commit {commit}, Python {platform.python_version()}, {cpu}, "]
    lines[0] += f"{os.cpu_count()} processors; `{command}`"
    for name, run in runs.items():
        cases = sum(run["answers"].values())
        memory = " -> ".join(f"{run[when]['rss'] / 2**20:.0f}" for when in ("before", "after"))
        lines.append(
            f"- {name}: {cases} requests in {run['seconds']:.0f} s, {run['failures']} findings; server and engine together "
            f"{memory} MiB; afterwards {run['after']['running']} requests at work, {run['after']['used']} blocks held"
        )
    return "\n".join([*lines, "", *table(runs)])


def one_run(name: str, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    flags, more = RUNS[name]
    headers = {"Authorization": f"Bearer {KEY}"} if KEY in flags else {}
    with server(folder / "server.log", *flags) as (url, process):
        before, begun = state(url, process, headers), time.monotonic()
        found = fuzz(url, folder, args, *more)
        seconds = time.monotonic() - begun
        time.sleep(2)  # for the last requests to be given up
        found |= {"before": before, "after": state(url, process, headers), "seconds": seconds}
    found["failures"] = len(re.findall(r"^- ST\d+ ", found["text"], re.M))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=100, help="most bodies of each kind for each route")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=1800, help="most that one of the runs may take")
    parser.add_argument("--report", type=Path, help="a file, of which the part between two marks is written anew")
    args = parser.parse_args()
    runs = {}
    for name in RUNS:
        with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
            runs[name] = run = one_run(name, Path(folder), args)
            if run["code"]:
                print(run["text"])
    text = report(runs, args)
    print(text)
    if args.report:
        before = args.report.read_text() if args.report.exists() else ""
        head, _, rest = before.partition("<!-- measured -->\n")
        args.report.write_text(f"{head}<!-- measured -->\n{text}\n<!-- end -->{rest.partition('<!-- end -->')[2]}")
    good = all(run["code"] == 0 and run["after"]["used"] == run["after"]["running"] == 0 for run in runs.values())
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
