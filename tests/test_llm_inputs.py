"""What LLM takes and refuses: forms of prompts and parameters, defaults of sampling, lengths beyond the context."""

from __future__ import annotations

import json
from array import array
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from appliance import LLM, BeamSearchParams, SamplingParams
from appliance.config import EngineConfig
from appliance.core.door import check_ids
from appliance.core.messages import Submit
from appliance.core.params import RequestError
from appliance.memory.early import KINDS
from quant.errors import InputError
from tests.tiny_model import make_checkpoint

GREEDY = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
OPTIONS: dict[str, Any] = {"threads": 1, "kv_cache_memory_bytes": 4 << 20, "max_model_len": 64}
HI = [{"role": "user", "content": "Hi"}]
SETTINGS = {"temperature": 0.25, "top_k": 7, "max_new_tokens": 3}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = make_checkpoint(tmp_path_factory.mktemp("tiny") / "m")
    (directory / "generation_config.json").write_text(json.dumps(SETTINGS))
    return directory


@pytest.fixture(scope="module")
def llm(model: Path) -> LLM:
    told: dict[str, Any] = {"task": "generate", "tensor_parallel_size": 1, "hf_overrides": {}, "trust_remote_code": True}
    return LLM(str(model), **OPTIONS, **told)  # as scripts for vLLM say it


def test_token_ids_of_any_integer_kind(llm: LLM) -> None:
    """They once reached the kernels as they were: of another width, they were read beyond their end."""
    ids = [5, 6, 200]
    (expected,) = llm.generate([ids], GREEDY, use_tqdm=False)
    forms: list[Any] = [np.array(ids, dtype=kind) for kind in ("uint8", "int16", "int32", "int64")]
    forms += [torch.tensor(ids, dtype=torch.int32), torch.tensor(ids), array("h", ids), tuple(ids)]
    forms += [[*map(np.int16, ids)], [*torch.tensor(ids)]]
    for form in forms:
        for prompt in (form, [form], {"prompt_token_ids": form}):
            (output,) = llm.generate(prompt, GREEDY, use_tqdm=False)
            assert output.prompt_token_ids == ids and {*map(type, output.prompt_token_ids)} == {int}
            assert output.outputs[0].token_ids == expected.outputs[0].token_ids
    several: list[Any] = [np.array(ids), [5]]
    two = llm.generate(several, GREEDY, use_tqdm=False)
    assert [one.prompt_token_ids for one in two] == [ids, [5]]


@pytest.mark.parametrize(
    ("prompts", "told"),
    [
        ([1.0, 2.0], r"prompt\[0\] is 1.0 \(float\): token ids are integers"),
        ([3, True], r"prompt\[1\] is True \(bool\)"),
        ({"prompt_token_ids": [3, 4.5]}, r"prompt_token_ids\[1\] is 4.5 \(float\)"),
        (np.array([1.0, 2.0]), "token ids are integers"),
        (torch.tensor([True, False]), r"is True \(bool\)"),
        (np.array([[1, 2], [3, 4]]), r"an array of shape \(2, 2\) \(ndarray\)"),
        ([np.array([[1, 2]])], r"prompt cannot be an array of shape \(1, 2\)"),
        (b"Once", r"prompts cannot be b'Once' \(bytes\): give text"),
        ([b"Once"], r"prompt cannot be b'Once' \(bytes\)"),
        (None, r"prompts cannot be None \(NoneType\)"),
        ([None], "prompt cannot be None"),
        (5, r"prompts cannot be 5 \(int\)"),
        (["a", 5], r"prompt cannot be 5 \(int\)"),
        ({"prompt": 5}, r"'prompt' must be text, found 5 \(int\)"),
        ({"prompt_token_ids": "5"}, "prompt_token_ids cannot be '5'"),
        ({"prompt": "a", "multi_modal_data": {}}, "a prompt has no 'multi_modal_data': it may hold 'prompt'"),
        ({"prompt": "a", "cash_salt": "x"}, "a prompt has no 'cash_salt'"),
        ([[4, 256]], "token id 256, but the vocabulary has ids 0 to 255"),
        ([[2**70]], "but the vocabulary has ids"),
    ],
)
def test_prompts_that_are_none(llm: LLM, prompts: Any, told: str) -> None:
    with pytest.raises(RequestError, match=told):
        llm.generate(prompts, GREEDY)
    with pytest.raises(RequestError, match=told):
        llm.beam_search(prompts, BeamSearchParams(beam_width=2, max_tokens=2))


