"""Beam search: vLLM's algorithm written out as it is, over whole forwards in float32, and transformers' own, are the oracles."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from appliance.core.messages import Event, TokenLogprob
from appliance.core.params import BeamSearchParams, RequestError, SamplingParams
from appliance.runtime.beam import BeamSearch, Row
from appliance.runtime.engine import Engine
from kernels.ops import KVCache, PagedBatch
from models.decoder import Decoder
from tests import warm
from tests.runtime.conftest import finish, submit
from tests.runtime.test_ahead import ahead, workload
from tests.runtime.test_engine import mixed

Load = Callable[..., Engine]
Found = list[tuple[list[int], float]]  # tokens of an answer, sum of their log-probabilities; the best first
Model = Callable[[list[int]], list[tuple[int, float]]]  # all tokens after these, the most likely first

TOKEN = 2 * 2 * 2 * 16 * 4  # bytes of a token: layers, k and v, heads, head size, float32


def beam_search(model: Model, prompt: list[int], width: int, steps: int, penalty: float, eos: int | None) -> Found:
    """As vLLM's: every step of it, to the end."""

    def score(item: tuple[list[int], float]) -> float:
        tokens, total = item
        return total / (len(tokens) - (tokens[-1] == eos)) ** penalty

    beams: Found = [(prompt, 0.0)]
    completed: Found = []
    for _ in range(steps):
        new: Found = []
        for tokens, total in beams:
            for token, logprob in model(tokens)[: 2 * width]:
                (completed if token == eos else new).append(([*tokens, token], total + logprob))
        beams = sorted(new, key=lambda item: item[1], reverse=True)[:width]
    best = sorted([*completed, *beams], key=score, reverse=True)[:width]
    return [(tokens[len(prompt) :], total) for tokens, total in best]


def whole(decoder: Decoder) -> Model:
    """The model of an engine, without cache and blocks: a forward of all tokens for each question."""
    spec = decoder.spec

    def rows(tokens: list[int]) -> list[tuple[int, float]]:
        n = len(tokens)
        shape = (1, n, spec.kv_heads, spec.head_dim)
        caches = [KVCache(torch.zeros(shape), torch.zeros(shape)) for _ in range(spec.layers)]
        batch = PagedBatch(
            positions=torch.arange(n),
            slots=torch.arange(n),
            query_starts=torch.tensor([0, n], dtype=torch.int32),
            seq_lens=torch.tensor([n], dtype=torch.int32),
            block_tables=torch.zeros(1, 1, dtype=torch.int32),
            max_query=n,
            max_seq=n,
        )
        hidden = decoder.bind(caches, max_tokens=n)(torch.tensor(tokens), batch)
        logits = decoder.logits(hidden[-1:], torch.empty(1, spec.vocab))[0]
        values, order = logits.log_softmax(0).sort(descending=True, stable=True)
        return list(zip(order.tolist(), values.tolist(), strict=True))

    return rows


def ask(engine: Engine, prompt: Sequence[int], width: int, steps: int, *others, penalty: float = 1.0, **more: object) -> Found:
    params = {"n": width, "use_beam_search": True, "length_penalty": penalty, "max_tokens": steps, "ignore_eos": False, **more}
    engine.submit(submit("beams", prompt, **params))
    for one in others:
        engine.submit(one)
    return found(finish(engine), width)


def found(events: dict[tuple[str, int], list[Event]], width: int) -> Found:
    news = [events["beams", i] for i in range(width)]
    assert ("beams", width) not in events and all(len(one) == 1 for one in news)
    out = []
    for (event,) in news:
        assert event.logprobs is not None and [one.token_id for one in event.logprobs] == list(event.token_ids)
        out.append((list(event.token_ids), sum(one.logprob for one in event.logprobs)))
    return out


