"""A stand-in for a server's /stats: plays a busy engine, the same way each time."""

from __future__ import annotations

import random
from dataclasses import asdict
from typing import Any

from appliance.core.blocks import BlockPool
from appliance.core.messages import EngineInfo, RequestStat, Stats

GIB = 1024**3


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


class FakeServer:
    """Each call is /stats one second later. ``away`` makes the next calls fail as a closed port does."""

    def __init__(self, *, num_blocks: int = 1536, arrivals: float = 0.8, seed: int = 0) -> None:
        self.random = random.Random(seed)
        self.pool = BlockPool(num_blocks, 16)
        self.info = info(num_blocks=num_blocks)
        self.arrivals = arrivals
        self.state = "ok"
        self.loading: list[int] | None = None
        self.away: Exception | None = None
        self.clock, self.prompt_tokens, self.generation_tokens, self.arrived = 0.0, 0, 0, 0
        self.running: list[dict[str, Any]] = []
        self.finished = {"stop": 0, "length": 0}

    def __call__(self, url: str, api_key: str | None = None) -> dict[str, Any]:
        if self.away:
            raise self.away
        self.tick()
        return self.body()

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
        name = f"chatcmpl-{self.random.getrandbits(64):016x}"
        blocks = self.pool.allocate(1, expect=expect) or []
        request = {"id": name, "prompt": prompt, "answer": answer, "computed": 0, "out": 0, "blocks": blocks, "born": self.clock}
        self.running.append(request)

    def advance(self, request: dict[str, Any], budget: int) -> None:
        if request["computed"] < request["prompt"]:
            n = min(budget, request["prompt"] - request["computed"])
            self.prompt_tokens += n
        else:
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
            self.finished["length" if request["answer"] % 7 == 0 else "stop"] += 1

    @property
    def swapped(self) -> int:
        return int(len(self.running) > 3)

    def stats(self) -> Stats:
        started = [r for r in self.running if r["computed"]]
        requests = [
            RequestStat(
                request_id=r["id"],
                index=0,
                state="running" if r["computed"] else "waiting",
                prompt_tokens=r["prompt"],
                output_tokens=r["out"],
                computed_tokens=r["computed"],
                blocks=len(r["blocks"]),
                age_s=self.clock - r["born"] + 0.3,
                preemptions=int(r["prompt"] % 31 == 0),
            )
            for r in self.running
        ]
        if self.swapped:
            requests.insert(len(requests) // 2, RequestStat("chatcmpl-0123456789abcdef", 1, "swapped", 700, 90, 789, 0, 9.0, 1))
        return Stats(
            time=1e9 + self.clock,
            steps=int(self.clock * 18),
            running=len(started),
            waiting=len(self.running) - len(started) + self.swapped,
            blocks_total=self.pool.num_blocks,
            blocks_used=self.pool.used,
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
        return {
            "version": "0.1.0",
            "model": "Llama-3.2-1B-Instruct-AWQ",
            "state": self.state,
            "uptime_s": 3725 + self.clock,
            "info": asdict(self.info) if ready else None,
            "engine": asdict(self.stats() if ready else Stats()),
            "loading": self.loading,
        }
