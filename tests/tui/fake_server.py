"""A stand-in for a server: plays a busy engine and its machine, the same way each time."""

from __future__ import annotations

import json
import random
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from appliance.core.blocks import BlockPool
from appliance.core.messages import EngineInfo, RequestStat, Stats

GIB = 1024**3
SWAPPED = "chatcmpl-0123456789abcdef-1"


def info(*, num_blocks: int = 1536, block_size: int = 16) -> EngineInfo:
    plan = {  # as MemoryPlan.to_dict(): test_memory checks that the names agree
        "device": {"kind": "cpu"},
        "budget_bytes": 3 * GIB,
        "weights_bytes": {"embedding": 525336576, "attention": 90177536, "mlp": 422576128, "total": 1038090240},
        "workspace_bytes": {"logits": 134217728, "total": 134217728},
        "runtime_bytes": 314572800,
        "kv_cache": {"block_bytes": 524288, "num_blocks": num_blocks, "bytes": num_blocks * 524288},
        "swap": {"num_blocks": 512, "bytes": 512 * 524288},
    }
    return EngineInfo(
        model="Llama-3.2-1B-Instruct-AWQ",
        directory="models/Llama-3.2-1B-Instruct-AWQ",
        architecture="LlamaForCausalLM",
        quantization="awq 4-bit, group 128",
        dtype="bfloat16",
        device="cpu",
        max_model_len=8192,
        vocab_size=128256,
        eos_token_ids=(128009,),
        ready_s=3.2,
        plan=plan,
    )


BEGUN = 1_800_000_000  # the clock on the wall when a stand-in starts


