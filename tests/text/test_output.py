"""Stop strings, hold-back and the sums of the deltas."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from appliance.core.messages import Event, TokenLogprob, joined
from appliance.core.params import SamplingParams
from appliance.text.output import Delta, OutputStream, _StopStrings
from appliance.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer(byte_level_dir):
    return Tokenizer.load(byte_level_dir)


def letters(tokenizer, text):
    """One token a byte."""
    return [tokenizer.encode(c, add_special_tokens=False)[0] for c in text]


def run(tokenizer, params, ids, finish="length", stop_reason=None, prompt=()):
    stream = OutputStream(tokenizer, params, prompt)
    deltas = [stream.push(Event("r", 0, (t,))) for t in ids[:-1]]
    deltas.append(stream.push(Event("r", 0, tuple(ids[-1:]), finish_reason=finish, stop_reason=stop_reason)))
    return stream, deltas


def test_a_stop_string_across_tokens_is_never_shown(tokenizer):
    stream, deltas = run(tokenizer, SamplingParams(stop=["END"]), letters(tokenizer, "abENxENDyz"))
    assert [d.text for d in deltas] == ["a", "b", "", "", "ENx", "", "", "", "", ""]
    assert stream.text == "abENx" and (stream.finish_reason, stream.stop_reason) == ("stop", "END")
    assert len(stream.token_ids) == 8  # all that were generated up to the end of the stop string
    assert deltas[7].abort and deltas[7].finish_reason == "stop" and deltas[8:] == [Delta(), Delta()]


def test_included_stop_strings_need_no_holding_back(tokenizer):
    params = SamplingParams(stop=["END"], include_stop_str_in_output=True)
    stream, deltas = run(tokenizer, params, letters(tokenizer, "abENDyz"))
    assert [d.text for d in deltas][:5] == ["a", "b", "E", "N", "D"] and stream.text == "abEND"


def test_a_stop_within_a_token_cuts_the_token(tokenizer):
    ids = tokenizer.encode(" The quick brown", add_special_tokens=False)
    assert any(len(tokenizer.token_str(i)) > 3 for i in ids)
    assert run(tokenizer, SamplingParams(stop=["row"]), ids)[0].text == " The quick b"
    kept = SamplingParams(stop=["row"], include_stop_str_in_output=True)
    assert run(tokenizer, kept, ids)[0].text == " The quick brow"


def test_what_was_held_back_comes_at_the_end(tokenizer):
    stream, deltas = run(tokenizer, SamplingParams(stop=["END"]), letters(tokenizer, "abEN"))
    assert stream.text == "abEN" and deltas[-1].text == "EN" and stream.finish_reason == "length" and not deltas[-1].abort


def test_a_stop_string_on_the_last_token_wins_over_the_length(tokenizer):
    stream, deltas = run(tokenizer, SamplingParams(stop=["c"]), letters(tokenizer, "abc"))
    assert (stream.text, stream.finish_reason, stream.stop_reason, deltas[-1].abort) == ("ab", "stop", "c", False)


def test_stop_strings_wait_for_min_tokens(tokenizer):
    params = SamplingParams(stop=["b"], min_tokens=3, max_tokens=20)
    assert run(tokenizer, params, letters(tokenizer, "abbab"))[0].text == "abba"
    across = SamplingParams(stop=["bcd"], min_tokens=3, max_tokens=20)
    assert run(tokenizer, across, letters(tokenizer, "abcdx"))[0].text == "a"  # it may begin earlier, but not end


def test_stop_tokens_are_tokens_but_no_text(tokenizer):
    ids = letters(tokenizer, "abc")
    stream, deltas = run(tokenizer, SamplingParams(stop_token_ids=ids[2:]), ids, finish="stop", stop_reason=ids[2])
    assert stream.text == "ab" and stream.token_ids == ids and stream.stop_reason == ids[2] and not deltas[-1].abort
    kept = SamplingParams(stop_token_ids=ids[2:], include_stop_str_in_output=True)
    assert run(tokenizer, kept, ids, finish="stop", stop_reason=ids[2])[0].text == "abc"
    end = tokenizer.eos_token_id
    assert run(tokenizer, SamplingParams(skip_special_tokens=False), [*ids, end], finish="stop")[0].text == "abc"
    assert run(tokenizer, SamplingParams(skip_special_tokens=False), [*ids, end])[0].text == "abc<|end|>"


def test_abort_and_error_flush_and_end(tokenizer):
    for reason in ("abort", "error"):
        stream = OutputStream(tokenizer, SamplingParams(stop=["END"]), [])
        for token in letters(tokenizer, "aE"):
            stream.push(Event("r", 0, (token,)))
        delta = stream.push(Event("r", 0, finish_reason=reason, error="broken"))
        assert (delta.text, delta.finish_reason, delta.abort, stream.text) == ("E", reason, False, "aE")
        assert stream.push(Event("r", 0, (5,))) == Delta()


def test_half_a_character_comes_out_as_a_mark_at_the_end(tokenizer):
    ids = [tokenizer.encode("😀", add_special_tokens=False)[0]]
    stream, deltas = run(tokenizer, SamplingParams(), [*letters(tokenizer, "a"), *ids])
    assert stream.text == "a\ufffd" and [d.text for d in deltas] == ["a", "\ufffd"]


def test_without_a_tokenizer_or_without_detokenizing_there_is_no_text(tokenizer):
    for own, params in ((None, SamplingParams()), (tokenizer, SamplingParams(detokenize=False))):
        stream, _ = run(own, params, [1, 2, 3])
        assert stream.text == "" and stream.token_ids == [1, 2, 3] and stream.finish_reason == "length"


def test_logprobs_go_with_their_tokens(tokenizer):
    ids = letters(tokenizer, "aENDb")
    stream = OutputStream(tokenizer, SamplingParams(stop=["END"], logprobs=0), [])
    scores = [TokenLogprob(t, -1.0, 1) for t in ids]
    deltas = [stream.push(Event("r", 0, (t,), (s,))) for t, s in zip(ids, scores, strict=True)]
    assert stream.logprobs == scores[:4] and [d.logprobs for d in deltas] == [*((s,) for s in scores[:4]), None]
    assert OutputStream(tokenizer, SamplingParams(), []).push(Event("r", 0, (ids[0],))).logprobs is None


def test_several_tokens_in_one_event(tokenizer):
    ids = letters(tokenizer, "aENDb")
    stream = OutputStream(tokenizer, SamplingParams(stop=["END"]), [])
    delta = stream.push(Event("r", 0, tuple(ids), finish_reason="length"))
    assert delta == Delta("a", tuple(ids[:4]), None, "stop", "END", abort=False) and stream.token_ids == ids[:4]


def test_the_answer_to_a_prompt_keeps_its_first_space(llama_dir):
    llama = Tokenizer.load(llama_dir)
    ids = llama.encode("hello world", add_special_tokens=False)
    assert run(llama, SamplingParams(), ids, prompt=llama.encode("Once"))[0].text == " hello world"
    assert run(llama, SamplingParams(), ids, prompt=[1])[0].text == "hello world"


def naive(text, stops, keep):
    """Letter by letter, looking at everything."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            longest = max(found, key=len)
            return text[: end if keep else end - len(longest)], longest
    return text, None


