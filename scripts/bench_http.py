"""What HTTP costs: CPU time and delay between the engine's tokens and the bytes on its clients' sockets.

    .venv/bin/python scripts/bench_http.py [--cases completions,chat+logprobs] [--streams 1,64] [--pace MS] [--json FILE]

The real server application on real sockets over the real worker process, in which a scripted engine gives one token to every
stream at a steady pace, all streams in the same step. Clients are plain sockets in one other process, which only notes when bytes
come. CPU time is the API process's own (schedstat, nanoseconds), between 15 % and 85 % of the run. The delay of a token counts
from the engine's moment, before its events are pickled, to the client's recv; "last" is a step's last token on the last socket.

What the engine's own steps have of it: scripts/bench_steps.py, which starts this server over the demo model.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import cProfile
import json
import os
import platform
import selectors
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

LOOK = {"name": "look", "parameters": {"type": "object", "properties": {"at": {"type": "string"}}}}
TOOLS = [{"type": "function", "function": LOOK}]
USAGE = {"include_usage": True, "continuous_usage_stats": True}
MESSAGES = [{"role": "user", "content": "Say something."}]
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "completions": ("/v1/completions", {"prompt": "Once upon a time"}),
    "chat": ("/v1/chat/completions", {"messages": MESSAGES}),
    "completions, logprobs": ("/v1/completions", {"prompt": "Once upon a time", "logprobs": 5}),
    "chat, logprobs": ("/v1/chat/completions", {"messages": MESSAGES, "logprobs": True, "top_logprobs": 5}),
    "chat, tools": ("/v1/chat/completions", {"messages": MESSAGES, "tools": TOOLS}),
    "chat, usage": ("/v1/chat/completions", {"messages": MESSAGES, "stream_options": USAGE}),
}  # fmt: skip
COLUMNS = {
    "case": "{case}",
    "streams": "{streams}",
    "API: µs a token": "{api_cpu_us_per_token:.1f}",
    "ms a step": "{api_cpu_ms_per_step:.2f}",
    "delay, ms: median": "{delay_ms_median:.2f}",
    "p99": "{delay_ms_p99:.2f}",
    "last of a step: median": "{last_ms_median:.2f}",
    "p99 ": "{last_ms_p99:.2f}",
    "engine: ms a step": "{engine_cpu_ms_per_step:.2f}",
}


def cpu_ns(pid: int) -> int:
    """CPU time of all threads of a process that live."""
    total = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        total += int((task / "schedstat").read_text().split()[0])
    return total


class Stream:
    """One client: sends a request, and keeps what comes with its time."""

    def __init__(self, port: int, path: str, body: dict[str, Any], name: str, *, reads: bool = True) -> None:
        self.name, self.reads = name, reads
        self.got: list[tuple[float, bytes]] = []
        self.done = False
        self.sock = socket.create_connection(("127.0.0.1", port))
        if not reads:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        raw = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nX-Request-Id: {name}\r\nContent-Length: {len(raw)}\r\n\r\n"
        self.sock.sendall(head.encode() + raw)

    def take(self, now: float) -> None:
        data = self.sock.recv(1 << 16)
        self.got.append((now, data))
        self.done = not data or data.endswith(b"0\r\n\r\n")

    def tokens(self, width: int) -> list[float]:
        """When each token came: ``width`` characters of text are one."""
        raw = b"".join(data for _, data in self.got)
        assert raw.startswith(b"HTTP/1.1 200"), raw[:400]
        times, at = [], 0
        arrivals = iter(self.got)
        end, when = 0, 0.0
        while (begin := raw.find(b"data: {", at)) >= 0:
            at = raw.index(b"\n\n", begin)
            while end < at:
                when, data = next(arrivals)
                end += len(data)
            choices = json.loads(raw[begin + 6 : at])["choices"]
            text = "".join(c.get("text") or c.get("delta", {}).get("content") or "" for c in choices)
            times += [when] * (len(text) // width)
        return times


def drive(streams: list[Stream], moments: list[float], pid: int, engine: int) -> list[tuple[float, int, int]]:
    """Read until all have ended. At ``moments`` (seconds after the first token) notes time and CPU time of both processes."""
    selector, notes, begun = selectors.DefaultSelector(), [], 0.0
    for stream in streams:
        if stream.reads:
            selector.register(stream.sock, selectors.EVENT_READ, stream)
    left = sum(s.reads for s in streams)
    while left:
        for key, _ in selector.select(0.2):
            now = time.monotonic()
            begun = begun or now
            key.data.take(now)
            if key.data.done:
                selector.unregister(key.fileobj)
                left -= 1
        if begun and len(notes) < len(moments) and time.monotonic() >= begun + moments[len(notes)]:
            notes.append((time.monotonic(), cpu_ns(pid), cpu_ns(engine)))
    return notes


class Server:
    """This script again, as the server. ``setup`` goes to the worker."""

    def __init__(self, **setup: Any) -> None:
        self.log = tempfile.NamedTemporaryFile(suffix=".json")  # noqa: SIM115
        env = {**os.environ, "BENCH_HTTP": json.dumps({**setup, "log": self.log.name})}
        command = [sys.executable, __file__, "--serve"]
        self.process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.port, self.worker = map(int, self.process.stdout.readline().split())

    def stop(self) -> dict[str, Any]:
        """What the worker has noted."""
        while not self.port and not Path(self.log.name).stat().st_size:  # without an API: until it is done
            time.sleep(0.1)
        time.sleep(0.1)
        self.process.terminate()
        self.process.wait(20)
        return json.loads(Path(self.log.name).read_text())


def measure(case: str, streams: int, *, pace: float, tokens: int, **setup: Any) -> dict[str, Any]:
    """One case's figures. Where this process was kept from reading for most of the run, it says nothing: it is done again."""
    path, body = CASES[case]
    body = {**body, "stream": True, "max_tokens": tokens, "ignore_eos": True, "temperature": 0}
    for _ in range(5):
        server = Server(pace=pace, streams=streams, logprobs=5 if "logprobs" in case else 0, **setup)
        clients = [Stream(server.port, path, body, f"s{i}") for i in range(streams)]
        notes = drive(clients, [0.15 * tokens * pace, 0.85 * tokens * pace], server.process.pid, server.worker)
        found = server.stop()
        steps = sum(notes[0][0] <= t < notes[-1][0] for t in found["steps"]) if notes else 0
        if len(notes) == 2 and steps:
            return figures(case, clients, notes, steps, found) | {"pace_ms": 1e3 * pace}
    raise SystemExit(f"{case}: others took the processors while the tokens came, five times; more --tokens would help")


