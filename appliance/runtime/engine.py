"""The engine: requests in, events out, one step at a time. Knows nothing of text, HTTP or processes."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain
from operator import attrgetter
from pathlib import Path

import psutil
import torch

from appliance.adapters import read_names
from appliance.config import EngineConfig
from appliance.core.door import check_submit, hash_u64, make_requests
from appliance.core.messages import EngineInfo, Event, Stats, Submit
from appliance.core.request import Request
from appliance.core.scheduler import Scheduler
from appliance.core.scores import PromptLogprobs
from appliance.core.step import Chunk, StepPlan
from appliance.memory.devices import cpu_threads
from appliance.memory.planner import make_plan
from appliance.runtime.adapters import Adapters, names_of
from appliance.runtime.beam import BeamGroup
from appliance.runtime.failures import told
from appliance.runtime.grammar import Grammars
from appliance.runtime.options import choose_device, eos_token_ids, make_scheduler
from appliance.runtime.runner import Flight, Runner, StepResult
from appliance.runtime.sampler import Sampled
from appliance.runtime.startup import Timeline, Tools, load_decoder, make_runner
from appliance.runtime.trial import prove
from kernels.cpu import backend
from quant.errors import InputError

log = logging.getLogger("appliance.engine")

MAX_FAILURES = 3  # steps in a row that may fail (their requests end with an error) before the engine gives up
SHOWN_REQUESTS = 64
IDLE_S = 0.01  # how long a step waits for a grammar where there is nothing else to do


class Engine:
    """Drives scheduler and runner. Not thread-safe: one caller submits, steps and reads."""

    def __init__(
        self, runner: Runner, scheduler: Scheduler, info: EngineInfo, *, seed: int = 0, tokenizer: str | None = None
    ) -> None:
        """``tokenizer``: the directory where it is, if not with the model; it is read for grammars alone."""
        self.runner, self.scheduler, self.info, self.seed = runner, scheduler, info, seed
        self._scores: dict[Request, PromptLogprobs] = {}  # prompt log-probabilities collected so far
        self._beams: dict[str, BeamGroup] = {}  # by request id
        self._grammars = Grammars(tokenizer or info.directory, info.vocab_size, info.eos_token_ids)
        self.adapters = Adapters(runner, self._requests)
        self._counts: Counter[str] = Counter()
        self._copied: Counter[str] = Counter()
        self._finished: Counter[str] = Counter()
        self._sizes: Counter[int] = Counter()  # steps by Stats.step_sizes' k
        self._failures = 0
        self._flight: Flight | None = None  # the step under way
        self._launched = self._landed = 0.0  # when it was, and when the one before did
        self._last_step = (0.0, 0)  # seconds, tokens
        self._process = psutil.Process()

    @classmethod
    def load(
        cls,
        config: EngineConfig,
        progress: Callable[[int, int], None] | None = None,
        *,
        import_s: float = 0.0,
        alone: bool = False,
    ) -> Engine:
        """Plan the memory, load the checkpoint in directory ``config.model``, allocate everything, and try it out on a card.

        Raises InputError (also its subclasses CheckpointError and PlanError) with one line for the user. ``progress`` is called
        with (bytes loaded, bytes to load). ``import_s``: seconds that the caller took to get here, for the timeline. ``alone``:
        whether this process is the engine's and has nothing else, as a server's has: then later plans learn what it takes.
        """
        if config.model is None:
            raise InputError("no model given: name a directory with a Hugging Face checkpoint")
        begun, timeline = time.perf_counter(), Timeline(import_s)
        torch.set_num_threads(cpu_threads(config.threads))
        directory, device = Path(config.model), choose_device(config.device)
        with timeline.part("plan"):
            plan = make_plan(directory, config)
        log.debug("memory plan\n%s", plan.table())
        with told(plan):
            decoder, quantization = load_decoder(config, plan, device, timeline, progress)
        spec, ops = decoder.spec, decoder.ops
        kernels = {"cpu-native": backend.name(), "cpu": "torch"}.get(ops.name, ops.name)
        log.info("loaded %s: %s kernels, activations in %s, head in %s", config.model, kernels, plan.dtype, plan.head)
        if not plan.device.bfloat16 and spec.dtype == "bfloat16" and plan.dtype == "float16":
            log.info("%s (sm_%s) has no bfloat16, in which the model was made: float16", plan.device.name, plan.device.capability)
        tools = Tools.of(device, config, plan.device.name)
        if device.type == "cuda":
            with timeline.part("trial"), told(plan):
                prove(config, plan, decoder, tools.lane)
        runner, plan = make_runner(decoder, plan, config, tools, timeline, device=device, alone=alone)
        if ops.name == "cpu-native":
            torch.set_num_threads(1)  # what is left to torch is small, and the kernels' threads have the cores
        scheduler, names = make_scheduler(config, plan, spec), read_names(config.lora_modules)
        ready_s = time.perf_counter() - begun
        log.info("ready in %.1f s: %s", import_s + ready_s, timeline)
        info = EngineInfo(
            model=config.model,
            directory=str(directory),
            architecture=spec.architecture,
            quantization=quantization,
            dtype=plan.dtype,
            device=device.type,
            max_model_len=plan.max_model_len,
            vocab_size=spec.vocab,
            eos_token_ids=eos_token_ids(directory, spec),
            ready_s=ready_s,
            plan=plan.to_dict(),
            priorities=scheduler.priorities,
            forks=not plan.sequence_bytes,
            hidden_size=spec.hidden,
            max_loras=0 if spec.adapters is None else spec.adapters.count,
            adapters=tuple(names),
            kernels=kernels,
            startup={**timeline.seconds, "ready": import_s + ready_s},
        )
        engine = cls(runner, scheduler, info, seed=config.seed, tokenizer=config.tokenizer)
        for adapter in names.items():
            engine.adapters.load(*adapter)
        return engine

    def prepare(self) -> None:
        """Begin, beside whatever comes, with what the first answer that follows a grammar would keep everybody waiting for."""
        self._grammars.prepare()

    @property
    def reading(self) -> bool:
        """Whether a vocabulary is read for grammars, or will be in this step: for seconds nothing else may have its turn."""
        return self._grammars.reading

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work or self._flight is not None

    def submit(self, submit: Submit) -> None:
        """Take a request, or raise RequestError when it can never be served."""
        check_submit(submit, self.info)
        adapter = self.adapters.find(submit.adapter)
        self._counts["submitted"] += 1
        seed = hash_u64(self.seed, self._counts["submitted"])
        requests = make_requests(submit, self.info, fallback_seed=seed, adapter=adapter)
        for request in requests:
            self._counts["requests"] += 1
            request.held = bool(submit.params.grammar)  # until that is compiled
            self.scheduler.add(request)
        if submit.params.use_beam_search:
            self._beams[submit.request_id] = BeamGroup(requests, submit.params)
        if submit.params.grammar:
            self._grammars.begin(requests)

    def abort(self, request_id: str, index: int | None = None, reason: str = "abort") -> list[Event]:
        """End a request (beams end together) and free its blocks; an Event with ``reason`` for each completion that was alive."""
        if self._beams.pop(request_id, None) is not None:
            index = None
        return self._end(self.scheduler.abort(request_id, index), reason)

    def clear(self, scheduler: Scheduler) -> None:
        """Forget all requests and all that was computed, and go on with these empty books.

        For whoever was interrupted anywhere, as by ctrl-C: of the books that were being written nothing is sure.
        """
        flight, self._flight, self.scheduler = self._flight, None, scheduler
        self._scores.clear()
        self._beams.clear()
        if flight is not None:
            flight.wait()

    def reset_prefix_cache(self) -> None:
        """Nothing that was computed before will be found by later requests."""
        self.scheduler.store.forget()

    def step(self) -> list[Event]:
        """Schedule, compute and commit one step. A step that fails ends all that run with an error; the engine goes on.

        Where the device works by itself, what is returned are the events of the step before, as this one is under way by then.
        """
        events = [] if self._flight is None or self._flight.open else self._land()
        idle = self._flight is None and not self.scheduler.running and not self.scheduler.waiting
        for request, error in self._grammars.settle(IDLE_S if idle else 0.0):
            if not error:
                self.scheduler.hold(request, False)
            elif self.scheduler.has(request):
                events += self._end(self.scheduler.abort(*request.key), "error", error)
        plan = self.scheduler.schedule()
        for request in plan.preempted:
            log.info("preempted %s/%d: %s", *request.key, "swapped out" if request.host else "it will be computed again")
        self._copied.update(copy.kind for copy in plan.copies if copy.kind != "states")
        now = time.monotonic()
        for request in (chunk.request for chunk in plan.chunks):
            request.scheduled = request.scheduled or now
        begun, flight = time.perf_counter(), None
        try:
            self.runner.move(plan.copies)
            if plan.chunks:
                flight = self.runner.launch(plan, [self._scored(c.request) for c in plan.chunks])
        except Exception as error:  # whatever it was: one request's odd number shall not end the others' engine
            return events + self._land() + self._fail(plan, error)
        events += self._land()
        self._flight, self._launched = flight, begun
        return events if self.runner.runs_ahead else events + self._land()

    def _land(self) -> list[Event]:
        """Take the results of the step under way, if there is one."""
        flight, self._flight = self._flight, None
        if flight is None:
            return []
        try:
            result = flight.land()
        except Exception as error:
            return self._fail(flight.plan, error)
        self._failures = 0
        events = self._commit(flight.plan, result)
        now = time.perf_counter()
        self._last_step = (now - max(self._launched, self._landed), flight.plan.num_tokens)
        self._landed = now
        self._counts["steps"] += 1
        self._counts["step_tokens"] += flight.plan.num_tokens
        self._sizes[(flight.plan.num_tokens - 1).bit_length()] += 1
        return events

    def _commit(self, plan: StepPlan, result: StepResult) -> list[Event]:
        """Requests that ended while the step ran take nothing of it."""
        both = zip(plan.chunks, result.sampled, strict=True)
        taken = [(chunk, found) for chunk, found in both if found and not chunk.request.finished]
        for scores in result.prompt_scores:
            self._scores.setdefault(scores.request, PromptLogprobs.of([None])).extend(scores.logprobs)
        events: list[Event] = []
        for chunk in plan.chunks:
            prompt_len = chunk.request.prompt_len
            self._counts["prompt_tokens"] += min(chunk.start + chunk.length, prompt_len) - min(chunk.start, prompt_len)
        for chunk, (one, *_) in taken:
            if one.error is not None:
                index = None if self._beams.pop(chunk.request.request_id, None) else chunk.request.index
                events += self._end(self.scheduler.abort(chunk.request.request_id, index), "error", one.error)
        before = {chunk.request: len(chunk.request.tokens) for chunk, _ in taken}
        self.scheduler.commit(plan, [_tokens(chunk, found) for chunk, found in zip(plan.chunks, result.sampled, strict=True)])
        for chunk, found in taken:
            if found[0].error is not None:
                continue
            request = chunk.request
            if request.pooling is not None:
                events.append(self._pooled(request, result.embeddings[request]))
                continue
            self._counts["generation_tokens"] += 1
            if request.beam:
                events += self._search(request, found[0])
                continue
            found = found[: len(request.tokens) - before[request]]  # what comes after an end is not the answer's
            self._counts["generation_tokens"] += len(found) - 1
            prompt = self._take_scores(request)
            events.append(
                Event(
                    request_id=request.request_id,
                    index=request.index,
                    token_ids=tuple(one.token for one in found),
                    logprobs=None if request.params.scored is None else tuple(one.logprob for one in found if one.logprob),
                    prompt_logprobs=prompt,
                    finish_reason=request.finish_reason,
                    stop_reason=request.stop_reason,
                    preemptions=request.preemptions,
                    cached_tokens=request.cached,
                    scheduled=request.scheduled if request.output_len == 1 else None,
                )
            )
            if request.finish_reason is not None:
                self._finished[request.finish_reason] += 1
        return events

    def _pooled(self, request: Request, embedding: bytes) -> Event:
        """The end of a request for an embedding."""
        self._finished["stop"] += 1
        return Event(
            request.request_id,
            request.index,
            finish_reason="stop",
            preemptions=request.preemptions,
            cached_tokens=request.cached,
            embedding=embedding,
        )

    def _search(self, request: Request, row: Sampled) -> list[Event]:
        """Take what may follow one beam. Once it is known of all, they go on, or the request ends with the best of them."""
        group = self._beams.get(request.request_id)
        if group is None or row.likely is None or not group.take(request, row.likely):
            return []
        if moves := group.decide():
            self.scheduler.branch(moves)
            return []
        del self._beams[request.request_id]
        self.scheduler.abort(request.request_id)
        scores = self._scores.pop(group.leader, None) or PromptLogprobs.of([None])
        events = group.events(None if group.leader.params.prompt_logprobs is None else scores)
        events = [replace(event, scheduled=group.leader.scheduled) for event in events]
        self._finished.update(event.finish_reason or "" for event in events)
        return events

    def _scored(self, request: Request) -> int:
        """How many prompt tokens need no log-probability any more: all, once they were told with the first answer token."""
        return request.prompt_len if request.output_len else len(self._scores.get(request, ()))

    def _take_scores(self, request: Request) -> PromptLogprobs | None:
        """The whole prompt's log-probabilities, once: with the first token."""
        if request.params.prompt_logprobs is None or request.output_len != 1:
            return None
        return self._scores.pop(request, None) or PromptLogprobs.of([None])

    def _end(self, requests: Iterable[Request], reason: str, error: str | None = None) -> list[Event]:
        events = []
        for request in requests:
            self._scores.pop(request, None)
            self._finished[reason] += 1
            events.append(
                Event(request.request_id, request.index, finish_reason=reason, error=error, preemptions=request.preemptions)
            )
        return events

    def _fail(self, plan: StepPlan, error: Exception) -> list[Event]:
        self._failures += 1
        log.exception("step failed (%d in a row); the %d requests that run end with an error", self._failures, len(plan.chunks))
        if self._failures >= MAX_FAILURES:
            raise error
        ended = self.scheduler.recover()
        for request_id in {request.request_id for request in ended} & self._beams.keys():
            del self._beams[request_id]
            ended += self.scheduler.abort(request_id)
        return self._end(ended, "error", f"the engine failed to compute this request: {error}")

    def stats(self) -> Stats:
        """The engine at this moment; costs well under a millisecond."""
        pool, host, scheduler, now = self.scheduler.pool, self.scheduler.store.host, self.scheduler, time.monotonic()
        shown = [*scheduler.running, *scheduler.waiting[:SHOWN_REQUESTS], *scheduler.deferred[:SHOWN_REQUESTS]]
        shown.sort(key=attrgetter("arrival"))
        return Stats(
            time=now,
            steps=self._counts["steps"],
            running=len(scheduler.running),
            waiting=len(scheduler.waiting) + len(scheduler.deferred),
            swapped=scheduler.store.swapped,
            held=len(scheduler.deferred),
            blocks_total=pool.num_blocks,
            blocks_used=pool.used,
            blocks_shared=pool.shared,
            blocks_kept=pool.kept,
            block_size=pool.block_size,
            block_map=pool.map(2048),
            swap_total=0 if host is None else host.num_blocks,
            swap_used=0 if host is None else host.used,
            swap_kept=0 if host is None else host.kept,
            prompt_tokens=self._counts["prompt_tokens"],
            generation_tokens=self._counts["generation_tokens"],
            requests=self._counts["requests"],
            finished=dict(self._finished),
            preemptions=scheduler.num_preemptions,
            swaps=scheduler.num_swaps,
            prefix_queries=scheduler.prompt_tokens_looked_up,
            prefix_hits=scheduler.prompt_tokens_found,
            prefix_host_hits=scheduler.prompt_tokens_found_in_host,
            **({} if scheduler.drafts is None else scheduler.drafts.counters),
            copied_blocks=dict(self._copied),
            last_step_s=self._last_step[0],
            last_step_tokens=self._last_step[1],
            step_tokens=self._counts["step_tokens"],
            step_sizes=dict(self._sizes),
            rss_bytes=self._process.memory_info().rss,
            requests_now=tuple(request.stat(now) for request in shown[:SHOWN_REQUESTS]),
            adapters_running=names_of(scheduler.running) if self.adapters else (),
            adapters_waiting=names_of(chain(scheduler.waiting, scheduler.deferred)) if self.adapters else (),
        )

    def _requests(self) -> Iterator[Request]:
        yield from chain(self.scheduler.running, self.scheduler.waiting, self.scheduler.deferred)
        yield from () if self._flight is None else (chunk.request for chunk in self._flight.plan.chunks)

    def check(self) -> None:
        """Raise when pool and scheduler disagree."""
        self.scheduler.check()


def _tokens(chunk: Chunk, found: Sequence[Sampled]) -> int | tuple[int, ...] | None:
    """What ``Scheduler.commit`` wants of a chunk."""
    return tuple(one.token for one in found) if chunk.draft else found[0].token if found else None