@settings(max_examples=500, deadline=None)
@given(
    text=st.text("abc", max_size=30),
    cuts=st.lists(st.integers(0, 30), max_size=10),
    stops=st.lists(st.text("abc", min_size=1, max_size=5), max_size=4),
    keep=st.booleans(),
)
def test_streamed_equals_whole_however_the_text_is_cut(text, cuts, stops, keep):
    want, stop = naive(text, stops, keep)
    finder, shown = _StopStrings(stops, keep=keep), ""
    edges = sorted({0, len(text), *(c for c in cuts if c < len(text))})
    for a, b in itertools.pairwise(edges):
        shown += finder.push(text[a:b], seek=True)
        assert want.startswith(shown)
        if finder.found is not None:
            break
    if finder.found is None:
        shown += finder.release()
    assert (shown, finder.found) == (want, stop)


def test_a_character_costs_the_same_behind_any_text():
    """What the text has of a stop string is not looked for again: with that, this would take hours."""
    stop = "x" * 20_000 + "y"
    finder, shown = _StopStrings([stop, *(f"w{i}" for i in range(1000))], keep=False), ""
    for character in "x" * 30_000 + "y":
        shown += finder.push(character, seek=True)
    assert shown == "x" * 10_000 and finder.found == stop


@settings(max_examples=500)
@given(
    text=st.text("abc", max_size=30), least=st.integers(0, 30), stops=st.lists(st.text("abc", min_size=1, max_size=4), max_size=4)
)
def test_no_match_ends_before_it_may(text, least, stops):
    """Letter by letter, as under ``min_tokens``."""
    ends = [end for end in range(least + 1, len(text) + 1) if text[:end].endswith(tuple(stops))] if stops else []
    finder, shown = _StopStrings(stops, keep=False), ""
    for i, character in enumerate(text):
        shown += finder.push(character, seek=i >= least)
        if finder.found is not None:
            break
    if finder.found is None:
        shown += finder.release()
    want = max((stop for stop in stops if ends and text[: ends[0]].endswith(stop)), key=len, default=None)
    assert finder.found == want and shown == (text if want is None else text[: ends[0] - len(want)])


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_deltas_sum_up_to_the_whole(tokenizer, data):
    ids = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), min_size=1, max_size=25))
    stops = data.draw(st.lists(st.sampled_from(["a", "th", "\ufffd", " ", "e q", "<tool>"]), max_size=2))
    keep = data.draw(st.booleans())
    params = SamplingParams(stop=stops, include_stop_str_in_output=keep)
    stream, deltas = run(tokenizer, params, ids)
    assert "".join(d.text for d in deltas) == stream.text
    assert [t for d in deltas for t in d.token_ids] == stream.token_ids
    want, stop = naive(tokenizer.decode(ids), stops, keep)
    assert (stream.text, stream.stop_reason) == (want, stop)
    assert [d.finish_reason for d in deltas if d.finish_reason] == [stream.finish_reason]