def figures(
    case: str, clients: list[Stream], notes: list[tuple[float, int, int]], steps: int, found: dict[str, Any]
) -> dict[str, Any]:
    """What ``steps`` steps between two notes cost, and how long each token took from the engine to its client."""
    (begin, end), streams, tokens = notes, len(clients), len(found["steps"])
    delays: list[float] = []
    lasts: list[float] = [0.0] * tokens
    for client in clients:
        came = client.tokens(found["width"])
        assert len(came) == tokens, (len(came), tokens)
        for k, (arrived, left) in enumerate(zip(came, found["steps"], strict=True)):
            delays.append(arrived - left)
            lasts[k] = max(lasts[k], arrived - left)
    inner = sorted(delays)
    return {
        "case": case, "streams": streams, "tokens": tokens,
        "api_cpu_us_per_token": (end[1] - begin[1]) / steps / streams / 1e3,
        "api_cpu_ms_per_step": (end[1] - begin[1]) / steps / 1e6,
        "engine_cpu_ms_per_step": (end[2] - begin[2]) / steps / 1e6,
        "delay_ms_median": 1e3 * statistics.median(inner), "delay_ms_p99": 1e3 * inner[int(0.99 * len(inner))],
        "last_ms_median": 1e3 * statistics.median(lasts), "last_ms_p99": 1e3 * sorted(lasts)[int(0.99 * tokens)],
    }  # fmt: skip


