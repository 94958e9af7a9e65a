"""What the load generator of `appliance bench serve` can take: chunks a second on one core, from a server that does nothing else.

    .venv/bin/python scripts/bench_generator.py [--streams 64] [--tokens 400] [--pace MS] [--json FILE]

The server is a process of its own that answers every request at once with a stream of chunks, shaped as a real server's are.
Without --pace it writes as fast as it can, to each stream in turn: the generator is the slower one, and reads several chunks at a
time. With it, each stream gets a chunk every so many milliseconds, and the generator wakes up for each.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import sys
from multiprocessing.connection import Connection
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from appliance.bench.http import Target  # noqa: E402
from appliance.bench.load import Asker, run  # noqa: E402
from appliance.bench.results import summary  # noqa: E402
from appliance.bench.samples import Sample  # noqa: E402
from appliance.config import BenchConfig  # noqa: E402

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def framed(event: object) -> bytes:
    data = b"data: " + json.dumps(event).encode() + b"\n\n"
    return b"%x\r\n%b\r\n" % (len(data), data)


def serve(port: Connection, tokens: int, pace: float) -> None:
    """Give every request ``tokens`` chunks, then its usage."""
    base = {"id": "cmpl-0123456789abcdef", "object": "text_completion", "created": 1, "model": "m", "system_fingerprint": "none"}
    choice = {"index": 0, "text": " word", "logprobs": None, "finish_reason": None, "stop_reason": None}
    chunk = framed({**base, "choices": [choice], "usage": None})
    last = framed({**base, "choices": [{**choice, "finish_reason": "length"}], "usage": None})
    usage = framed({**base, "choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": tokens}})

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while head := await reader.readuntil(b"\r\n\r\n"):
            await reader.readexactly(int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0]))
            writer.write(HEAD)
            for _ in range(tokens - 1):
                writer.write(chunk)
                await writer.drain()
                await asyncio.sleep(pace)
            writer.write(last + usage + framed_done + b"0\r\n\r\n")

    framed_done = b"e\r\ndata: [DONE]\n\n\r\n"

    async def main() -> None:
        server = await asyncio.start_server(talk, "127.0.0.1", 0)
        port.send(server.sockets[0].getsockname()[1])
        await asyncio.sleep(3600)

    asyncio.run(main())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=400)
    parser.add_argument("--pace", type=float, default=0.0, help="milliseconds between two chunks of a stream")
    parser.add_argument("--json", metavar="FILE", type=Path)
    args = parser.parse_args()
    ours, theirs = multiprocessing.Pipe()
    server = multiprocessing.get_context("spawn").Process(target=serve, args=(theirs, args.tokens, args.pace / 1e3), daemon=True)
    server.start()
    asker = Asker(Target(f"http://127.0.0.1:{ours.recv()}", {}), BenchConfig(max_concurrency=args.streams), "m")
    count = 4 * args.streams

    async def load() -> dict[str, float]:
        found = await run(asker, [Sample("x", args.tokens)] * count, [0.0] * count, asyncio.Event(), lambda: None)
        figures = summary(found, asker.config)
        assert figures["completed"] == count, figures["errors_by_kind"]
        chunks = count * args.tokens
        return {"chunks": chunks, "chunks_per_s": chunks / found.seconds, "cpu_us_per_chunk": 1e6 * found.cpu_s / chunks,
                "requests": count, "requests_per_s": count / found.seconds}  # fmt: skip

    result = asyncio.run(load())
    server.terminate()
    most = 1e6 / result["cpu_us_per_chunk"]
    print(f"{count} streams of {args.tokens} chunks, {args.streams} at a time: {result['chunks_per_s']:,.0f} chunks a second,")
    print(f"{result['cpu_us_per_chunk']:.1f} µs of processor time each: at most {most:,.0f} a second on one core,")
    print(f"{most / 50:,.0f} streams of 50 tokens a second")
    if args.json:
        args.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