def same(a: Found, b: Found) -> bool:
    return [t for t, _ in a] == [t for t, _ in b] and all(abs(x - y) < 1e-4 for (_, x), (_, y) in zip(a, b, strict=True))


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return [random.Random(1000 * seed + length).randrange(3, 256) for _ in range(length)]


def with_end(engine: Engine, eos: int) -> None:
    engine.info = replace(engine.info, eos_token_ids=(eos,))


@pytest.mark.parametrize(("width", "steps", "penalty"), [(1, 7, 1.0), (2, 20, 0.0), (3, 9, 1.0), (4, 18, -1.0), (5, 6, 2.0)])
def test_equals_vllms_algorithm(load: Load, width: int, steps: int, penalty: float) -> None:
    """With an end of text that comes up in the search, and without; ``steps`` cross a border between blocks."""
    engine = load()
    model = whole(engine.runner.decoder)
    for length in (1, 16, 29):
        prompt = prompt_of(length, width)
        with_end(engine, 0)
        free = ask(engine, prompt, width, steps, penalty=penalty, ignore_eos=True)
        assert same(free, beam_search(model, prompt, width, steps, penalty, None))
        end = free[-1][0][steps // 2]  # likely somewhere, so texts of different lengths compete
        with_end(engine, end)
        ended = ask(engine, prompt, width, steps, penalty=penalty)
        assert same(ended, beam_search(model, prompt, width, steps, penalty, end))
        assert any(tokens[-1] == end for tokens, _ in ended) or penalty >= 1


@pytest.mark.parametrize("caching", [True, False], ids=["caching", "plain"])
@pytest.mark.parametrize("giving_way", ["swap", "recompute"])
@pytest.mark.parametrize("blocks", [11, 6])
def test_the_same_in_any_pool(load: Load, caching: bool, giving_way: str, blocks: int) -> None:
    """Among others, in pools where beams give way to one another: in six blocks only one of four can be at a time."""
    prompt = prompt_of(40, 7)
    expected = ask(load(), prompt, 4, 50, ignore_eos=True)
    swap = 1 / 1024 if giving_way == "swap" else 0.0  # GiB
    engine = load(
        max_model_len=96,
        kv_cache_memory_bytes=TOKEN * 16 * blocks,
        enable_prefix_caching=caching,
        swap_space=swap,
        preemption_mode=giving_way,
    )
    assert engine.scheduler.pool.num_blocks == blocks
    others = [submit(f"o{i}", prompt_of(20 + i), max_tokens=30) for i in range(3)]
    assert same(ask(engine, prompt, 4, 50, *others, ignore_eos=True), expected)
    stats = engine.stats()
    assert stats.preemptions > 0 and (stats.swaps > 0) == (giving_way == "swap")


@pytest.mark.parametrize("blocks", [6, 11])
def test_beams_keep_their_place_in_line(load: Load, blocks: int) -> None:
    """They give way to one another at every token, and yet they end before those that came after them."""
    engine = load(max_model_len=96, kv_cache_memory_bytes=TOKEN * 16 * blocks)
    engine.submit(submit("first", prompt_of(30, 1), max_tokens=20))
    engine.submit(submit("beams", prompt_of(40, 7), n=4, use_beam_search=True, max_tokens=30))
    for i in range(14):
        engine.submit(submit(f"o{i}", prompt_of(20 + i), max_tokens=30))
    order = []
    while engine.has_work:
        order += [event.request_id for event in engine.step() if event.finish_reason and event.index == 0]
    assert len(order) == 16 and order.index("beams") <= 3 and engine.stats().preemptions > 0


def test_more_beams_than_seats(load: Load) -> None:
    prompt = prompt_of(33)
    engine = load(max_num_seqs=2)
    assert same(ask(engine, prompt, 5, 12), ask(load(), prompt, 5, 12))


def test_beams_share_blocks(load: Load) -> None:
    """Six beams after a prompt of ten blocks: they hold it once, but for its last block, which all compute the end of."""
    engine = load()
    engine.submit(submit("beams", prompt_of(160), n=6, use_beam_search=True, max_tokens=16))
    most = 0
    while engine.has_work:
        engine.step()
        engine.check()
        most = max(most, engine.scheduler.pool.used)
    assert 10 < most <= 10 + 6 and engine.stats().copied_blocks["copy"] > 0


def test_a_search_ends_when_nothing_better_can_come(load: Load) -> None:
    engine = load()
    prompt = prompt_of(12)
    (end, *_), _ = ask(engine, prompt, 1, 1, ignore_eos=True)[0]
    with_end(engine, end)
    steps = engine.stats().steps
    got = ask(engine, prompt, 1, 200, penalty=0.0)
    assert got[0][0] == [end] and engine.stats().steps - steps == 1
    assert same(got, beam_search(whole(engine.runner.decoder), prompt, 1, 12, 0.0, end))


def test_events(load: Load) -> None:
    engine = load()
    prompt = prompt_of(20)
    engine.submit(
        submit("beams", prompt, n=2, use_beam_search=True, max_tokens=3, logprobs=1, prompt_logprobs=0, ignore_eos=True)
    )
    events = finish(engine)
    first, second = (events["beams", i][0] for i in range(2))
    assert first.finish_reason == second.finish_reason == "length" and first.logprobs is not None
    assert all(len(one.top) == 1 and one.rank >= 1 for one in first.logprobs)
    assert all((one.rank == 1) == (one.top[0][0] == one.token_id) for one in first.logprobs)
    assert first.prompt_logprobs is not None and len(first.prompt_logprobs) == 20 and second.prompt_logprobs is None
    assert not engine._scores and not engine._beams
    again = ask(engine, prompt, 2, 3, ignore_eos=True)
    assert [t for t, _ in again] == [list(first.token_ids), list(second.token_ids)]
    assert engine.stats().finished == {"length": 4}


def test_abort_and_errors_end_all_beams(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = load()
    beams = submit("beams", prompt_of(20), n=3, use_beam_search=True, max_tokens=30)
    engine.submit(beams)
    for _ in range(4):
        engine.step()
    events = engine.abort("beams", 1)
    assert sorted(e.index for e in events) == [0, 1, 2] and {e.finish_reason for e in events} == {"abort"}
    assert engine.scheduler.pool.used == 0 and not engine.has_work and not engine._beams
    logits = Decoder.logits

    def spoilt(self: Decoder, hidden: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        logits(self, hidden, out)[-1] = float("nan")
        return out

    for broken in (spoilt, None):
        engine.submit(beams)
        for _ in range(4):
            engine.step()
        with monkeypatch.context() as patch:
            if broken:
                patch.setattr(Decoder, "logits", broken)
            else:
                patch.setattr(engine.runner, "launch", lambda *_: (_ for _ in ()).throw(RuntimeError("no memory")))
            events = engine.step()
        assert sorted(e.index for e in events) == [0, 1, 2] and {e.finish_reason for e in events} == {"error"}
        assert engine.scheduler.pool.used == 0 and not engine.has_work and not engine._beams
    assert ask(engine, prompt_of(20), 3, 5)


def test_beams_among_others(load: Load) -> None:
    engine = load(max_num_batched_tokens=33)
    alone = {one.request_id: finish_one(load(), one) for one in mixed(5, 6)}
    expected = ask(load(), prompt_of(50), 3, 15)
    for one in mixed(5, 6):
        engine.submit(one)
    engine.submit(submit("beams", prompt_of(50), n=3, use_beam_search=True, max_tokens=15, ignore_eos=False))
    events = finish(engine)
    assert same(found(events, 3), expected)
    assert {name: [t for e in events[name, 0] for t in e.token_ids] for name in alone} == alone


@pytest.mark.parametrize("blocks", [400, 8])
def test_on_a_device_that_runs_ahead(load: Load, blocks: int) -> None:
    """Steps in which beams sample land before the next is decided; those of others need not."""
    options = {"max_num_seqs": 7, "max_num_batched_tokens": 64, "max_model_len": 96, "kv_cache_memory_bytes": TOKEN * 16 * blocks}
    expected = ask(load(**options), prompt_of(40), 3, 20, *workload(1, 10))
    engine = ahead(load(**options))
    assert same(ask(engine, prompt_of(40), 3, 20, *workload(1, 10)), expected)
    assert (engine.stats().preemptions > 0) == (blocks == 8)


def finish_one(engine: Engine, one) -> list[int]:
    engine.submit(one)
    return [t for e in finish(engine)[one.request_id, 0] for t in e.token_ids]


@pytest.mark.parametrize(
    ("params", "param"),
    [
        ({"n": 0}, "n"),
        ({"n": 256}, "n"),  # the vocabulary
        ({"n": 257}, "n"),
        ({"best_of": 3}, "best_of"),
        ({"stop_token_ids": [3]}, "stop_token_ids"),
        ({"stop": "x"}, "stop"),
        ({"repetition_penalty": 1.1}, "repetition_penalty"),
        ({"logit_bias": {3: 1.0}}, "logit_bias"),
        ({"min_tokens": 2}, "min_tokens"),
        ({"length_penalty": math.inf}, "length_penalty"),
        ({"length_penalty": 11}, "length_penalty"),
        ({"max_tokens": 300}, "max_tokens"),
    ],
)
def test_refused(load: Load, params: dict, param: str) -> None:
    engine = load()
    with pytest.raises(RequestError) as error:
        engine.submit(submit("bad", [3, 4], **{"n": 2, "use_beam_search": True, **params}))
    assert error.value.param == param and not engine.has_work and not engine._beams


def test_params() -> None:
    assert BeamSearchParams(3, 7, length_penalty=0.5).sampling() == SamplingParams(
        n=3, use_beam_search=True, max_tokens=7, temperature=0.0, length_penalty=0.5
    )
    with pytest.raises(RequestError, match="beam_width must be an integer at least 1"):
        BeamSearchParams(0, 7)


def row(pairs: list[tuple[int, float]]) -> Row:
    return Row(np.array([token for token, _ in pairs]), np.array([logprob for _, logprob in pairs]))


@settings(max_examples=300)
@given(
    seed=st.integers(0, 10**9),
    vocab=st.integers(4, 9),
    width=st.integers(1, 4),
    steps=st.integers(1, 7),
    penalty=st.sampled_from([0.0, 1.0, -1.0, 0.3, 3.0]),
    coarse=st.booleans(),
)
def test_decisions_are_vllms(seed: int, vocab: int, width: int, steps: int, penalty: float, coarse: bool) -> None:
    """Over a random table, often with equal sums: the same answers, although the search may end before."""
    rng = random.Random(seed)
    vocab = max(vocab, width + 1)
    table: dict[tuple[int, ...], list[tuple[int, float]]] = {}

    def model(tokens: list[int]) -> list[tuple[int, float]]:
        key = tuple(tokens)
        if key not in table:
            weights = [rng.randint(1, 3) if coarse else rng.random() ** 3 + 1e-3 for _ in range(vocab)]
            total = sum(weights)
            table[key] = sorted(((t, math.log(w / total)) for t, w in enumerate(weights)), key=lambda item: -item[1])
        return table[key]

    prompt = [rng.randrange(vocab) for _ in range(rng.randint(1, 5))]
    search = BeamSearch(width, prompt_len=len(prompt), max_tokens=steps, length_penalty=penalty, eos=frozenset([0]))
    while not search.over:
        rows = [row(model([*prompt, *(one.token_id for one in beam.scored)])) for beam in search.beams]
        old = search.beams
        assert [old[i] for i in search.step(rows)] == [beam.parent for beam in search.beams]
    got = [([one.token_id for one in beam.scored], beam.cum_logprob) for beam in search.best()]
    assert got == beam_search(model, prompt, width, steps, penalty, 0)


@pytest.mark.parametrize("shown", [0, 3, -1])
def test_a_step_of_many_beams_is_one_of_lists(shown: int) -> None:
    """What candidates are and which of them go on, written out token by token: equal to the bit, with many equal sums."""
    rng, width, eos = random.Random(shown), 64, frozenset({5, 17, 90})
    search = BeamSearch(width, prompt_len=3, max_tokens=9, length_penalty=0.7, eos=eos)
    ended: list[tuple[float, list[int]]] = []
    while not search.over:
        tables = []
        for _ in search.beams:
            tokens = rng.sample(range(300), rng.choice([90, 128, 129, 300]))
            values = [-rng.choice([0.25, 1 / 3, rng.random()]) * rng.choice([1, 2, 40]) for _ in tokens]
            tables.append(list(zip(tokens, sorted(values, reverse=True), strict=True)))
        candidates = [
            (beam.cum_logprob + logprob, i, place)
            for i, (beam, table) in enumerate(zip(search.beams, tables, strict=True))
            for place, (_, logprob) in enumerate(table[: 2 * width])
        ]
        ends = [one for one in candidates if tables[one[1]][one[2]][0] in eos]
        others = [one for one in candidates if tables[one[1]][one[2]][0] not in eos]
        best = sorted(others, key=lambda one: one[0], reverse=True)[:width]
        texts = [[one.token_id for one in beam.scored] for beam in search.beams]
        ended += [(total, [*texts[i], tables[i][place][0]]) for total, i, place in ends]
        ended = sorted(ended, key=lambda one: one[0] / (3 + len(one[1]) - 1) ** 0.7, reverse=True)[:width]
        assert search.step([row(table) for table in tables], shown) == [i for _, i, _ in best]
        assert [(beam.cum_logprob, [one.token_id for one in beam.scored]) for beam in search.ended] == ended
        for (total, i, place), beam in zip(best, search.beams, strict=True):
            token, logprob = tables[i][place]
            rank = 1 + sum(other > logprob for _, other in tables[i])
            top = tuple(tables[i] if shown == -1 else tables[i][:shown])
            assert (beam.cum_logprob, beam.last) == (total, TokenLogprob(token, logprob, rank, top)) and not beam.ended


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict]]:
    """A small random model, and what transformers' beam search finds with it (a process of its own: see tests/models)."""
    folder = tmp_path_factory.mktemp("beams")
    done = warm.run("-c", (Path(__file__).parent / "beam_oracle.py").read_text(), str(folder), cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "model", json.loads((folder / "expected.json").read_text())


def test_against_transformers(theirs: tuple[Path, list[dict]], load: Load) -> None:
    """Without an end of text: the same. With one: theirs drops hypotheses that vLLM keeps, so ours are as good or better."""
    folder, cases = theirs
    engine = load(model=str(folder), max_model_len=64)
    better = 0
    for case in cases:
        eos, width = case["eos"], case["width"]
        with_end(engine, 0 if eos is None else eos)
        ours = ask(engine, case["prompt"], width, case["steps"], penalty=0.0, ignore_eos=eos is None)
        expected = [(tokens, score) for tokens, score in zip(case["tokens"], case["scores"], strict=True)]
        if eos is None:
            assert same(ours, expected)
            continue
        assert all(mine >= their - 1e-4 for (_, mine), (_, their) in zip(ours, expected, strict=True))
        sums = {tuple(tokens): total for tokens, total in ours}
        for tokens, score in expected:  # what ours leaves out is no better than the last that it has
            assert abs(sums[tuple(tokens)] - score) < 1e-4 if tuple(tokens) in sums else score < ours[-1][1] + 1e-4
        better += not same(ours, expected)
    assert better < sum(case["eos"] is not None for case in cases), "some are the very same"
