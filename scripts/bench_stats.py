"""What a dashboard costs the server: CPU time of one GET /stats with 64 requests and 2048 blocks, without HTTP around it.

python scripts/bench_stats.py [LOOKS]
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pydantic_core import to_json

from appliance.config import EngineConfig, ServerConfig
from appliance.core.blocks import BlockPool
from appliance.core.messages import RequestStat, Stats
from appliance.core.params import SamplingParams
from appliance.server.job import Job
from appliance.server.prompts import Prompt
from appliance.server.schemas import CompletionRequest
from appliance.server.state import ServerState
from appliance.server.stats import stats_body
from appliance.text.tokenizer import Tokenizer
from tests.server.fake import FakeClient
from tests.tiny_model import write_tokenizer

REQUESTS, BLOCKS = 64, 2048


class Busy(FakeClient):
    """The snapshot that an engine with 64 requests sends."""

    snapshot = Stats()

    async def stats(self) -> Stats:
        return self.snapshot


async def measure(looks: int) -> None:
    with tempfile.TemporaryDirectory() as directory:
        write_tokenizer(Path(directory))
        config = EngineConfig(model=directory)
        state = ServerState(Busy(), Tokenizer.load(directory), config, ServerConfig(served_model_name=("tiny",)))
    body = CompletionRequest(prompt="abc")
    prompt = Prompt(text="abc", token_ids=(1, 68, 69, 70))
    jobs = [Job(state, f"{k:032x}", "cmpl", [prompt], SamplingParams(max_tokens=9), body) for k in range(REQUESTS)]
    state.jobs.update(jobs)
    pool = BlockPool(BLOCKS, 16)
    held = pool.allocate(BLOCKS // 2) or []
    pool.share(held[: BLOCKS // 4])
    rows = tuple(RequestStat(job.submits[0].request_id, 0, "running", 4, 5, 8, 1, 2.5, 0) for job in jobs)
    client = state.client
    assert isinstance(client, Busy)
    client.snapshot = replace(await FakeClient().stats(), block_map=pool.map(BLOCKS), requests_now=rows)
    for k in range(2000):
        state.metrics.ttft.add(k / 1000)
        state.metrics.itl.add(k / 10000)
    await state.hardware.latest()
    begun, data = time.process_time(), b""
    for _ in range(looks):
        data = to_json(await stats_body(state))
    spent = 1e3 * (time.process_time() - begun) / looks
    begun = time.process_time()
    for _ in range(looks):
        pool.map(BLOCKS)
    mapped = 1e3 * (time.process_time() - begun) / looks
    print(f"/stats with {REQUESTS} requests: {spent:.3f} ms of CPU time, {len(data):,} bytes")
    print(f"the map of {BLOCKS} blocks in the engine, at most five times a second: {mapped:.3f} ms")


if __name__ == "__main__":
    asyncio.run(measure(int(sys.argv[1]) if len(sys.argv) > 1 else 2000))
