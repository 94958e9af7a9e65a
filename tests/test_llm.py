"""The offline API as vLLM's tutorials use it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from appliance import LLM, BeamSearchParams, SamplingParams
from appliance.core.params import RequestError
from quant.errors import InputError
from tests.tiny_model import make_checkpoint


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    model = make_checkpoint(tmp_path_factory.mktemp("tiny"))
    return LLM(
        model=str(model), dtype="float32", reference_ops=True, threads=1, kv_cache_memory_bytes=4 << 20, enforce_eager=True
    )


def test_prompts_keep_their_order(llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = ["Hello", "The sky is", "x"]
    outputs = llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=8))
    assert "Processed prompts" in capsys.readouterr().err
    assert [o.prompt for o in outputs] == prompts and all(o.finished for o in outputs)
    tokenizer = llm.get_tokenizer()
    for output in outputs:
        answer = output.outputs[0]
        assert output.prompt_token_ids == tokenizer.encode(output.prompt or "")
        assert answer.text == tokenizer.decode(answer.token_ids)
        assert answer.finish_reason in ("length", "stop") and 1 <= len(answer.token_ids) <= 8


def test_forms_of_a_prompt(llm: LLM) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True)
    ids = llm.get_tokenizer().encode("Hi")
    forms = ["Hi", {"prompt": "Hi"}, {"prompt_token_ids": ids}, ids]
    answers = [llm.generate(form, params, use_tqdm=False)[0].outputs[0].token_ids for form in forms]
    assert all(a == answers[0] for a in answers)
    assert llm.generate([], params) == []
    with pytest.raises(InputError, match="'prompt' or 'prompt_token_ids'"):
        llm.generate({"text": "Hi"})


def test_params_for_each_prompt_and_default(llm: LLM) -> None:
    outputs = llm.generate(
        ["a", "b"], [SamplingParams(max_tokens=2, ignore_eos=True), SamplingParams(max_tokens=4, ignore_eos=True)]
    )
    assert [len(o.outputs[0].token_ids) for o in outputs] == [2, 4]
    with pytest.raises(InputError, match="1 sampling_params for 2 prompts"):
        llm.generate(["a", "b"], [SamplingParams()])
    assert len(llm.generate("a")[0].outputs[0].token_ids) <= 16


def test_logprobs(llm: LLM) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=3, logprobs=2, prompt_logprobs=1, ignore_eos=True)
    output = llm.generate("abc", params, use_tqdm=False)[0]
    answer = output.outputs[0]
    assert answer.logprobs is not None and output.prompt_logprobs is not None
    assert output.prompt_logprobs[0] is None and len(output.prompt_logprobs) == len(output.prompt_token_ids)
    for token, entry in zip(answer.token_ids, answer.logprobs, strict=True):
        assert next(iter(entry)) == token and entry[token].rank == 1 and 2 <= len(entry) <= 3
        assert entry[token].decoded_token == llm.get_tokenizer().token_str(token)
    total = sum(entry[t].logprob for t, entry in zip(answer.token_ids, answer.logprobs, strict=True))
    assert answer.cumulative_logprob == pytest.approx(total)
    assert llm.generate("abc", SamplingParams(max_tokens=1))[0].outputs[0].logprobs is None


def test_best_of(llm: LLM) -> None:
    """The seed decides what is drawn, so the best of six are among the six."""
    params = {"temperature": 1.0, "max_tokens": 6, "ignore_eos": True, "seed": 5}
    six = llm.generate("abc", SamplingParams(n=6, logprobs=0, **params), use_tqdm=False)[0].outputs
    expected = sorted(six, key=lambda one: -(one.cumulative_logprob or 0))[:2]
    two = llm.generate("abc", SamplingParams(n=2, best_of=6, **params), use_tqdm=False)[0].outputs
    assert [one.token_ids for one in two] == [one.token_ids for one in expected]
    assert [one.cumulative_logprob for one in two] == pytest.approx([one.cumulative_logprob for one in expected])
    assert [one.index for one in two] == [0, 1] and two[0].logprobs is None


def test_beam_search(llm: LLM) -> None:
    prompts = ["abc", {"prompt_token_ids": [5, 6]}]
    first, second = llm.beam_search(prompts, BeamSearchParams(beam_width=3, max_tokens=6))
    ids = llm.get_tokenizer().encode("abc")
    assert len(first.sequences) == len(second.sequences) == 3 and second.sequences[0].tokens[:2] == [5, 6]
    for one in first.sequences:
        assert one.tokens[: len(ids)] == ids and len(one.logprobs) == len(one.tokens) - len(ids) <= 6
        assert one.text == llm.get_tokenizer().decode(one.tokens, skip_special_tokens=False)
        chosen = [row[token] for row, token in zip(one.logprobs, one.tokens[len(ids) :], strict=True)]
        assert one.cum_logprob == pytest.approx(sum(c.logprob for c in chosen)) and all(len(row) == 6 for row in one.logprobs)
    scores = [one.cum_logprob / (len(one.tokens) - (one.finish_reason == "stop")) for one in first.sequences]
    assert scores == sorted(scores, reverse=True)
    greedy = llm.generate("abc", SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True), use_tqdm=False)[0].outputs[0]
    (alone,) = llm.beam_search("abc", BeamSearchParams(beam_width=1, max_tokens=6, ignore_eos=True))[0].sequences
    assert alone.tokens[len(ids) :] == greedy.token_ids
    params = SamplingParams(n=3, use_beam_search=True, max_tokens=6)
    outputs = llm.generate("abc", params, use_tqdm=False)[0].outputs
    assert [ids + one.token_ids for one in outputs] == [one.tokens for one in first.sequences]


def test_cached_tokens_salts_and_reset(llm: LLM) -> None:
    prompt, params = list(range(3, 83)), SamplingParams(temperature=0.0, max_tokens=2)

    def cached(**more: object) -> int:
        (output,) = llm.generate({"prompt_token_ids": prompt, **more}, params, use_tqdm=False)
        return output.num_cached_tokens

    assert [cached(), cached()] == [0, 79]
    assert [cached(cache_salt="mine"), cached(cache_salt="mine"), cached(cache_salt="yours")] == [0, 79, 0]
    assert llm.reset_prefix_cache() and cached() == 0
    with pytest.raises(RequestError, match="cache_salt must be text that is not empty, got ''"):
        cached(cache_salt="")


def test_priorities(llm: LLM, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="priority is 1, but requests are served in order of arrival"):
        llm.generate("abc", priority=[1])
    with pytest.raises(InputError, match="2 priorities for 1 prompts"):
        llm.generate("abc", priority=[1, 2])
    model = make_checkpoint(tmp_path / "m")
    first = LLM(str(model), max_num_seqs=1, kv_cache_memory_bytes=4 << 20, threads=1, scheduling_policy="priority")
    order, submit = [], first._engine.step

    def step() -> list:
        events = submit()
        order.extend(e.request_id for e in events if e.finish_reason)
        return events

    first._engine.step = step  # type: ignore[method-assign]
    first.generate(["a", "b", "c"], SamplingParams(max_tokens=3), priority=[2, 0, -1], use_tqdm=False)
    assert order == ["2", "1", "0"]
    with pytest.raises(RequestError, match="priority must be an integer, got 'x'"):
        first.generate("a", priority=["x"])


def test_stop_string_ends_the_text_and_the_work(llm: LLM) -> None:
    free = llm.generate("abc", SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True))[0].outputs[0]
    stop = free.text[4:6]
    answer = llm.generate("abc", SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True, stop=[stop]))[0].outputs[0]
    assert answer.text == free.text[: free.text.index(stop)]
    assert (answer.finish_reason, answer.stop_reason) == ("stop", stop)


def test_chat(llm: LLM) -> None:
    message = [{"role": "user", "content": "Hello"}]
    one, two = llm.chat([message, message], SamplingParams(temperature=0.0, max_tokens=4))
    assert one.prompt == "<s>user: Hello\nassistant:" and one.prompt_token_ids.count(1) == 1
    assert one.outputs[0].text == two.outputs[0].text
    assert llm.chat(message, SamplingParams(temperature=0.0, max_tokens=4))[0].outputs[0].text == one.outputs[0].text


def test_chat_with_tools_and_another_template(llm: LLM) -> None:
    tool = {"type": "function", "function": {"name": "weather", "parameters": None}}
    call = {"id": "a", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
    said = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
    source = "{{ tools | map(attribute='function') | list | tojson }}{% for m in messages %}|{{ m.content }}{% endfor %}"
    params = SamplingParams(max_tokens=1)
    (output,) = llm.chat(said, params, tools=[tool], chat_template=source)
    function = {"name": "weather", "description": "", "parameters": {"type": "object", "properties": {}}}
    assert output.prompt == json.dumps([function]) + "|Hi|"
    assert llm.chat(said[:1], params)[0].prompt == "<s>user: Hi\nassistant:"
    with pytest.raises(RequestError, match=r"tools\[0\] must be"):
        llm.chat(said, params, tools=[{"name": "weather"}])
    with pytest.raises(InputError, match="not a Jinja template"):
        llm.chat(said, params, chat_template="{% if %}")


def test_chat_arguments_are_not_given_twice(llm: LLM) -> None:
    with pytest.raises(InputError, match="chat_template_kwargs holds 'tools'"):
        llm.chat([{"role": "user", "content": "Hello"}], chat_template_kwargs={"tools": []})


def test_a_refused_prompt_leaves_nothing_behind(llm: LLM) -> None:
    with pytest.raises(RequestError, match="maximum context length"):
        llm.generate(["fine", "x" * 5000], SamplingParams(max_tokens=4))
    assert llm.generate("fine", SamplingParams(max_tokens=1))[0].finished


def test_arguments(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "m", tokenizer=False)
    with pytest.raises(TypeError, match="no argument 'max_length'"):
        LLM(model=str(model), max_length=5)
    with pytest.raises(InputError, match="tensor_parallel_size=2"):
        LLM(model=str(model), tensor_parallel_size=2)
    with pytest.raises(InputError, match=r"^dtype 'fp16' is not known"):
        LLM(model="/no/such/model", dtype="fp16")  # before the model is looked for
    with pytest.raises(InputError, match="tokenizer"):
        LLM(model=str(model))
    with pytest.raises(InputError, match="quantization"):
        LLM(model=str(model), quantization="gptq", skip_tokenizer_init=True)
    bare = LLM(model=str(model), skip_tokenizer_init=True, kv_cache_memory_bytes=4 << 20, threads=1)
    answer = bare.generate([[3, 4, 5]], SamplingParams(max_tokens=3, ignore_eos=True))[0].outputs[0]
    assert len(answer.token_ids) == 3 and answer.text == ""
    with pytest.raises(RequestError, match="stop_token_ids"):
        bare.generate([[3]], SamplingParams(stop="x"))
    with pytest.raises(InputError, match="skip_tokenizer_init"):
        bare.generate("text")
