"""Far too much for far too little, and the smallest of everything: all end, right, and nothing leaks."""

from __future__ import annotations

import random
from itertools import product
from typing import Any

import pytest

from appliance.core.params import RequestError
from tests.core.fake_model import alone, make_request, make_scheduler

KINDS: list[dict[str, Any]] = [
    {"caching": caching, "host": host, "fair_tokens": fair}
    for caching, host, fair in product((False, True), (0, 1, 16), (1024, 2))
]


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_500_requests_on_a_pool_of_8_blocks(options: dict[str, Any]) -> None:
    rng = random.Random(str(options))
    scheduler, runner = make_scheduler(blocks=8, budget=20, seqs=6, **options)
    shared = [rng.randrange(100) for _ in range(20)]
    expected, aborted = {}, set()
    for i in range(500):
        prompt = [*shared[: rng.randrange(20)], *(rng.randrange(100) for _ in range(rng.randrange(1, 6)))]
        answer = rng.randrange(1, 34 - len(prompt))
        request = make_request(str(i), prompt, answer)
        scheduler.add(request)
        expected[request] = alone(prompt, answer)
    steps = 0
    while scheduler.has_work:
        runner.step()
        steps += 1
        if steps % 10 == 0:
            scheduler.check()
        if rng.random() < 0.1:
            alive = [r for r in expected if not r.finished]
            aborted |= {r for victim in rng.sample(alive, min(len(alive), 1)) for r in scheduler.abort(victim.request_id)}
        assert steps < 20_000
    assert len(aborted) > 50
    for request, tokens in expected.items():
        assert request.finish_reason == ("abort" if request in aborted else "length")
        assert request in aborted or request.tokens == tokens
    scheduler.check()
    host = scheduler.store.host
    assert scheduler.pool.used == 0 and (host is None or host.used == 0) and not any(r.blocks or r.host for r in expected)
    assert scheduler.num_preemptions > 0 and (scheduler.num_swaps > 0) == bool(options["host"])
    assert (scheduler.prompt_tokens_found > 0) is options["caching"]


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_the_smallest_pools(options: dict[str, Any]) -> None:
    """Prompts that fill the pool, one-token requests, answers to the last slot: a pool of P tokens serves P + 1."""
    for blocks, size, budget, seqs in product((1, 2, 3), (1, 4), (1, 3, 64), (1, 4)):
        scheduler, runner = make_scheduler(blocks=blocks, size=size, budget=budget, seqs=seqs, **options)
        whole = blocks * size
        sizes = [(whole, 1), (1, 1), (1, whole), (whole, 1), (whole - whole // 2, 1 + whole // 2), (1, 1)] * 2
        requests = [make_request(str(i), range(length), answer) for i, (length, answer) in enumerate(sizes)]
        for request in requests:
            scheduler.add(request)
        with pytest.raises(RequestError, match=f"at most {whole + 1} tokens in all"):
            scheduler.add(make_request("big", range(whole), 2))
        runner.finish(limit=sum(2 * (length + answer) ** 2 for length, answer in sizes))
        assert [r.tokens for r in requests] == [alone(range(length), answer) for length, answer in sizes]
        assert scheduler.pool.used == 0


def test_one_token_requests_are_one_step_each() -> None:
    scheduler, runner = make_scheduler(blocks=8, seqs=8, caching=True)
    for i in range(64):
        scheduler.add(make_request(str(i), [i], 1))
    for _ in range(8):
        assert len(runner.step()[0].chunks) == 8
    assert not scheduler.has_work
