"""Half an hour of everything at once through HTTP: answers must be right, and memory, files and blocks where they were.

    scripts/run python scripts/soak_http.py --minutes 30 --json docs/benchmarks/soak-http.json

A server is started as users start one (keys, limits, audit log), with so little cache that requests have to give way. What
greedy requests are answered is learned while it is quiet. Float32: sums that are rounded otherwise in larger batches then
change no token.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from soak_traffic import Users

ROOT = Path(__file__).resolve().parent.parent
MIB = 1024**2
ALLOWED = 32 * MIB  # between the second quarter of the time and the last, of each process: what allocators move to and fro
FLAGS = "--port 0 --dtype float32 --kv-cache-memory-bytes 5000000 --swap-space 0.005 --max-num-seqs 48 --tool-call-parser hermes"


@contextmanager
def server(folder: Path) -> Iterator[tuple[str, psutil.Process, dict[str, str]]]:
    """A server of the demo model, its address, its process and its keys."""
    keys, lines = {}, []
    for name, more in (("free", []), ("limited", ["--requests-per-minute", "30", "--tokens-per-minute", "2000"])):
        made = subprocess.run([sys.executable, "-m", "appliance", "key", name, *more], capture_output=True, text=True, check=True)
        keys[name] = next(word for word in made.stderr.split() if word.startswith("sk-"))
        lines.append(made.stdout)
    (folder / "keys.toml").write_text("".join(lines))
    more = ["--api-key-file", str(folder / "keys.toml"), "--audit-log", str(folder / "audit.jsonl")]
    command = [sys.executable, "-m", "appliance", "serve", *FLAGS.split(), *more]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, cwd=ROOT)
    assert process.stdout is not None
    try:
        url = next(match[1] for line in process.stdout if (match := re.search(r"ready at (http://\S+)/v1", line)))
        threading.Thread(target=process.stdout.read, daemon=True).start()
        yield url, psutil.Process(process.pid), keys
    finally:
        process.terminate()
        process.wait(60)


def measure(api: psutil.Process) -> dict[str, Any]:
    """Bytes of each process of the server, and open files of its first."""
    found = {"files": api.num_fds(), "threads": api.num_threads(), "api": api.memory_info().rss}
    for child in api.children():
        words = " ".join(child.cmdline())
        found["grammars" if "compiler" in words else "engine"] = child.memory_info().rss
    return found


async def busy(users: Users, api: psutil.Process, seconds: float, at_once: int) -> list[dict[str, Any]]:
    """Keep so many users at work; what was measured meanwhile."""
    samples: list[dict[str, Any]] = []
    begun = time.monotonic()

    async def worker() -> None:
        while time.monotonic() - begun < seconds:
            await users.one()
            await asyncio.sleep(users.rng.expovariate(4))

    workers = [asyncio.create_task(worker()) for _ in range(at_once)]
    while time.monotonic() - begun < seconds:
        await asyncio.sleep(min(5, seconds / 40))
        stats = (await users.http.get("/stats")).json()["engine"]
        blocks = {name: stats[name] for name in ("running", "waiting", "blocks_used", "blocks_kept", "preemptions", "steps")}
        samples.append({"s": round(time.monotonic() - begun, 1), **measure(api), **blocks})
        if len(samples) % 24 == 0:
            mib = {name: samples[-1][name] // MIB for name in ("api", "engine")}
            print(f"{samples[-1]['s']:.0f} s, {mib} MiB, {sum(users.counts.values())} done, {len(users.wrong)} wrong", flush=True)
    await asyncio.gather(*workers)
    return samples


async def idle(users: Users, seconds: float = 60) -> dict[str, Any]:
    """What is left when all have gone."""
    deadline = time.monotonic() + seconds
    while True:
        engine = (await users.http.get("/stats")).json()["engine"]
        left = {name: engine[name] for name in ("running", "waiting", "swapped", "blocks_used")}
        if not any(left.values()) or time.monotonic() > deadline:
            return {**left, "blocks_kept": engine["blocks_kept"], "preemptions": engine["preemptions"], "steps": engine["steps"]}
        await asyncio.sleep(0.1)


def slope(samples: list[dict[str, Any]], name: str, seconds: float) -> float:
    """MiB an hour in the second half: the least squares through what was measured."""
    late = [sample for sample in samples if sample["s"] >= seconds / 2 and name in sample]
    if len(late) < 3:
        return 0.0
    return statistics.linear_regression([s["s"] / 3600 for s in late], [s[name] / MIB for s in late]).slope


def growth(samples: list[dict[str, Any]], name: str, seconds: float) -> float:
    second = [s[name] for s in samples if 0.25 <= s["s"] / seconds < 0.5 and name in s]
    last = [s[name] for s in samples if s["s"] / seconds >= 0.75 and name in s]
    return statistics.median(last) - statistics.median(second) if second and last else 0.0


async def soak(url: str, api: psutil.Process, keys: dict[str, str], args: argparse.Namespace) -> dict[str, Any]:
    users, seconds = Users(url, keys, args.seed), 60 * args.minutes
    await users.learn()
    fresh = measure(api)
    samples = await busy(users, api, seconds, args.users)
    left = await idle(users)
    await users.http.aclose()
    await users.limited.aclose()
    await asyncio.sleep(1)
    after = measure(api)
    wrong = list(users.wrong)
    wrong += [f"{name}: {count} left" for name, count in left.items() if name in ("running", "waiting", "blocks_used") and count]
    for name in ("api", "engine"):
        if (more := growth(samples, name, seconds)) > ALLOWED:
            wrong.append(f"{name}: memory grew by {more / MIB:.0f} MiB after warming up; allowed are {ALLOWED // MIB}")
    if after["files"] > fresh["files"] + 8:
        wrong.append(f"{after['files']} open files at the end, {fresh['files']} at the beginning")
    return {
        "minutes": args.minutes,
        "users": args.users,
        "wrong": wrong,
        "done": dict(sorted(users.counts.items())),
        "requests": sum(users.counts.values()),
        "fresh": fresh,
        "after": after,
        "left": left,
        "growth_mib": {name: round(growth(samples, name, seconds) / MIB, 1) for name in ("api", "engine")},
        "slope_mib_per_hour": {name: round(slope(samples, name, seconds), 1) for name in ("api", "engine")},
        "samples": samples,
    }


def written(report: dict[str, Any]) -> str:
    """As JSON, a sample a line."""
    from bench import heading, without_folders

    words = ["scripts/soak_http.py", *(without_folders(word) for word in sys.argv[1:])]
    rest = {name: value for name, value in report.items() if name != "samples"}
    text = json.dumps({**heading("demo"), "command": " ".join(words), "server": FLAGS, **rest}, indent=1)
    return text[: -len("\n}")] + ',\n "samples": [\n  ' + ",\n  ".join(map(json.dumps, report["samples"])) + "\n ]\n}\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--users", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        with server(Path(folder)) as (url, api, keys):
            report = asyncio.run(soak(url, api, keys, args))
        report["audit_lines"] = sum(1 for _ in (Path(folder) / "audit.jsonl").open())
        report["log_errors"] = [line[:300] for line in (Path(folder) / "log").open() if " ERROR " in line][:20]
    if args.json:
        args.json.write_text(written(report))
    print(json.dumps({name: value for name, value in report.items() if name != "samples"}, indent=1))
    return 1 if report["wrong"] else 0


if __name__ == "__main__":
    os.chdir(ROOT)
    sys.exit(main())
