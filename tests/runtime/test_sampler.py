"""The sampler against transformers' logits warpers, against the published formulas, and against itself in other company."""

import heapq
import math
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from appliance.core.door import make_requests
from appliance.core.messages import Submit, TokenLogprob
from appliance.core.params import SamplingParams
from appliance.core.request import Request
from appliance.runtime import penalties, sampler
from appliance.runtime.sampler import sample, token_logprobs
from kernels import reference
from tests import warm
from tests.server.fake import info

INF = math.inf


def make(params=None, *, prompt=(1, 2), output=(), seed=0, eos=(), **kwargs):
    return Request(
        request_id="r",
        index=0,
        tokens=[*prompt, *output],
        prompt_len=len(prompt),
        params=params or SamplingParams(**kwargs),
        max_total=1000,
        seed=seed,
        arrival=0.0,
        eos_token_ids=frozenset(eos),
    )


def greedy(row, **kwargs):
    one = sample(torch.tensor([row]), [make(temperature=0.0, **kwargs)])[0]
    assert one.error is None
    return one.token


def random_logits(rows, vocab, seed=0, scale=3.0):
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale


ORACLE = """
import sys, torch
from transformers.generation import logits_process as lp
out = []
for case in torch.load(sys.argv[1]):
    scores, ids = case["logits"][None].clone(), torch.tensor([case["tokens"]])
    steps = [lp.RepetitionPenaltyLogitsProcessor(case["repetition_penalty"]), lp.TemperatureLogitsWarper(case["temperature"])]
    steps += [lp.MinPLogitsWarper(case["min_p"])] if case["min_p"] else []
    steps += [lp.TopKLogitsWarper(case["top_k"])] if case["top_k"] else []
    steps += [lp.TopPLogitsWarper(case["top_p"])] if case["top_p"] < 1 else []
    for step in steps:
        scores = step(ids, scores)
    out.append(scores[0].double().softmax(-1))
torch.save(out, sys.argv[2])
"""