@pytest.mark.parametrize(
    ("params", "told"),
    [
        ({"temperature": 0}, r"sampling_params cannot be .* \(dict\): give SamplingParams"),
        ([None], "sampling_params holds None"),
        (BeamSearchParams(beam_width=2, max_tokens=2), r"give them to beam_search\(\)"),
        (0.5, r"sampling_params cannot be 0.5 \(float\)"),
    ],
)
def test_parameters_that_are_none(llm: LLM, params: Any, told: str) -> None:
    with pytest.raises(InputError, match=told):
        llm.generate(["a"], params)


def test_parameters_may_be_changed(llm: LLM) -> None:
    """As vLLM's tutorials do; what they are then is looked at when they are used, and whoever uses them has a copy."""
    params = llm.get_default_sampling_params()
    params.max_tokens, params.temperature, params.stop = 2, 0.0, "never said"
    params.ignore_eos = True
    assert [len(one.outputs[0].token_ids) for one in llm.generate(["a", "b"], params, use_tqdm=False)] == [2, 2]
    assert llm.get_default_sampling_params().temperature == SETTINGS["temperature"]
    changes: list[tuple[str, Any, str]] = [
        ("temperature", -1, "temperature must be a number at least 0"),
        ("logit_bias", {1.5: 1}, "logit_bias must map token ids"),
        ("logprobs", 21, r"logprobs is 21, but at most 20 are allowed here \(max_logprobs of the LLM\)"),
        ("prompt_logprobs", -1, "prompt_logprobs is -1, but at most 20"),
        ("bad_words_token_ids", 5, "bad_words_token_ids is made from bad_words"),
        ("grammar", "start: /a/", "grammar is made from structured_outputs"),
    ]
    for name, value, told in changes:
        params = SamplingParams()
        setattr(params, name, value)
        for given in (params, [params]):
            with pytest.raises(RequestError, match=told):
                llm.generate(["a"], given, use_tqdm=False)
    beams = BeamSearchParams(beam_width=2, max_tokens=2)
    beams.beam_width = 0
    with pytest.raises(RequestError, match="beam_width must be an integer at least 1"):
        llm.beam_search(["a"], beams)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"max_logprobs": -2}, "^max_logprobs is -2: a whole number is needed, -1 for no limit"),
        ({"model": None}, "^model is None: a directory"),
        ({"model": 5}, "^model is 5: a directory"),
        ({"tokenizer": 5}, "^tokenizer is 5: text, or None, is needed"),
        ({"quantization": 5}, "^quantization is 5: text"),
        ({"kv_cache_dtype": ["int8"]}, r"^kv_cache_dtype is \['int8'\]: text"),
        ({"device": None}, "^device None is not known; auto, cpu and cuda are"),
        ({"seed": "a"}, "^seed is 'a': a whole number is needed"),
        ({"seed": 1.5}, "^seed is 1.5: a whole number"),
        ({"seed": True}, "^seed is True: a whole number"),
        ({"threads": "2"}, "^threads is '2': a whole number, or None"),
        ({"threads": 1.5}, "^threads is 1.5: a whole number, or None"),
        ({"enable_prefix_caching": "no"}, "^enable_prefix_caching is 'no': True or False is needed"),
        ({"skip_tokenizer_init": "yes"}, "^skip_tokenizer_init is 'yes': True or False"),
        ({"enforce_eager": "false"}, "^enforce_eager is 'false': True or False"),
        ({"reference_ops": 1}, "^reference_ops is 1: True or False"),
        ({"generation_config": None}, "^generation_config is None: auto"),
        ({"generation_config": Path("/nowhere")}, "^generation_config is .* got '/nowhere', which is no directory"),
        ({"chat_template": 5}, "^chat_template is 5: Jinja, or a file"),
        ({"chat_template": ""}, "^chat_template is '': Jinja, or a file"),
        ({"chat_template": Path("/none.jinja")}, "^chat_template /none.jinja: cannot read"),
    ],
)
def test_arguments_of_another_kind(options: dict[str, Any], told: str) -> None:
    """Told before a model is looked for; text for a flag once counted as true."""
    with pytest.raises(InputError, match=told):
        LLM(**{"model": "/no/such/model", **OPTIONS, **options})


