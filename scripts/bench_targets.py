"""One engine under test, in a process of its own: ours, llama.cpp or vLLM, asked the same and timed the same way.

Started by bench_compare.py as ``PYTHON bench_targets.py FD``: questions come as JSON lines on standard input, an answer to each
goes to the file descriptor. Whichever Python it runs in need not know this project: only the standard library is imported here.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

Times = list[list[float]]
"""For each sequence: when each of its tokens came, in seconds since the prompts were handed over."""


@dataclass(frozen=True)
class Case:
    """``sequences`` prompts of ``prompt`` tokens at once, each answered with ``tokens`` tokens; the median of ``repeat`` runs."""

    sequences: int
    prompt: int
    tokens: int
    repeat: int


def first_s(times: Times) -> float:
    """Until every sequence had its first token."""
    return max(one[0] for one in times)


def decode_tok_s(times: Times) -> float | None:
    """Tokens a second while all sequences decode: from the moment the last one got its first token until the first one ended."""
    begin, end = first_s(times), min(one[-1] for one in times)
    return sum(begin < t <= end for one in times for t in one) / (end - begin) if end > begin else None


def median(values: list[float]) -> float:
    ordered = sorted(values)
    return (ordered[len(ordered) // 2] + ordered[(len(ordered) - 1) // 2]) / 2


def measure(generate: Callable[[list[list[int]], int], Times], case: Case, rng: random.Random, vocab: int) -> dict[str, Any]:
    """Run a case with fresh random prompts each time, so that no cache of prefixes helps."""
    firsts, rates = [], []
    for _ in range(case.repeat):
        prompts = [[rng.randrange(vocab // 100, vocab) for _ in range(case.prompt)] for _ in range(case.sequences)]
        times = generate(prompts, case.tokens)
        firsts.append(first_s(times))
        rate = decode_tok_s(times)
        if rate is not None:
            rates.append(rate)
    return {**asdict(case), "first_s": median(firsts), "decode_tok_s": median(rates) if rates else None}


class Appliance:
    """This project, in process, a step after another."""

    def __init__(self, job: dict[str, Any]) -> None:
        from appliance.config import EngineConfig
        from appliance.runtime.engine import Engine

        self.engine = Engine.load(EngineConfig(**job["config"]))
        self.count = 0

    def generate(self, prompts: list[list[int]], tokens: int) -> Times:
        from appliance.core.messages import Submit
        from appliance.core.params import SamplingParams

        params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
        rows: dict[str, list[float]] = {}
        begun = time.perf_counter()
        for prompt in prompts:
            self.count += 1
            rows[f"bench-{self.count}"] = []
            self.engine.submit(Submit(f"bench-{self.count}", tuple(prompt), params, time.time()))
        while self.engine.has_work:
            events = self.engine.step()
            now = time.perf_counter() - begun
            for event in events:
                if event.error is not None:
                    raise RuntimeError(event.error)
                rows[event.request_id] += [now] * len(event.token_ids)
        return list(rows.values())

    def facts(self) -> dict[str, Any]:
        """What the report says beside the times; ``host_us`` and ``bookkeeping_us`` by number of sequences (see ``overhead``)."""
        import torch

        from appliance.runtime.check import weights_by_part

        info, decoder = self.engine.info, self.engine.runner.decoder
        read = decoder.nbytes - decoder.cos_sin.nbytes - (0 if decoder.tied else decoder.embedding.nbytes)
        native = hasattr(getattr(decoder.ops.matmul, "__self__", None), "machine")
        spent = {str(n): self.overhead(n) for n in (1, 32, 256)} if native else {}
        return {
            "version": f"torch {torch.__version__}",
            "kernels": info.kernels,
            "head": info.plan["lm_head"],
            "read_bytes": read,
            "expert_bytes": weights_by_part(decoder).get("experts", 0),
            "weight_bytes": decoder.nbytes,
            "planned_bytes": info.plan["total_bytes"],
            "host_us": {n: host for n, (host, _) in spent.items()},
            "bookkeeping_us": {n: bookkeeping for n, (_, bookkeeping) in spent.items()},
        }

    def overhead(self, sequences: int, tokens: int = 16) -> tuple[float, float]:
        """Median microseconds of a decode step outside the native calls, and outside the model's runner (scheduling, events)."""
        engine, native = self.engine, self.engine.runner.decoder.ops.matmul.__self__
        machine, runner, step = native.machine, engine.runner, engine.step
        calls, runs = Clock(machine), Clock(runner)
        spans: list[tuple[float, float, float]] = []

        def timed() -> Any:
            calls.seconds = runs.seconds = 0.0
            begun = time.perf_counter()
            events = step()
            spans.append((time.perf_counter() - begun, calls.seconds, runs.seconds))
            return events

        native.machine, engine.runner, engine.step = calls, runs, timed
        try:
            self.generate([[3] * 8] * sequences, tokens)
        finally:
            native.machine, engine.runner = machine, runner
            del engine.step
        decode = spans[1:-1]
        return tuple(round(1e6 * median([span[0] - span[i] for span in decode]), 1) for i in (1, 2))  # type: ignore[return-value]