class FakeServer:
    """Each call of ``stats`` is a second later. ``away`` makes the next calls fail as a closed port does."""

    def __init__(
        self, *, num_blocks: int = 1536, arrivals: float = 0.8, seed: int = 0, url: str = "http://127.0.0.1:8000", gpus: int = 0
    ) -> None:
        self.url, self.gpus = url, gpus
        self.model: str | None = None
        self.random = random.Random(seed)
        self.keys: tuple[str | None, ...] = ("alice", "bob", "batch-jobs")
        self.ttft, self.cancelled = [], []
        self.frozen, self.asked = False, 0  # time goes by, and nothing happens; how often it was asked
        self.lines: list[dict[str, Any]] = []
        self.prefix: list[int] = []  # blocks that all requests share
        self.pool = BlockPool(num_blocks, 16)
        self.info = info(num_blocks=num_blocks)
        self.arrivals = arrivals
        self.state = "ok"
        self.loading: list[int] | None = None
        self.away: Exception | None = None
        self.clock, self.prompt_tokens, self.generation_tokens, self.arrived = 0.0, 0, 0, 0
        self.running: list[dict[str, Any]] = []
        self.finished = {"stop": 0, "length": 0}

    def stats(self) -> dict[str, Any]:
        self.asked += 1
        if self.away:
            raise self.away
        if not self.frozen:
            self.tick()
        answer: dict[str, Any] = json.loads(json.dumps(self.body()))
        return answer

    def log(self, after: int) -> dict[str, Any]:
        if self.away:
            raise self.away
        return {"lines": [line for line in self.lines if line["seq"] > after], "next": len(self.lines)}

    def cancel(self, request_id: str) -> str:
        """Those of bob are another's."""
        request = next((r for r in self.running if f"chatcmpl-{r['id']}" == request_id), None)
        if request is None or request["key"] == "bob":
            return f"no running request has the id {request_id!r}"
        self.cancelled.append(request_id)
        self.running.remove(request)
        self.pool.release(request["blocks"])
        return f"{request_id} is cancelled"

    def say(self, level: str, logger: str, message: str) -> None:
        time = datetime.fromtimestamp(BEGUN + self.clock, UTC).isoformat(timespec="milliseconds")
        self.lines.append({"seq": len(self.lines) + 1, "time": time, "level": level, "logger": logger, "message": message})

    def tick(self) -> None:
        self.clock += 1.0
        if self.random.random() < self.arrivals - int(self.arrivals):
            self.arrive()
        for _ in range(int(self.arrivals)):
            self.arrive()
        budget = self.random.randint(900, 1200)
        for request in list(self.running):
            self.advance(request, budget)
            budget = max(budget - 100, 0)

    def arrive(self) -> None:
        self.arrived += 1
        prompt = int(self.random.lognormvariate(5.6, 0.9)) + 8
        answer = int(self.random.lognormvariate(5.0, 0.7)) + 4
        expect = (prompt + answer) // 16 + 1
        name = f"{self.random.getrandbits(64):016x}"
        blocks = self._shared() + (self.pool.allocate(1, expect=expect) or [])
        cached = 16 * (len(blocks) - 1)
        request = {"id": name, "prompt": prompt + cached, "answer": answer, "computed": cached, "out": 0, "blocks": blocks}
        request |= {"born": self.clock, "cached": cached, "ttft": None, "key": self.keys[self.arrived % len(self.keys)]}
        self.running.append(request)
        self.say("info", "appliance.requests", f"POST /v1/chat/completions chatcmpl-{name} begins: {prompt + cached} tokens")

    def _shared(self) -> list[int]:
        """A prompt that two of three requests begin with."""
        if self.pool.num_blocks < 500 or self.arrived % 3 == 0:
            return []
        if not self.prefix:
            self.prefix = self.pool.allocate(24) or []
        self.pool.share(self.prefix)
        return list(self.prefix)

    def advance(self, request: dict[str, Any], budget: int) -> None:
        if request["computed"] < request["prompt"]:
            n = min(budget, request["prompt"] - request["computed"])
            self.prompt_tokens += n
        else:
            if request["ttft"] is None:
                request["ttft"] = round(0.08 + request["prompt"] / 4000 + self.random.random() / 20, 3)
                self.ttft.append(request["ttft"])
            n = min(self.random.randint(14, 22), request["answer"] - request["out"])
            request["out"] += n
            self.generation_tokens += n
        request["computed"] += n
        need = request["computed"] // 16 + 1 - len(request["blocks"])
        if need > 0:
            request["blocks"] += self.pool.allocate(need, after=request["blocks"][-1] if request["blocks"] else None) or []
        if request["out"] >= request["answer"]:
            self.running.remove(request)
            for block in request["blocks"][:-1]:  # the last one is not full
                self.pool.register(block, self.random.randbytes(8))
            self.pool.release(request["blocks"])
            reason = "length" if request["answer"] % 7 == 0 else "stop"
            self.finished[reason] += 1
            name = f"chatcmpl-{request['id']}"
            self.say("info", "appliance.requests", f"POST /v1/chat/completions 200 {name}: {request['out']} tokens, {reason}")
            if self.arrived % 4 == 0:
                self.say("warning", "appliance.engine", "a request gave way: its blocks went to host memory")

    @property
    def swapped(self) -> int:
        return int(len(self.running) > 3)

    def engine(self) -> Stats:
        started = [r for r in self.running if r["computed"]]
        requests = [
            RequestStat(
                request_id=f"chatcmpl-{r['id']}-1",
                index=0,
                state="running" if r["computed"] else "waiting",
                prompt_tokens=r["prompt"],
                output_tokens=r["out"],
                computed_tokens=r["computed"],
                blocks=len(r["blocks"]),
                age_s=self.clock - r["born"] + 0.3,
                preemptions=int(r["prompt"] % 31 == 0),
                cached_tokens=r["cached"],
            )
            for r in self.running
        ]
        if self.swapped:
            requests.insert(len(requests) // 2, RequestStat(SWAPPED, 1, "swapped", 700, 90, 789, 0, 9.0, 1, 0, 50))
        return Stats(
            time=1e9 + self.clock,
            steps=int(self.clock * 18),
            running=len(started),
            waiting=len(self.running) - len(started) + self.swapped,
            blocks_total=self.pool.num_blocks,
            blocks_used=self.pool.used,
            blocks_shared=self.pool.shared,
            blocks_kept=self.pool.kept,
            swapped=self.swapped,
            swap_total=512,
            swap_used=60 * self.swapped,
            swap_kept=130,
            prefix_queries=self.prompt_tokens,
            prefix_hits=self.prompt_tokens * 2 // 5,
            prefix_host_hits=self.prompt_tokens // 20,
            block_size=16,
            block_map=self.pool.map(2048),
            prompt_tokens=self.prompt_tokens,
            generation_tokens=self.generation_tokens,
            requests=self.arrived,
            finished=dict(self.finished),
            preemptions=2,
            last_step_s=0.054,
            last_step_tokens=len(started),
            rss_bytes=int(2.1 * GIB),
            requests_now=tuple(requests),
        )

    def body(self) -> dict[str, Any]:
        ready = self.state != "loading"
        engine = asdict(self.engine() if ready else Stats())
        known = {f"chatcmpl-{r['id']}-1": r for r in self.running}
        engine["requests_now"] = [row | self._of(known.get(row["request_id"])) for row in engine["requests_now"]]
        return {
            "version": "0.1.0",
            "model": "Llama-3.2-1B-Instruct-AWQ",
            "state": self.state,
            "uptime_s": 3725 + self.clock,
            "info": asdict(self.info) if ready else None,
            "engine": engine,
            "latency": {"ttft": latency(self.ttft), "itl": latency([0.05 + t / 50 for t in self.ttft])},
            "hardware": self.hardware(),
            "loading": self.loading,
        }

    def _of(self, request: dict[str, Any] | None) -> dict[str, Any]:
        """What the server knows of a request, beside the engine."""
        request = request or {"id": "0123456789abcdef", "key": self.keys[-1], "ttft": 0.21}
        known = {"id": f"chatcmpl-{request['id']}", "key": request["key"], "model": "Llama-3.2-1B-Instruct-AWQ", "prompt": 0}
        known |= {"ttft_s": request["ttft"], "structured": False, "n": 1, "max_tokens": 800, "temperature": 0.7, "top_p": 0.95}
        return known

    def hardware(self) -> dict[str, Any]:
        busy = min(0.98, 0.1 + 0.2 * len(self.running))
        cards = [
            {
                "index": k, "name": "NVIDIA GeForce RTX 4090", "utilization": busy, "memory_used_bytes": 20 * GIB,
                "memory_total_bytes": 24 * GIB, "process_bytes": 19 * GIB, "temperature_c": 61.0 + k, "power_w": 312.4,
                "power_limit_w": 450.0, "throttle_reasons": [],
            }
            for k in range(self.gpus)
        ]  # fmt: skip
        return {
            "cpu": {"utilization": busy, "cores": 8, "threads": 16, "load": [4.2, 3.9, 3.1], "temperature_c": 64.0},
            "memory": {"total_bytes": 32 * GIB, "available_bytes": 21 * GIB},
            "processes": {"server": {"pid": 2, "cpu_cores": 0.12}, "engine": {"pid": 3, "cpu_cores": 8 * busy}},
            "gpus": cards,
        }


def latency(values: list[float]) -> dict[str, Any]:
    """As the server's own: of the last 60, for want of a minute's."""
    late = sorted(values[-60:])
    found = {f"p{p}_s": late[-(-p * len(late) // 100) - 1] if late else None for p in (50, 95, 99)}
    return {"count": len(values), "sum_s": sum(values), "window": len(late), **found}
