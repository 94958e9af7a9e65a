"""Random histories of the scheduler: what may happen, and what must hold after each thing that does.

    python -m tests.core.histories --count 1000000 --first 0

A history is what a source of choices makes of it: a seed's random numbers here, hypothesis in test_scheduler_histories.py.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable

from appliance.core import store
from appliance.core.drafts import Drafts, Said
from appliance.core.params import RequestError
from appliance.core.request import Request
from appliance.core.scheduler import Scheduler
from tests.core.fake_model import SALTS, FakeRunner, PlainKey, SpoilingPool, alone, make_request, next_token
from tests.core.history_rules import Rules

Choose = Callable[[int], int]  # choose(n): one of 0 .. n - 1
NEVER = 10**6


class Guesses(Drafts):
    """Some that are right, and perhaps a wrong one behind them."""

    def __init__(self, choose: Choose) -> None:
        super().__init__(tokens=(5, 1, 3, 9)[choose(4)], shortest=1, longest=1, sequences=(None, None, 3)[choose(3)])
        self.choose = choose

    def guess(self, request: Request, most: int) -> tuple[int, ...]:
        request.said = request.said or Said(self.tokens)
        right = alone(request.tokens, max(0, min(most, request.said.hope)), seed=request.seed)[len(request.tokens) :]
        good = self.choose(len(right) + 2)
        return tuple(token if i < good else token ^ 1 for i, token in enumerate(right))


class History(Rules):
    """What may happen: each thing as the source of choices says."""

    def __init__(self, choose: Choose) -> None:
        self.choose, self.faulty = choose, False
        size = (4, 1, 2, 8)[choose(4)]
        blocks = 1 + choose((20, 60, 60, 8)[choose(4)])
        host_blocks = (0, 1, 6, 60)[choose(4)]
        self.fault_rate = (0, 0, 0, 12)[choose(4)]
        pool = SpoilingPool(blocks, size, fails=self._fails)
        host = SpoilingPool(host_blocks, size, host=True, fails=self._fails) if host_blocks else None
        self.stateful = not choose(4)  # nothing can be forked, swapped or taken back; what is found counts where states are kept
        host = None if self.stateful else host
        swaps = (lambda request: True, lambda request: False, lambda request: bool(self.choose(2)))[choose(3)]
        self.worth = (0, 0, 1, 3)[choose(4)]
        self.scheduler = Scheduler(
            pool,
            max_num_batched_tokens=1 + choose((24, 64, 64, 8)[choose(4)]),
            max_num_seqs=(8, 6, 4, 3, 2, 1)[choose(6)],
            host=host,
            caching=bool(choose(2)),
            kept=(3, 1, 8)[choose(3)] if self.stateful else 0,
            priorities=bool(choose(2)),
            swaps=swaps,
            fair_tokens=(NEVER, 8, 3, NEVER, 5, 1)[choose(6)],
            turn=lambda back: self.worth * (back.end - back.start + back.copied),
            watermark=(0.0, 0.1, 0.3)[choose(3)],
            drafts=None if self.stateful or choose(3) else Guesses(choose),
        )
        if self.scheduler.store.kept is not None:
            self.scheduler.store.kept.worth = (1, 1, 5, 12)[choose(4)]
        self.capacity = blocks * size
        self.runner = FakeRunner(self.scheduler, stateful=self.stateful)
        self.alive = {}
        self.groups = []
        self.grammars = []
        self.prompts = [[(7 * i + 3 * doc) % 50 for i in range(64)] for doc in range(3)]
        self.waits = {}
        self.flight = None
        self.faulty = True

    def act(self) -> None:
        """Something happens."""
        if not self.alive:
            self.add()
        often = [self.add] * 8 + [self.ahead] * 6 + [self.step] * 7
        (*often, self.abort, self.abort, self.mishap, self.let_go, self.refused)[self.choose(len(often) + 5)]()

    def add(self) -> None:
        """A request of one or several completions; its prompt begins like others, or goes on from an earlier answer."""
        choose = self.choose
        beams = not self.stateful and not choose(8)
        max_tokens = 1 + choose(min(5 if beams else 16, self.capacity))
        prompt = self.prompts[choose(len(self.prompts))][: 1 + choose((8, 20, 40)[choose(3)])]
        prompt = (prompt + [1 + choose(3)] * choose(3))[: self.capacity + 1 - max_tokens]
        name = next(f"r{i}" for i in range(100) if not any(r.request_id == f"r{i}" for r in self.all))
        n, ends = (1, 1, 2, 4)[choose(4)], choose(3)
        scores = None if choose(8) else 0  # the prompt's log-probabilities: it is computed, whatever is found
        held = not beams and not choose(8)  # until its grammar is there
        least = 0 if choose(4) else 1 + choose(max_tokens)
        priority, salt, leader = choose(3), SALTS[max(0, choose(6) - 3)], None
        group = []
        for index in range(n):
            seed = 1000 * choose(3) + index
            answer = alone(prompt, max_tokens, seed=seed)
            last = {answer[len(prompt) + choose(max_tokens)]} if ends and not beams else set()
            eos, stops = (last, set()) if ends == 1 else (set(), last)
            more = {"seed": seed, "priority": priority, "salt": salt, "leader": leader, "beam": beams, "scores": scores}
            more |= {"eos": eos, "stops": tuple(stops), "least": 0 if beams else least}
            request = make_request(name, prompt, max_tokens, index=index, **more)
            leader = None if self.stateful else leader or request
            request.held = held
            self.scheduler.add(request)
            group.append(request)
            self.alive[request] = prompt[:] if beams else alone(prompt, max_tokens, last, seed, least)
        self.grammars += group if held else []
        if beams:
            self.groups.append(group)
        self.check()

    def step(self) -> None:
        """What is under way lands, and a whole step goes by."""
        self.land()
        self.ahead()
        self.land()

    def ahead(self) -> None:
        """A step is decided and computed before the tokens of the one before are known, unless some are guessed."""
        if self.scheduler.drafts is not None:
            self.land()
        plan = self.schedule()
        sampled = self.runner.run(plan)
        self.check_contents()
        self.land()
        self.flight = plan, sampled

    def land(self) -> None:
        if self.flight is not None:
            (plan, sampled), self.flight = self.flight, None
            for request in self.scheduler.commit(plan, sampled):
                assert request.finish_reason in ("stop", "length", "error")
            self.take_ended()
            self.decide()
            self.check()

    def abort(self) -> None:
        """One request, or one of its completions, at any time."""
        if not self.alive:
            return
        request = list(self.alive)[self.choose(len(self.alive))]
        one = self.choose(2)
        found = self.scheduler.abort(request.request_id, request.index if one else None)
        assert request in found and all(r.request_id == request.request_id for r in found)
        for r in found:
            assert r.finished and not r.blocks and not r.host
            assert (r.finish_reason == "abort") == (self.alive.pop(r, None) is not None)
        self.decide()
        self.check()

    def let_go(self) -> None:
        """Grammars are there: all of them, or those of one request."""
        names = {r.request_id for r in self.grammars}
        if names and self.choose(2):
            names = {sorted(names)[self.choose(len(names))]}
        for request in [r for r in self.grammars if r.request_id in names]:
            self.scheduler.hold(request, False)
            self.grammars.remove(request)

    def refused(self) -> None:
        """A request with the name of another one, or one that the whole pool could not hold: nothing changes."""
        taken = next((r.key for r in self.all), None)
        before = self.all, self.scheduler.pool.map(60)
        request = make_request("long", [1] * self.capacity, 2)
        if taken is not None and self.choose(2):
            request = make_request(taken[0], [1], 1, index=taken[1])
        try:
            self.scheduler.add(request)
        except RequestError:
            assert before == (self.all, self.scheduler.pool.map(60))
            self.check()
        else:
            raise AssertionError("what can never run was let in")

    def mishap(self) -> None:
        """A step fails when it is launched, or when it lands; somebody ends a request that runs; the prefix cache is reset."""
        what = self.choose(5)
        if what > 2:  # the prefix cache is reset
            self.scheduler.store.forget()
            self.check()
            return
        if what == 0 or not self.alive:
            running = [r for r in self.scheduler.running if not r.finished]
            if running:
                running[self.choose(len(running))].finish_reason = "error"
                self.take_ended(error=True)
                self.decide()
            return
        at_once = self.scheduler.drafts is not None  # no step is decided while another one is under way
        if what == 1:  # its copies are not carried out; what was under way before it lands
            if at_once:
                self.land()
            self.schedule()
            self.land()
        late = None
        if (
            what == 2 and not at_once and self.choose(2)
        ):  # what is under way fails, and the next one was launched already: it lands, too
            late = self.schedule()
            self.runner.run(late)
        self.flight = None
        for request in self.scheduler.recover():
            assert request.finished and not request.blocks and not request.host
            self.alive.pop(request, None)
        self.runner.spoil()
        if late is not None:
            assert not self.scheduler.commit(late, [0 if chunk.samples else None for chunk in late.chunks])
        self.decide()
        self.check()

    def decide(self) -> None:
        """Groups of beams all of which wait: each goes on from one of them, chosen anyhow, or the group ends."""
        for group in self.groups:
            group[:] = [r for r in group if r in self.alive]
            under_way = {chunk.request for chunk in self.flight[0].chunks} if self.flight else set()
            if not group or not all(r.held for r in group) or under_way & {*group}:
                continue
            parents = [group[self.choose(len(group))] for _ in group]
            told = [next_token([*p.tokens, i]) for i, p in enumerate(parents)]
            expected = [[*self.alive[p], token] for p, token in zip(parents, told)]
            self.scheduler.branch(list(zip(group, parents, told)))
            for request, tokens in zip(group, expected):
                self.alive[request] = tokens
                assert request.tokens == tokens and not request.held
                if len(tokens) == request.max_total:
                    request.finish_reason = "length"
                    del self.alive[request]

    def finish(self) -> None:
        """Nothing more arrives or fails: all end, right, in a bounded number of steps, and nothing leaks."""
        self.faulty = False
        self.waits.clear()
        while self.grammars:
            self.let_go()
        limit = 10 + sum((r.max_total + 4) * (r.max_total - len(r.tokens) + 2) for r in self.alive)
        while self.alive:
            self.ahead() if self.choose(2) else self.step()
            limit -= 1
            assert limit > 0, "a request does not end"
        self.land()
        self.scheduler.schedule()  # drops what was ended elsewhere
        self.check()
        host = self.scheduler.store.host
        assert not self.scheduler.has_work and self.scheduler.pool.used == 0 and (host is None or host.used == 0)

    def _fails(self) -> bool:
        return self.faulty and self.fault_rate > 0 and not self.choose(self.fault_rate)


def random_history(seed: int, actions: int = 20) -> History:
    draw = random.Random(seed).random
    history = History(lambda n: int(draw() * n))
    for _ in range(actions):
        history.act()
    history.finish()
    return history


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--actions", type=int, default=20)
    args = parser.parse_args()
    store.sha256 = PlainKey  # type: ignore[assignment,misc]
    begun = time.perf_counter()
    for seed in range(args.first, args.first + args.count):
        try:
            random_history(seed, args.actions)
        except Exception as error:
            error.add_note(f"seed {seed}")
            raise
        if (seed + 1 - args.first) % 10_000 == 0:
            print(f"{seed + 1 - args.first} histories, {time.perf_counter() - begun:.0f} s", flush=True)
    print(f"{args.count} histories from seed {args.first} on, {time.perf_counter() - begun:.1f} s: all right")


if __name__ == "__main__":
    main()
