"""Random histories of adding, stepping and aborting, over pools from one block up, with a runner that sees stale slots."""

from __future__ import annotations

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from appliance.core.blocks import BlockPool
from appliance.core.request import Request
from appliance.core.scheduler import Scheduler
from appliance.core.step import StepPlan
from tests.core.fake_model import VOCAB, FakeRunner, alone, make_request, next_token


class SchedulerMachine(RuleBasedStateMachine):
    @initialize(
        num_blocks=st.integers(1, 20),
        block_size=st.sampled_from([1, 2, 4, 8]),
        budget=st.integers(1, 40),
        max_num_seqs=st.integers(1, 12),
    )
    def start(self, num_blocks: int, block_size: int, budget: int, max_num_seqs: int) -> None:
        self.capacity = num_blocks * block_size
        self.scheduler = Scheduler(BlockPool(num_blocks, block_size), max_num_batched_tokens=budget, max_num_seqs=max_num_seqs)
        self.runner = FakeRunner(self.scheduler)
        self.alive: dict[Request, list[int]] = {}  # in order of arrival, with the tokens each must end with
        self.count = 0
        self.flight: tuple[StepPlan, list[int | None]] | None = None  # computed, but not known yet

    @rule(prompt_len=st.integers(1, 40), max_tokens=st.integers(1, 30), eos=st.booleans(), n=st.integers(1, 4))
    def add(self, prompt_len: int, max_tokens: int, eos: bool, n: int) -> None:
        max_tokens = min(max_tokens, self.capacity)
        prompt_len = min(prompt_len, self.capacity + 1 - max_tokens)
        for index in range(n):
            prompt = [(self.count * 7 + i) % VOCAB for i in range(prompt_len)]
            ends = {next_token(alone(prompt, max_tokens // 2))} if eos else set()
            request = make_request(str(self.count), prompt, max_tokens, index=index, eos=ends)
            self.scheduler.add(request)
            self.alive[request] = alone(prompt, max_tokens, ends)
        self.count += 1

    @precondition(lambda self: self.alive)
    @rule()
    def step(self) -> None:
        self.land()
        if self.alive:
            plan = self.schedule()
            self.commit(plan, self.runner.run(plan))

    @precondition(lambda self: self.alive)
    @rule(times=st.integers(1, 8))
    def steps_ahead(self, times: int) -> None:
        """Each step is decided and computed before the tokens of the one before are known."""
        for _ in range(times):
            plan = self.schedule()
            sampled = self.runner.run(plan)
            self.land()
            self.flight = plan, sampled

    def land(self) -> None:
        if self.flight is not None:
            (plan, sampled), self.flight = self.flight, None
            self.commit(plan, sampled)

    @precondition(lambda self: self.alive)
    @rule(times=st.integers(2, 8))
    def steps(self, times: int) -> None:
        for _ in range(times):
            self.step()

    @precondition(lambda self: self.alive)
    @rule(data=st.data(), one=st.booleans())
    def abort(self, data: st.DataObject, one: bool) -> None:
        self.abort_one(data.draw(st.sampled_from(list(self.alive))), one)

    @precondition(lambda self: self.alive)
    @rule(data=st.data(), one=st.booleans())
    def abort_during_a_step(self, data: st.DataObject, one: bool) -> None:
        plan = self.schedule()
        sampled = self.runner.run(plan)
        if plan.chunks:
            self.abort_one(data.draw(st.sampled_from(plan.chunks)).request, one)
        self.land()
        self.commit(plan, sampled)

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def fail_during_a_step(self, data: st.DataObject) -> None:
        """Somebody sets a finish_reason between schedule and commit: the request ends there and takes no token."""
        self.land()
        if not self.alive:
            return
        plan = self.schedule()
        sampled = self.runner.run(plan)
        request = data.draw(st.sampled_from(plan.chunks)).request
        request.finish_reason, tokens = "error", list(request.tokens)
        assert request in self.scheduler.commit(plan, sampled)
        assert request.tokens == tokens and not request.blocks
        del self.alive[request]
        self.end_finished()

    def abort_one(self, request: Request, one: bool) -> None:
        found = self.scheduler.abort(request.request_id, request.index if one else None)
        assert request in found and all(r.request_id == request.request_id for r in found)
        for r in found:
            assert r.finish_reason == "abort" and not r.blocks
            del self.alive[r]

    def schedule(self) -> StepPlan:
        oldest = next(iter(self.alive), None)
        waiting = set(self.scheduler.waiting)
        assert all(r.pending == 1 for r in self.scheduler.running[:-1]), "only the youngest may be amid its prompt"
        plan = self.scheduler.schedule()
        self.scheduler.check()
        assert plan.num_tokens <= self.scheduler.max_num_batched_tokens
        assert len(plan.chunks) <= self.scheduler.max_num_seqs
        planned = {chunk.request for chunk in plan.chunks}
        assert len(planned) == len(plan.chunks) and not planned & set(plan.preempted)
        ending = {r for r in self.alive if r not in planned and r.ahead and r.known == r.max_total}
        assert oldest is None or oldest in planned | ending, "the oldest request must advance"
        assert planned == set(self.scheduler.running) - ending, "every running request advances"
        assert not plan.preempted or not planned & waiting, "admitted while another was preempted"
        for request, start, length, samples in plan.chunks:
            known = request.known - samples  # before this step
            assert not request.finished and length >= 1 and start + length == request.computed <= known
            assert samples == (request.computed == known)
        return plan

    def commit(self, plan: StepPlan, sampled: list[int | None]) -> None:
        for request in self.scheduler.commit(plan, sampled):
            assert request.finish_reason in ("stop", "length")
        self.end_finished()

    def end_finished(self) -> None:
        for request in [r for r in self.alive if r.finished]:
            assert request.tokens == self.alive.pop(request) and not request.blocks

    @invariant()
    def books_are_right(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        self.scheduler.check()
        pool = self.scheduler.pool
        assert pool.free + pool.used == pool.num_blocks
        assert [*self.scheduler.running, *self.scheduler.waiting] == list(self.alive)
        for request, tokens in self.alive.items():
            assert request.tokens == tokens[: len(request.tokens)]

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        self.land()
        limit = 1 + sum(len(tokens) for tokens in self.alive.values())  # each step advances the oldest by a token at least
        while self.alive:
            self.step()
            limit -= 1
            assert limit > 0, "a request does not end"
        assert self.scheduler.pool.used == 0 and not self.scheduler.has_work


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(
    max_examples=1000, stateful_step_count=50, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
