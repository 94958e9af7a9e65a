"""What LLM takes and refuses: forms of prompts and parameters, defaults of sampling, lengths beyond the context."""

from __future__ import annotations

import json
from array import array
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from appliance import LLM, BeamSearchParams, SamplingParams
from appliance.core.door import check_ids
from appliance.core.messages import Submit
from appliance.core.params import RequestError
from quant.errors import InputError
from tests.tiny_model import make_checkpoint

GREEDY = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
OPTIONS: dict[str, Any] = {"threads": 1, "kv_cache_memory_bytes": 4 << 20, "max_model_len": 64}
SETTINGS = {"temperature": 0.25, "top_k": 7, "max_new_tokens": 3}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = make_checkpoint(tmp_path_factory.mktemp("tiny") / "m")
    (directory / "generation_config.json").write_text(json.dumps(SETTINGS))
    return directory


@pytest.fixture(scope="module")
def llm(model: Path) -> LLM:
    return LLM(str(model), **OPTIONS)


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
    for choice, expected in (("vllm", SamplingParams()), (str(tmp_path), SamplingParams(top_p=0.5))):
        assert LLM(str(model), generation_config=choice, **OPTIONS).get_default_sampling_params() == expected
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


def test_a_model_without_a_seed(model: Path) -> None:
    assert LLM(str(model), seed=None, **OPTIONS).generate("a", use_tqdm=False)[0].finished


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