def test_the_draw_is_the_inverse_cdf_of_transformers_distribution(tmp_path, monkeypatch):
    """For a fan of uniform numbers every pick is the token in whose interval of the oracle's distribution the number lies."""
    settings_ = [
        {"temperature": t, "top_k": k, "top_p": p, "min_p": m, "repetition_penalty": r}
        for t, k, p, m, r in [
            (1.0, 0, 1.0, 0.0, 1.0),
            (0.7, 0, 1.0, 0.0, 1.0),
            (1.5, 40, 1.0, 0.0, 1.0),
            (1.0, 1, 1.0, 0.0, 1.0),
            (1.0, 0, 0.9, 0.0, 1.0),
            (2.0, 0, 0.99, 0.0, 1.0),
            (1.0, 0, 0.01, 0.0, 1.0),
            (1.0, 0, 1.0, 0.1, 1.0),
            (0.8, 50, 0.95, 0.02, 1.0),
            (1.0, 0, 1.0, 0.0, 1.3),
            (1.0, 0, 1.0, 0.0, 0.8),
            (0.6, 20, 0.8, 0.05, 1.1),
            (5.0, 900, 0.5, 0.0, 1.2),
            (0.3, 7, 0.999, 0.3, 1.0),
        ]
    ]
    cases = []
    for i, options in enumerate(settings_):
        vocab = [1000, 997, 131, 5000][i % 4]
        tokens = torch.randint(vocab, (20,), generator=torch.Generator().manual_seed(i)).tolist()
        cases.append({"logits": random_logits(1, vocab, i)[0], "tokens": tokens, **options})
    torch.save(cases, tmp_path / "cases.pt")
    done = warm.run("-c", ORACLE, str(tmp_path / "cases.pt"), str(tmp_path / "out.pt"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for case, options, probs in zip(cases, settings_, torch.load(tmp_path / "out.pt"), strict=True):
        edges = np.cumsum(probs.numpy())
        for u in np.linspace(0, 1, 211)[:-1] + 1e-4:
            monkeypatch.setattr(sampler, "uniform", lambda seed, position, u=u: u)
            request = make(prompt=case["tokens"][:10], output=case["tokens"][10:], **options)
            pick = sample(case["logits"][None].clone(), [request])[0].token
            low = edges[pick - 1] if pick else 0.0
            assert low - 1e-5 <= u <= edges[pick] + 1e-5, (options, u)
            assert probs[pick] > 0, options


def test_an_answer_does_not_depend_on_the_batch():
    vocab, rng = 3001, np.random.default_rng(3)
    choices = [
        {},
        {"temperature": 0.0},
        {"top_p": 0.9},
        {"top_k": 30, "logprobs": 3},
        {"min_p": 0.1},
        {"temperature": 1.7, "top_p": 0.99},
        {"presence_penalty": 1.0, "frequency_penalty": 0.3},
        {"repetition_penalty": 1.4, "top_p": 0.8},
        {"temperature": 0.0, "logprobs": 0},
        {"logit_bias": {5: 20.0}},
        {"allowed_token_ids": [1, 5, 9], "logprobs": 2},
        {"temperature": 0.0, "allowed_token_ids": [7]},
    ]
    requests = [make(output=rng.integers(vocab, size=i).tolist(), seed=i * 31, **choices[i % len(choices)]) for i in range(36)]
    logits = random_logits(36, vocab, 5)
    alone = [sample(logits[i : i + 1].clone(), [r])[0] for i, r in enumerate(requests)]
    for _ in range(3):
        some = rng.permutation(36)[: rng.integers(2, 37)]
        together = sample(logits[torch.from_numpy(some)].clone(), [requests[i] for i in some])
        assert together == [alone[i] for i in some]


def test_frequencies_match_the_probabilities():
    """Chi-square over 20 000 positions of one seed: 15 degrees of freedom, p = 0.001 lies at 37.7."""
    row = random_logits(1, 16, 2, 1.0)
    counts, request = np.zeros(16), make(seed=1234)
    for _ in range(20_000):
        token = sample(row.clone(), [request])[0].token
        counts[token] += 1
        request.tokens.append(token)
    expected = row[0].double().softmax(-1).numpy() * 20_000
    assert ((counts - expected) ** 2 / expected).sum() < 37.7


def test_uniform_is_in_its_range_and_fair():
    values = np.array([sampler.uniform(seed, position) for seed in range(50) for position in range(400)])
    assert values.min() >= 0 and values.max() < 1
    counts = np.histogram(values, 20, (0, 1))[0]
    assert ((counts - 1000) ** 2 / 1000).sum() < 43.8  # chi-square, 19 degrees of freedom, p = 0.001
    assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 0.03


def test_same_seed_same_draw_other_position_other_draw():
    row = torch.zeros(1, 1000)
    first = [sample(row.clone(), [make(seed=9, output=[0] * n)])[0].token for n in range(8)]
    assert first == [sample(row.clone(), [make(seed=9, output=[0] * n)])[0].token for n in range(8)]
    assert len(set(first)) > 5


def test_greedy_takes_the_lowest_of_equal_logits():
    assert greedy([0.0, 3.0, 3.0, 1.0]) == 1
    assert greedy([0.0, 3.0, 3.0, 1.0], logprobs=1) == 1


def test_greedy_rows_take_the_given_argmax_in_one_call():
    logits = torch.tensor([[0.0, 2.0, 2.0], [1.0, math.nan, 0.0], [-INF, -INF, -INF], [3.0, 1.0, 2.0], [0.0, INF, 1.0]])
    seen = []

    def argmax(rows):
        seen.append(rows.clone())
        return reference.argmax(rows)

    requests = [make(temperature=0.0) for _ in range(5)]
    requests[3] = make(temperature=0.0, logit_bias={2: 5.0})  # drawn by itself, from changed logits
    expected = [s.token for s in sample(logits.clone(), requests)]
    found = sample(logits.clone(), requests, argmax=argmax)
    assert [s.token for s in found] == expected == [1, -1, -1, 2, -1]
    assert len(seen) == 1 and torch.equal(seen[0].nan_to_num(9.0), logits.nan_to_num(9.0))
    sample(random_logits(2, 5), [make(seed=1), make(seed=2)], argmax=argmax)
    assert len(seen) == 1, "rows that are drawn need the largest value only"


def test_penalties_by_the_published_formulas():
    row = random_logits(1, 50, 7)
    prompt, output = [3, 4, 3], [4, 5, 5, 6]
    request = make(
        prompt=prompt, output=output, repetition_penalty=1.5, presence_penalty=0.5, frequency_penalty=0.25, temperature=0.0
    )
    expected = row[0].clone()
    for token in {*prompt, *output}:
        expected[token] = expected[token] / 1.5 if expected[token] > 0 else expected[token] * 1.5
    for token in set(output):
        expected[token] -= 0.25 * output.count(token) + 0.5
    sample(row, [request])
    torch.testing.assert_close(row[0], expected)


def test_masks_and_bias():
    row = [5.0, 4.0, 3.0, 2.0, 1.0]
    assert greedy(row, allowed_token_ids=[2, 4]) == 2
    assert greedy(row, logit_bias={3: 10.0}) == 3
    assert greedy(row, logit_bias={0: -100.0}) == 1
    assert greedy(row, allowed_token_ids=[2, 4], logit_bias={4: 10.0, 0: 90.0}) == 4


def test_a_step_pays_once_for_ids_that_come_often():
    params = SamplingParams(allowed_token_ids=[4, 2] * 100_000, stop_token_ids=[7, 3, 7])
    assert params.allowed_token_ids == (4, 2) and params.stop_token_ids == (7, 3)


class Read(tuple):
    """Knows how often it was gone through, and is never searched."""

    times = 0

    def __iter__(self):
        self.times += 1
        return super().__iter__()

    def __contains__(self, value):
        raise AssertionError("searched")


def test_lists_are_gone_through_once_and_not_for_each_token():
    """Of all completions of a request together: some lists may be as long as the vocabulary."""
    params = SamplingParams(temperature=0.0, ignore_eos=True, min_tokens=3, bad_words_token_ids=((3, 2), (4,)))
    lists = {
        "stop_token_ids": Read((7, 9)),
        "allowed_token_ids": Read((0, 2, 3, 4, 7)),
        "bad_words_token_ids": Read(params.bad_words_token_ids),
    }
    for name, values in lists.items():
        setattr(params, name, values)
    params.logit_bias = {0: -1.0, 7: 2.0}
    one, other = (make(params) for _ in range(2))
    other.made = one.made
    for request in (one, other):
        while not request.finished:
            found = sample(torch.tensor([[5.0, 1.0, 4.5, 4.2, 9.0, 0.0, 0.0, 4.0, 0.0, 0.0]]), [request])[0]
            request.append(found.token)
        assert (request.tokens[2:], request.stop_reason) == ([2, 2, 2, 7], 7)
    assert [values.times for values in lists.values()] == [2, 1, 1]  # the first: for min_tokens, and behind it


@pytest.mark.parametrize("asked", [{"n": 9}, {"best_of": 9}, {"n": 9, "use_beam_search": True, "prompt_logprobs": 2}])
def test_completions_of_a_request_have_one_copy_of_what_it_asks(asked):
    submit = Submit("r", (5, 6), SamplingParams(**asked), 0.0)
    first, second, *others = make_requests(submit, info(), fallback_seed=1)
    assert all(one.params is second.params and one.made is first.made for one in (second, *others))
    assert first.params.prompt_logprobs == asked.get("prompt_logprobs") and second.params.prompt_logprobs is None
    assert first.params.logprobs == second.params.logprobs == {"best_of": 0, "prompt_logprobs": 18}.get([*asked][-1])


@settings(max_examples=200)
@given(st.integers(0, 10**9), st.integers(5, 40))
def test_masks_and_biases_are_those_of_loops(seed, vocab):
    """Whatever lies beyond the vocabulary, and whatever comes often."""
    rng = np.random.default_rng(seed)
    beyond = vocab + 4
    words = tuple(tuple(map(int, rng.integers(0, 3, rng.integers(1, 4)))) for _ in range(6)) + ((vocab + 1,),)
    params = SamplingParams(
        stop_token_ids=rng.integers(0, beyond, 5).tolist(),
        min_tokens=int(rng.integers(0, 4)),
        allowed_token_ids=rng.integers(0, beyond, 2 * vocab).tolist() if rng.random() < 0.5 else None,
        logit_bias={int(token): float(rng.normal()) for token in rng.integers(0, beyond, 6)},
        bad_words_token_ids=words,
        bad_words=("made of tokens",),
    )
    request = make(params, prompt=(0, 1), eos=(3, vocab + 2))
    for _ in range(6):
        row = rng.normal(size=vocab).astype(np.float32)
        expected = row.copy()
        output = request.tokens[2:]
        for token in range(vocab):
            banned = params.allowed_token_ids is not None and token not in params.allowed_token_ids
            banned |= any(word[-1] == token and output[len(output) - len(word) + 1 :] == [*word[:-1]] for word in words)
            banned |= len(output) < params.min_tokens and (token == 3 or token in params.stop_token_ids)
            expected[token] = -INF if banned else expected[token] + np.float32(params.logit_bias.get(token, 0.0))
        found = torch.from_numpy(row)
        penalties.adjust(found, request)
        assert found.tolist() == expected.tolist()
        request.tokens.append(int(rng.integers(0, 3)))


def test_min_tokens_holds_back_the_end_and_the_stop_ids():
    row = [5.0, 4.0, 3.0, 2.0]
    stop = {"min_tokens": 2, "stop_token_ids": [1, 99]}
    assert greedy(row, eos=[0], **stop) == 2
    assert greedy(row, eos=[0], output=[3], **stop) == 2
    assert greedy(row, eos=[0], output=[3, 3], **stop) == 0
    assert greedy(row, ignore_eos=True, **stop) == 0  # ignore_eos: the engine gives no end ids, the stop ids are still held back
    assert greedy([1.0, 4.0], ignore_eos=True, **stop) == 0


def test_bad_words_are_cut_at_their_last_token_within_the_output():
    row = [5.0, 4.0, 3.0, 2.0]
    params = SamplingParams(temperature=0.0, bad_words_token_ids=((3, 2, 0), (1,)))
    pick = lambda prompt, output: sample(torch.tensor([row]), [make(params, prompt=prompt, output=output)])[0].token
    assert pick([1], []) == 0
    assert pick([1], [3, 2]) == 2
    assert pick([1], [2, 3]) == 0
    assert pick([3], [2]) == 0  # the prompt is not the answer's


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_that_cannot_be_drawn_from_ends_its_own_request_only(temperature):
    logits = torch.zeros(5, 6)
    logits[1, 3], logits[2, 4], logits[3] = math.nan, INF, -INF
    plain = SamplingParams(temperature=temperature)
    masked = SamplingParams(temperature=temperature, allowed_token_ids=[2], bad_words_token_ids=((2,),))
    out = sample(logits, [make(plain), make(plain), make(plain), make(plain), make(masked)])
    assert out[0].error is None and 0 <= out[0].token < 6
    assert [o.token for o in out[1:]] == [-1] * 4
    assert out[1].error == out[2].error == "the model produced logits that are not finite numbers"
    assert out[3].error == out[4].error == "every token is ruled out (by allowed_token_ids, bad_words or min_tokens)"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_penalty_beyond_all_numbers_is_an_error(temperature):
    request = make(prompt=[0], temperature=temperature, repetition_penalty=1e-42)
    one = sample(torch.tensor([[1.0, 2.0]]), [request])[0]
    assert one.token == -1 and one.error is not None and "repetition_penalty 1e-42 makes a logit infinite" in one.error


def test_logprobs_are_those_of_the_untouched_logits():
    logits = random_logits(2, 300, 8)
    want = logits.double().log_softmax(-1)
    requests = [make(temperature=3.0, logprobs=4, logit_bias={17: 100.0}), make(temperature=0.0, logprobs=0)]
    first, second = sample(logits.clone(), requests)
    assert first.token == 17 and first.logprob is not None and second.logprob is not None
    assert first.logprob.logprob == pytest.approx(want[0, 17].item(), abs=1e-5)
    assert first.logprob.rank == 1 + int((want[0] > want[0, 17]).sum())
    assert [t for t, _ in first.logprob.top] == want[0].topk(4).indices.tolist()
    assert second.logprob.top == () and second.logprob.rank == 1


def test_token_logprobs():
    logits = random_logits(6, 101, 9)
    want = logits.double().log_softmax(-1)
    ids = [0, 100, 5, 5, 7, 8]
    several = [(row, k, one) for k in (0, 1, 3, -1, 500, 2) for row, one in enumerate(token_logprobs(logits, ids, k))]
    for row, k, one in several:
        token, size = ids[row], 101 if k in (-1, 500) else k
        assert one.token_id == token and len(one.top) == size
        assert one.logprob == pytest.approx(want[row, token].item(), abs=1e-5)
        values, order = want[row].sort(descending=True)
        assert one.rank == order.tolist().index(token) + 1
        assert [t for t, _ in one.top] == order[:size].tolist()
        assert [p for _, p in one.top] == pytest.approx(values[:size].tolist(), abs=1e-5)


def test_equal_logits_share_a_rank_and_come_by_id():
    one = token_logprobs(torch.tensor([[1.0, 2.0, 2.0, 2.0, 0.0]]), [2], 2)[0]
    assert one.rank == 1 and [t for t, _ in one.top] == [1, 2]


@pytest.mark.parametrize("size", [1, 7, 640, 40_000])
def test_rows_together_are_rows_alone(size):
    """To the bit, ties and tokens that are ruled out among them."""
    for rng_seed, coarse in ((10, 1.0), (11, 1e-6)):
        logits = (random_logits(9, size, rng_seed) / coarse).round() * coarse
        logits[1] = logits[1, 0]
        logits[2, : size // 2] = -INF
        logits[3, 1:] = -INF
        ids = [(7919 * row) % size for row in range(9)]
        for top in (1, 5) if size > 640 else (0, 1, 5, 513, -1):
            alone = [token_logprobs(row[None].clone(), [token], top)[0] for row, token in zip(logits, ids, strict=True)]
            assert repr(token_logprobs(logits, ids, top)) == repr(alone)
            plain = [
                one_by_one(row, token, size if top == -1 else min(top, size)) for row, token in zip(logits, ids, strict=True)
            ]
            assert repr(alone) == repr(plain)


def one_by_one(row, token, k):
    """By its definition, the largest ones found by looking at all of them."""
    norm = row.logsumexp(0)
    order = heapq.nsmallest(k, ((-value, i) for i, value in enumerate(row.tolist()) if value > -INF))
    top = tuple((i, (row[i] - norm).item()) for _, i in order)
    return TokenLogprob(token, (row[token] - norm).item(), 1 + int((row > row[token]).sum()), top)


HUGE = 2.0**127
numbers = st.floats(-HUGE, HUGE, width=32) | st.floats(-30, 30, width=32) | st.just(-INF) | st.sampled_from([0.0, 1.0])


@settings(max_examples=400, deadline=None)
@given(
    row=st.lists(numbers, min_size=1, max_size=300),
    finite=st.integers(0),
    params=st.fixed_dictionaries(
        {
            "temperature": st.sampled_from([0.01, 0.5, 1.0, 100.0, 1e30]),
            "top_k": st.sampled_from([0, 1, 2, 10, 10_000]),
            "top_p": st.sampled_from([1e-300, 1e-9, 0.3, 0.999, 1 - 1e-16, 1.0]),
            "min_p": st.sampled_from([0.0, 1e-9, 0.5, 1.0]),
        }
    ),
    seed=st.integers(0, 2**64 - 1),
)
def test_a_draw_is_always_possible_and_never_of_a_masked_token(row, finite, params, seed):
    row[finite % len(row)] = max(-HUGE, row[finite % len(row)])
    one = sample(torch.tensor([row]), [make(seed=seed, **params)])[0]
    assert one.error is None and row[one.token] > -INF
    if params["top_k"] == 1:
        assert row[one.token] == max(row)
    elif params["min_p"] == 1.0 and params["temperature"] == 0.01:
        assert (max(row) - row[one.token]) / 0.01 <= 2.0**-24  # as likely as the best, in float32


@settings(max_examples=300, deadline=None)
@given(
    weights=st.lists(st.sampled_from([0.0, 1e-30, 0.25, 0.5, 1.0]) | st.floats(0, 1, width=32), min_size=1, max_size=400),
    top_p=st.floats(1e-6, 1, exclude_max=True),
    likely=st.sampled_from([1, 3, 50, 512]),
)
def test_the_nucleus_is_the_shortest_head_that_reaches_its_share(weights, top_p, likely):
    weights[len(weights) // 2] = 1.0
    with patch.object(sampler, "_LIKELY", likely):
        kept, ids = sampler._nucleus(torch.tensor(weights), None, top_p)
    order = sorted(range(len(weights)), key=lambda i: (-weights[i], i))
    masses = np.cumsum([np.float64(np.float32(weights[i])) for i in order])
    length, goal, blur = len(ids), top_p * masses[-1], 1e-12 * masses[-1]
    assert ids.tolist() == sorted(order[:length]) and kept.tolist() == torch.tensor(weights)[ids].tolist()
    assert masses[length - 1] >= goal - blur
    assert length == 1 or masses[length - 2] < goal + blur


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from([0.0, 1e-38, 1e-7, 1.0]), min_size=1, max_size=600), st.integers(0, 2**53 - 1))
def test_inverse_cdf_never_picks_a_weight_of_zero(weights, bits):
    weights[-1 - len(weights) // 3] = 1.0
    u = bits * 2.0**-53
    pick = sampler._inverse_cdf(torch.tensor(weights), u)
    sums = np.cumsum(np.array(weights, dtype=np.float32).astype(np.float64))
    assert weights[pick] > 0
    assert (sums[pick - 1] if pick else 0.0) <= u * sums[-1] * (1 + 1e-12)
    assert sums[pick] >= u * sums[-1] * (1 - 1e-12)


class OnCard(torch.Tensor):
    """Says that it is on a card."""

    device = property(lambda self: torch.device("cuda"))  # type: ignore[assignment]


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize(
    "more",
    [{"top_k": 5}, {"top_k": 3000, "top_p": 0.9}, {"min_p": 1e-4, "top_p": 0.95}, {"top_p": 0.7}, {"logprobs": 4, "top_k": 1200}],
)
def test_a_card_looks_for_thresholds_in_whole_rows_alone(more, guided):
    """Its kernels are compiled for a length; what a grammar, top_k or min_p leave has any, and a start cannot know which."""
    logits, lengths = random_logits(1, 20_000), set()
    if guided:
        logits[0, torch.arange(20_000) % 7 == 3] = -INF

    def kth(row, k):
        lengths.add(row.numel())
        return reference.kth_largest(row.as_subclass(torch.Tensor), k)

    for seed in range(20):
        request = make(temperature=1.3, seed=seed, **more)
        request.guide = object() if guided else None
        expected = sample(logits.clone(), [request])
        assert sample(logits.clone().as_subclass(OnCard), [request], kth=kth) == expected
    assert lengths == (set() if "min_p" in more else {20_000})