def serve() -> None:
    """The server process."""
    import signal

    import uvicorn

    from appliance.config import EngineConfig, ServerConfig
    from appliance.hub import demo_model
    from appliance.runtime.client import Client
    from appliance.runtime.pace import Pace
    from appliance.server.app import create_app
    from appliance.server.http import http_config
    from appliance.server.run import bind
    from appliance.text.tokenizer import Tokenizer

    setup = json.loads(os.environ["BENCH_HTTP"])
    if setup.get("alone"):
        return alone(setup)
    Client.COMMAND = (sys.executable, __file__, "--worker")
    model = setup.get("model") or str(demo_model())
    tokenizer = setup.get("tokenizer") or model
    engine = EngineConfig(model=model, tokenizer=tokenizer, threads=setup.get("threads"), max_num_seqs=64)

    async def main() -> None:
        client = Client(engine)
        await client.start()
        if setup.get("aside"):
            client.give_way()
        if setup.get("at_once"):
            client._pace = Pace()  # that never waits
        config = ServerConfig(max_num_queued_reqs=-1, tool_call_parser="hermes")
        app = create_app(client, Tokenizer.load(tokenizer), engine, config)
        settings = http_config(app, config)
        http, stop = uvicorn.Server(settings), asyncio.Event()
        http.capture_signals = contextlib.nullcontext  # type: ignore[method-assign, assignment]
        http.main_loop = stop.wait  # type: ignore[method-assign, assignment]  # as in the service: nothing ten times a second
        sock = bind("127.0.0.1", 0)
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
        print(sock.getsockname()[1], client._process.pid, flush=True)  # type: ignore[union-attr]
        await http.serve(sockets=[sock])
        await client.stop(0)

    make_loop = None
    if setup["loop"] == "uvloop":
        import uvloop  # type: ignore[import-not-found, unused-ignore]

        make_loop = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=make_loop) as runner:
        if setup["profile"]:
            profile = cProfile.Profile(time.thread_time)  # the processor's time, not the clock's: others run too
            profile.runcall(runner.run, main())
            profile.dump_stats(setup["profile"])
        else:
            runner.run(main())


def alone(setup: dict[str, Any]) -> None:
    """The engine in a process without any API."""
    import signal

    from bench_http_engine import note_steps, run_alone

    notes = note_steps(setup["streams"])
    print(0, os.getpid(), flush=True)
    run_alone(setup["threads"], setup["alone"], setup["tokens"], setup.get("model"))
    Path(setup["log"]).write_text(json.dumps(notes))
    signal.sigwait({signal.SIGTERM})


def worker(fd: int) -> None:
    """The engine's process, with a scripted engine or one that notes how long its steps take."""
    import signal
    from multiprocessing.connection import Connection
    from types import ModuleType

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    setup = json.loads(os.environ["BENCH_HTTP"])
    from appliance.runtime import worker as real

    if not setup.get("first", True):
        real.come_first = lambda: None
    if setup.get("pace") is not None:
        from bench_http_engine import Scripted

        stand_in = ModuleType("appliance.runtime.engine")
        stand_in.Engine = Scripted  # type: ignore[attr-defined]
        sys.modules["appliance.runtime.engine"] = stand_in
        notes = Scripted.notes
    else:
        from bench_http_engine import note_steps

        notes = note_steps(setup["streams"])
    real.serve(Connection(fd))
    Path(setup["log"]).write_text(json.dumps(notes))
    os._exit(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", type=Path)
    parser.add_argument("--cases", default=",".join(c.replace(", ", "+") for c in CASES), help="separated by commas; + for ', '")
    parser.add_argument("--streams", default="1,64")
    parser.add_argument("--pace", type=float, default=25.0, help="milliseconds between two steps")
    parser.add_argument("--tokens", type=int, default=300)
    parser.add_argument("--loop", choices=("asyncio", "uvloop"), default="asyncio", help="of the API process")
    parser.add_argument("--profile", metavar="FILE", help="profile the API process with cProfile, and write its figures there")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--worker", metavar="FD", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker is not None:
        return worker(args.worker)
    if args.serve:
        return serve()
    print("| " + " | ".join(COLUMNS) + " |\n" + "|---" * len(COLUMNS) + "|")
    rows = []
    for case in (c.replace("+", ", ") for c in args.cases.split(",")):
        for streams in map(int, args.streams.split(",")):
            row = measure(case, streams, pace=args.pace / 1e3, tokens=args.tokens, loop=args.loop, profile=args.profile)
            rows.append(row)
            print("| " + " | ".join(form.format(**row) for form in COLUMNS.values()) + " |", flush=True)
    if args.json:
        args.json.write_text(json.dumps({"python": platform.python_version(), "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
