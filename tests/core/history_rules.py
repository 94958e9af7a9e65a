"""What must hold at any moment of a history of the scheduler, and of each of its plans."""

from __future__ import annotations

from appliance.core.request import Request
from appliance.core.scheduler import Scheduler
from appliance.core.step import StepPlan
from tests.core.fake_model import FakeRunner, contents

Flight = tuple[StepPlan, list[int | tuple[int, ...] | None]]


class Rules:
    """One scheduler, its fake device, and what every request alive must come to."""

    scheduler: Scheduler
    runner: FakeRunner
    worth: int  # tokens that make up for one that is computed again
    alive: dict[Request, list[int]]  # with the tokens that each must end with (of a beam: that it must have now)
    groups: list[list[Request]]  # beams, from the best on
    grammars: list[Request]  # that wait for theirs
    prompts: list[list[int]]
    waits: dict[Request, tuple[tuple[int, int], int]]  # ticket, and how many steps it may wait with that
    flight: Flight | None  # computed, but not known yet

    def take_ended(self, error: bool = False) -> None:
        for request in [r for r in self.alive if r.finished]:
            tokens = self.alive.pop(request)
            if request.finish_reason == "error":
                assert error
            else:
                assert request.tokens == tokens and not request.blocks and not request.host
                told, stops = request.output_len >= request.params.min_tokens, request.params.stop_token_ids
                ends = {*request.eos_token_ids, *stops}  # type: ignore[misc]
                assert (request.finish_reason == "stop") == (told and tokens[-1] in ends)
                assert (request.stop_reason == tokens[-1]) == (request.finish_reason == "stop" and tokens[-1] in stops)  # type: ignore[operator]
                self.prompts.append(tokens)

    def schedule(self) -> StepPlan:
        """One plan, with all that must hold of any."""
        scheduler = self.scheduler
        faults = self.faults
        before = [r for r in scheduler.running if not r.finished]
        queue = [r for r in scheduler.waiting if not r.finished]
        plan = scheduler.schedule()
        self.check()
        assert plan.num_tokens <= scheduler.max_num_batched_tokens and len(plan.chunks) <= scheduler.max_num_seqs
        planned = {chunk.request for chunk in plan.chunks}
        assert len(planned) == len(plan.chunks)
        for request, start, length, samples, draft in plan.chunks:
            known = request.known - samples  # before this step, with its draft
            assert not draft or (samples and length == 1 + len(draft) and known <= request.max_total - 1)
            assert not request.finished and not request.held
            assert request.params.prompt_logprobs is None or not request.cached, "its prompt is computed"
            assert length >= 1 and start + length == request.computed <= known and samples == (request.computed == known)
        resting = {r for r in scheduler.running if r not in planned}
        assert planned <= {*scheduler.running}
        for r in resting:
            assert r.held or (r.ahead and (r.beam or r.known == r.max_total)), "every other running request advances"
        if faults == self.faults:
            came = {r for r in scheduler.running if r not in before}
            passed = [r for r in queue if r in scheduler.waiting and not r.held]
            assert all(a.ticket < w.ticket for a in came for w in passed), "somebody was overtaken"
            assert not scheduler.priorities or all(a.priority <= w.priority for a in came for w in passed)
            assert plan.chunks or plan.preempted or self.flight or {*self.alive} <= {*self.grammars}, "nothing goes on"
            self.count_waits()
        else:
            self.waits.clear()
        return plan

    def count_waits(self) -> None:
        """Nobody waits for longer than all before it, and those who run already (it may have waited for a grammar), may
        take for a turn each, and the time to compute again what they had."""
        scheduler = self.scheduler
        if scheduler.priorities or any(self.groups):
            return
        waits, self.waits = self.waits, {}
        for request in (r for r in scheduler.waiting if not r.held):
            ticket, left = waits.get(request, (None, 0))
            if ticket != request.ticket:
                before = [r for r in self.alive if r.ticket <= request.ticket or r.running]
                turns = [max(scheduler.fair_tokens, self.worth * 2 * r.max_total) for r in before]
                left = sum(min(turn, r.max_total - len(r.tokens)) + r.max_total + 4 for turn, r in zip(turns, before))
            assert left > 0, f"{request.key} waits for too long"
            self.waits[request] = request.ticket, left - 1

    @property
    def faults(self) -> int:
        return sum(pool.faults for pool in (self.scheduler.pool, self.scheduler.store.host) if pool is not None)

    @property
    def all(self) -> list[Request]:
        return [*self.scheduler.running, *self.scheduler.waiting, *self.scheduler.deferred]

    def check(self) -> None:
        self.scheduler.check()
        assert {r for r in self.all if r.finish_reason is None} == self.alive.keys()
        for request, tokens in self.alive.items():
            assert request.tokens == tokens[: len(request.tokens)], "not the tokens it would have alone"

    def check_contents(self) -> None:
        """Every block that has a key contains what the key says, here and there."""
        for pool, memory in ((self.scheduler.pool, self.runner.pool), (self.scheduler.store.host, self.runner.host)):
            for block, key in pool._keys.items() if pool is not None else ():
                assert memory[block] == contents(key, pool.block_size), f"block {block} does not contain what its key says"
        kept = self.scheduler.store.kept
        for key, place in kept.items() if kept is not None else ():
            assert self.runner.states[place] == contents(key, None), f"states at {place} are not those that their key says"