def test_the_kind_of_every_option_is_known() -> None:
    # Told with their ranges: tests/memory/test_settings.py
    numbers = {"float", "float | None", "float | str", "int | str", "int | str | None"}
    assert {str(f.type) for f in fields(EngineConfig)} == {*KINDS} | numbers


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"bad_words": "bad"}, "bad_words must be a list of texts, got 'bad'"),
        ({"bad_words": 5}, "bad_words must be a list of texts, got 5"),
        ({"stop": 5}, "stop must be a list of texts, got 5"),
        ({"stop": {"a": 1}}, "stop must be a list of texts, got {'a': 1}"),
        ({"stop": b"ab"}, "stop must be a list of texts, got b'ab'"),
        ({"stop_token_ids": 5}, "stop_token_ids must be a list of token ids, got 5"),
        ({"stop_token_ids": False}, "stop_token_ids must be a list of token ids, got False"),
        ({"stop_token_ids": "55"}, "stop_token_ids must be a list of token ids, got '55'"),
        ({"stop_token_ids": np.array([3, 4])}, r"stop_token_ids must be a list of token ids \(integers >= 0\)"),
        ({"allowed_token_ids": 5}, "allowed_token_ids must be a list of token ids, got 5"),
        ({"allowed_token_ids": np.array(5)}, r"allowed_token_ids must be a list of token ids, got array\(5\)"),
        ({"ignore_eos": "no"}, "ignore_eos must be True or False, got 'no'"),
        ({"detokenize": 0}, "detokenize must be True or False, got 0"),
        ({"use_beam_search": None}, "use_beam_search must be True or False, got None"),
    ],
)
def test_sampling_of_another_kind(options: dict[str, Any], told: str) -> None:
    with pytest.raises(RequestError, match=told) as error:
        SamplingParams(**options)
    assert error.value.param == next(iter(options))


def test_lists_of_any_kind() -> None:
    given: dict[str, Any] = {"stop": {"a"}, "stop_token_ids": range(2), "allowed_token_ids": iter([3]), "bad_words": ("b", "c")}
    params = SamplingParams(**given)
    assert (params.stop, params.stop_token_ids, params.allowed_token_ids, params.bad_words) == (("a",), (0, 1), (3,), ("b", "c"))
    empty = SamplingParams(stop=None, stop_token_ids=[], bad_words=None)
    assert (empty.stop, empty.stop_token_ids, empty.allowed_token_ids, empty.bad_words) == ((), (), None, ())
    assert SamplingParams(stop="ab").stop == ("ab",)


@pytest.mark.parametrize(
    ("params", "told"),
    [
        (None, r"params cannot be None \(NoneType\): give BeamSearchParams"),
        ([BeamSearchParams(beam_width=2, max_tokens=2)], r"params cannot be .*\(list\): give BeamSearchParams"),
        (SamplingParams(), r"give them to generate\(\)"),
    ],
)
def test_beams_need_their_own_parameters(llm: LLM, params: Any, told: str) -> None:
    with pytest.raises(InputError, match=told):
        llm.beam_search("a", params)


def test_what_is_no_adapter_is_refused_and_none_is_taken(llm: LLM) -> None:
    assert llm.generate("a", GREEDY, lora_request=None)[0].outputs[0].token_ids
    assert llm.chat(HI, GREEDY, lora_request=None)[0].outputs[0].token_ids
    for call in (lambda: llm.generate("a", GREEDY, lora_request=object()), lambda: llm.chat(HI, GREEDY, lora_request=object())):
        with pytest.raises(RequestError, match=r"lora_request cannot be <object.*give LoRARequest"):
            call()


@pytest.mark.parametrize(
    ("priority", "told"),
    [(1, r"priority cannot be 1 \(int\): give a list"), ("1", "priority cannot be '1'"), ([0, 0], "2 priorities for 1 prompts")],
)
def test_priorities_that_are_no_list(llm: LLM, priority: Any, told: str) -> None:
    with pytest.raises(InputError, match=told):
        llm.generate("a", GREEDY, priority=priority)


@pytest.mark.parametrize(
    ("messages", "options", "told"),
    [
        (None, {}, r"messages cannot be None \(NoneType\): give a list of messages"),
        ("Hi", {}, r"messages cannot be 'Hi' \(str\)"),
        (HI[0], {}, r"messages cannot be {.*} \(dict\)"),
        ([None], {}, r"messages\[0\] is None \(NoneType\): give a list"),
        (["Hi"], {}, r"messages\[0\] is 'Hi' \(str\)"),
        ([HI, HI[0]], {}, r"messages\[1\] is {.*} \(dict\)"),
        ([HI[0], HI], {}, r"messages\[1\] must be an object with a 'role'"),
        ([[]], {}, "messages must be a list of at least one message"),
        (HI, {"chat_template_kwargs": ["a"]}, r"chat_template_kwargs cannot be \['a'\] \(list\)"),
        (HI, {"chat_template_kwargs": {1: 2}}, r"chat_template_kwargs cannot be {1: 2} \(dict\)"),
        (HI, {"chat_template": ""}, "^chat_template is '': Jinja, or a file"),
        (HI, {"chat_template": 5}, "^chat_template is 5: Jinja, or a file"),
        (HI, {"chat_template": Path("/none.jinja")}, "^chat_template /none.jinja: cannot read"),
        (HI, {"add_generation_prompt": "no"}, "add_generation_prompt must be True or False, got 'no'"),
    ],
)
def test_conversations_that_are_none(llm: LLM, messages: Any, options: dict[str, Any], told: str) -> None:
    with pytest.raises(InputError, match=told):
        llm.chat(messages, GREEDY, **options)