class Clock:
    """Stands in for an object and adds up the time that calls of its methods take."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.seconds = inner, 0.0

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.inner, name)

        def call(*args: Any) -> Any:
            begun = time.perf_counter()
            result = method(*args)
            self.seconds += time.perf_counter() - begun
            return result

        setattr(self, name, call)
        return call


class Llama:
    """llama.cpp by its C interface: one prompt batch of all sequences, then a token for each of them at a time.

    Its context (the cache) is made anew for every case, of just the size that the case needs, outside the timing. Tokens are
    picked by numpy's argmax, which is faster than its own greedy sampler.
    """

    def __init__(self, job: dict[str, Any]) -> None:
        import llama_cpp

        self.api, self.threads, self.path = llama_cpp, job["threads"], job["gguf"]
        self._quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self._quiet, None)
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(self.path.encode(), llama_cpp.llama_model_default_params())
        if not self.model:
            raise RuntimeError(f"llama.cpp cannot load {os.path.basename(self.path)}")
        self.vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))

    def context(self, sequences: int, length: int) -> Any:
        params = self.api.llama_context_default_params()
        params.n_ctx = sequences * -(-length // 256) * 256
        params.n_batch, params.n_seq_max = 2048, sequences
        params.n_threads = params.n_threads_batch = self.threads
        context = self.api.llama_init_from_model(self.model, params)
        if not context:
            raise RuntimeError(f"llama.cpp refuses a context of {params.n_ctx} tokens")
        return context

    def generate(self, prompts: list[list[int]], tokens: int) -> Times:
        import numpy

        context = self.context(len(prompts), len(prompts[0]) + tokens)
        batch = self.api.llama_batch_init(2048, 0, 1)
        times: Times = [[] for _ in prompts]
        begun = time.perf_counter()

        def decode(rows: list[tuple[int, int, int, bool]]) -> dict[int, int]:
            """(token, position, sequence, whether its logits are wanted) -> the next token of those sequences."""
            batch.n_tokens = len(rows)
            for i, (token, position, sequence, wanted) in enumerate(rows):
                batch.token[i], batch.pos[i], batch.logits[i] = token, position, wanted
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
            if self.api.llama_decode(context, batch):
                raise RuntimeError("llama_decode failed")
            found = {}
            for i, (_, _, sequence, wanted) in enumerate(rows):
                if wanted:
                    logits = self.api.llama_get_logits_ith(context, i)
                    found[sequence] = int(numpy.ctypeslib.as_array(logits, shape=(self.vocab,)).argmax())
                    times[sequence].append(time.perf_counter() - begun)
            return found

        rows = [(t, p, s, p == len(prompt) - 1) for s, prompt in enumerate(prompts) for p, t in enumerate(prompt)]
        last: dict[int, int] = {}
        for i in range(0, len(rows), 2048):
            last |= decode(rows[i : i + 2048])
        for step in range(tokens - 1):
            last = decode([(token, len(prompts[s]) + step, s, True) for s, token in last.items()])
        self.api.llama_batch_free(batch)
        self.api.llama_free(context)
        return times

    def facts(self) -> dict[str, Any]:
        size = self.api.llama_model_size(self.model)
        return {"version": f"llama-cpp-python {self.api.__version__}", "read_bytes": size, "weight_bytes": size}


class Vllm:
    """vLLM's offline engine; its engine process sends the tokens step by step."""

    def __init__(self, job: dict[str, Any]) -> None:
        from vllm import LLM

        self.llm = LLM(
            model=job["model"],
            skip_tokenizer_init=True,
            dtype="bfloat16",
            max_model_len=job["max_model_len"],
            enable_prefix_caching=False,
            disable_log_stats=True,
        )
        self.job, self.count = job, 0

    def generate(self, prompts: list[list[int]], tokens: int) -> Times:
        from vllm import SamplingParams

        params = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True, detokenize=False)
        engine = self.llm.llm_engine
        rows: dict[str, list[float]] = {}
        begun = time.perf_counter()
        for prompt in prompts:
            self.count += 1
            rows[str(self.count)] = []
            engine.add_request(str(self.count), {"prompt_token_ids": prompt}, params)
        while engine.has_unfinished_requests():
            outputs = engine.step()
            now = time.perf_counter() - begun
            for output in outputs:
                row = rows[output.request_id]
                row += [now] * (len(output.outputs[0].token_ids) - len(row))
        return list(rows.values())

    def facts(self) -> dict[str, Any]:
        import vllm

        files = [os.path.join(self.job["model"], f) for f in os.listdir(self.job["model"]) if f.endswith(".safetensors")]
        size = sum(os.path.getsize(f) for f in files)
        return {"version": f"vllm {vllm.__version__}", "read_bytes": size, "weight_bytes": size}


KINDS: dict[str, Callable[[dict[str, Any]], Any]] = {"appliance": Appliance, "llama": Llama, "vllm": Vllm}


def main() -> None:
    """The first line is the job: load, answer one short prompt, and say how long that took. Then cases, and at last the facts."""
    job = json.loads(sys.stdin.readline())
    with os.fdopen(int(sys.argv[1]), "w") as out:

        def tell(answer: dict[str, Any]) -> None:
            print(json.dumps(answer), file=out, flush=True)

        target = KINDS[job["kind"]](job)
        target.generate([[7] * 8], 1)
        ready = time.time() - job["started"]
        rng = random.Random(job["seed"])
        target.generate([[11] * 64], 4)  # first-call costs of the libraries are not what is asked for
        tell({"ready_s": ready})
        for line in sys.stdin:
            question = json.loads(line)
            if "case" in question:
                tell(measure(target.generate, Case(**question["case"]), rng, job["vocab"]))
            else:
                tell(target.facts())


if __name__ == "__main__":
    main()