@settings(max_examples=150)
@given(st.data())
def test_events_that_are_told_together_tell_the_same(tokenizer, data):
    """Several completions' events of many steps, joined at any places."""
    params = SamplingParams(stop=["ab", "bca"], min_tokens=data.draw(st.integers(0, 4)), logprobs=0, max_tokens=20)
    texts = data.draw(st.lists(st.text("abc", min_size=1, max_size=12), min_size=1, max_size=3))
    events = []
    for index, text in enumerate(texts):
        reason = data.draw(st.sampled_from(["length", "stop", "abort"]))
        ids = letters(tokenizer, text)
        for k, token in enumerate(ids):
            last = k == len(ids) - 1 and reason != "abort"
            scored = (TokenLogprob(token, -float(k), 1, ()),)
            events.append(
                (k, Event("r", index, (token,), scored, finish_reason=reason if last else None, cached_tokens=3 * (k == 0)))
            )
        if reason == "abort":
            events.append((len(ids), Event("r", index, finish_reason="abort")))
    events = [event for _, event in sorted(events, key=lambda one: one[0])]
    cuts = sorted(data.draw(st.sets(st.integers(0, len(events)), max_size=4)))
    parts = [events[a:b] for a, b in itertools.pairwise([0, *cuts, len(events)])]
    single, together = ([OutputStream(tokenizer, params, ()) for _ in texts] for _ in range(2))
    for event in events:
        single[event.index].push(event)
    told = [event for part in parts for event in joined(part)]
    for event in told:
        together[event.index].push(event)
    for a, b in zip(single, together, strict=True):
        assert (a.text, a.token_ids, a.logprobs) == (b.text, b.token_ids, b.logprobs)
        assert (a.finish_reason, a.stop_reason) == (b.finish_reason, b.stop_reason)
    assert len(told) <= sum(2 * len({event.index for event in part}) for part in parts)