def test_paths_and_iterators(llm: LLM, tmp_path: Path) -> None:
    template = tmp_path / "t.jinja"
    template.write_text("{{ messages[0].content }}")
    for messages, number in ((iter(HI), 1), (tuple(HI), 1), (iter([HI, tuple(HI)]), 2)):
        answers = llm.chat(messages, GREEDY, use_tqdm=False, chat_template=template)
        assert [one.prompt for one in answers] == ["Hi"] * number


@pytest.mark.parametrize("ids", [[True], [1.0], [1, np.int32(2)]])
def test_the_door_takes_python_integers(ids: list[Any]) -> None:
    with pytest.raises(RequestError, match=r"prompt holds .*: token ids are integers"):
        check_ids("prompt", ids, 10)


def test_defaults_of_the_model(llm: LLM, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    defaults = llm.get_default_sampling_params()
    assert defaults == SamplingParams(temperature=0.25, top_k=7)
    seen: list[SamplingParams] = []
    submit = llm._engine.submit

    def noted(one: Submit) -> None:
        seen.append(one.params)
        submit(one)

    with monkeypatch.context() as patch:
        patch.setattr(llm._engine, "submit", noted)
        llm.generate(["a", "b"], use_tqdm=False)
        llm.chat([{"role": "user", "content": "a"}], use_tqdm=False)
        llm.generate("a", GREEDY, use_tqdm=False)
    assert seen == [defaults, defaults, defaults, GREEDY]
    (tmp_path / "generation_config.json").write_text('{"top_p": 0.5}')
    assert LLM(str(model), generation_config="vllm", **OPTIONS).get_default_sampling_params() == SamplingParams()
    (template := tmp_path / "t.jinja").write_text("own")  # all that names a file or a directory may be a Path
    paths: dict[str, Any] = {"tokenizer": model, "generation_config": tmp_path, "chat_template": template}
    other = LLM(model, **paths, **OPTIONS)
    assert other.get_default_sampling_params() == SamplingParams(top_p=0.5)
    assert other.get_tokenizer().chat(HI) == "own"
    with pytest.raises(InputError, match=r"^generation_config is 'auto' or 'appliance', got 'mine'"):
        LLM(str(model), generation_config="mine", **OPTIONS)


def test_answers_end_with_the_context(llm: LLM) -> None:
    """As vLLM's LLM: what asks for more than there is gets what there is."""
    params = SamplingParams(temperature=0.0, max_tokens=1000, min_tokens=500)
    long, short = llm.generate([list(range(3, 63)), [5]], params, use_tqdm=False)
    assert [(len(one.outputs[0].token_ids), one.outputs[0].finish_reason) for one in (long, short)] == [
        (4, "length"),
        (63, "length"),
    ]
    (beams,) = llm.beam_search([list(range(3, 63))], BeamSearchParams(beam_width=2, max_tokens=1000, ignore_eos=True))
    assert [len(one.tokens) for one in beams.sequences] == [64, 64]
    with pytest.raises(RequestError, match="maximum context length is 64 tokens"):
        llm.generate([list(range(3, 67))], params)


def test_seeds() -> None:
    assert SamplingParams(seed=-1).seed is None and SamplingParams(seed=-2).seed == -2


def test_what_vllm_leaves_out_by_none(model: Path) -> None:
    llm = LLM(str(model), seed=None, enable_prefix_caching=None, **OPTIONS)
    assert llm.generate("a", use_tqdm=False)[0].finished and llm._config.enable_prefix_caching


def test_clone() -> None:
    params = SamplingParams(logit_bias={3: 1.0}, stop=["a"])
    copy = params.clone()
    assert copy == params and copy is not params and copy.logit_bias is not params.logit_bias


def test_errors_speak_python(llm: LLM, model: Path) -> None:
    with pytest.raises(InputError, match=r"^max_num_batched_tokens is None"):
        LLM(str(model), max_num_batched_tokens=None, **OPTIONS)
    with pytest.raises(RequestError, match='make the LLM with scheduling_policy="priority"'):
        llm.generate("a", priority=[1])
    with pytest.raises(InputError, match=r"no chat template: give one as chat_template \(Jinja, or its file\)"):
        (bare := model.parent / "bare").mkdir()
        for file in model.iterdir():
            if file.name != "tokenizer_config.json":
                (bare / file.name).write_bytes(file.read_bytes())
        LLM(str(bare), **OPTIONS).chat([{"role": "user", "content": "a"}])
