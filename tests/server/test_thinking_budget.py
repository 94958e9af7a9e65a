"""vLLM's further sampling fields over HTTP: what the engine is told of them, and what clients see."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from appliance.config import EngineConfig, ServerConfig
from appliance.core.thinking import ThinkingMarks
from appliance.text.tokenizer import Tokenizer
from tests.server.conftest import Served, serve_in_thread
from tests.server.fake import FakeClient, info
from tests.tiny_model import write_thoughts, write_tokenizer

TEMPLATE = """\
{%- for m in messages %}{{ m['role'] }}: {% if m['reasoning_content'] %}<think>{{ m['reasoning_content'] }}</think>{% endif -%}
{{ m['content'] }}{% if not loop.last or add_generation_prompt %}</s>{% endif %}{% endfor -%}
{%- if add_generation_prompt %}assistant: {% if enable_thinking %}<think>
{% endif %}{% endif %}"""
HELLO = [{"role": "user", "content": "Hello"}]
ON = {"chat_template_kwargs": {"enable_thinking": True}}
MARKS = ThinkingMarks((99,), 100, (100,))


@pytest.fixture(scope="module")
def thinks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    directory = tmp_path_factory.mktemp("thinks")
    write_tokenizer(directory)
    tokenizer = Tokenizer.load(write_thoughts(directory, TEMPLATE))
    config = ServerConfig(served_model_name=("tiny",))

    def make() -> FakeClient:
        client = FakeClient()
        client.info = replace(info(), vocab_size=len(tokenizer))
        return client

    with serve_in_thread(make, tokenizer, EngineConfig(model=str(directory)), config) as one:
        yield one


def told(served: Served, path: str = "/v1/chat/completions", **body: Any) -> tuple[int | None, ThinkingMarks | None]:
    """The budget and the marks that the engine gets."""
    answer = served.post(path, **{"max_tokens": 4, "thinking_token_budget": 7, **body})
    assert answer.status_code == 200, answer.text
    params = served.client.submitted[-1].params
    return params.thinking_token_budget, params.thinking_marks


def thought(served: Served, *messages: dict[str, str], **body: Any) -> int | None:
    budget, marks = told(served, messages=messages, **body)
    assert budget == 7 and marks is not None and (marks.start, marks.end, marks.close, marks.again) == ((99,), 100, (100,), False)
    return marks.thought


def test_where_an_answer_begins(thinks: Served) -> None:
    """Within thoughts, behind some, or outside; what users write is never a thought of the model's."""
    assert thought(thinks, *HELLO) is None
    assert thought(thinks, *HELLO, **ON) == 1  # the line break behind the tag
    said = {"role": "assistant", "content": "Yes", "reasoning_content": "Hm"}
    assert thought(thinks, *HELLO, said, *HELLO) is None
    assert thought(thinks, {"role": "user", "content": "What is <think>?"}) is None
    assert thought(thinks, {"role": "user", "content": "<think>" * 9}, **ON) == 1
    open_ = {"role": "assistant", "content": "<think>so far"}
    goes_on = {"continue_final_message": True, "add_generation_prompt": False}
    assert thought(thinks, *HELLO, open_, **goes_on) == len("so far")
    assert thought(thinks, *HELLO, {**open_, "content": "<think>so</think> far"}, **goes_on) is None
    for prompt, count in (("<think>abc", 3), ("abc", None), ("<think>a</think>b", None)):
        _, marks = told(thinks, "/v1/completions", prompt=prompt)
        assert marks is not None and marks.thought == count


def test_no_budget_and_none_that_limits(thinks: Served) -> None:
    assert told(thinks, messages=HELLO, thinking_token_budget=None) == (None, None)
    assert told(thinks, messages=HELLO, thinking_token_budget=-1) == (None, None)
    assert told(thinks, messages=HELLO, thinking_token_budget=0) == (0, MARKS)
    assert told(thinks, "/v1/responses", input="Hello", max_tokens=None) == (7, MARKS)


def test_the_budget_of_anthropics_thinking(thinks: Served, served: Served) -> None:
    body: dict[str, Any] = {"model": "tiny", "messages": HELLO, "thinking_token_budget": None}
    on = {"type": "enabled", "budget_tokens": 1024}
    budget, marks = told(thinks, "/v1/messages", **body, thinking=on)
    assert budget == 1024 and marks is not None and marks.thought == 1
    for other in ({"type": "disabled"}, {"type": "adaptive"}, {"type": "enabled"}):
        assert told(thinks, "/v1/messages", **body, thinking=other)[0] is None
    assert told(served, "/v1/messages", **body, thinking=on) == (None, None)  # a model that does not think


def test_models_that_show_no_thoughts(served: Served) -> None:
    answer = served.post("/v1/chat/completions", messages=HELLO, thinking_token_budget=7)
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["param"] == "thinking_token_budget" and "shows no thoughts" in error["message"]


def test_chosen_log_probabilities(served: Served) -> None:
    """With or without OpenAI's own fields, streamed and not, and in both forms."""
    ids = [70, 40, 41]
    names = [served.state.token_name(token) for token in ids]
    for more in ({}, {"logprobs": True, "top_logprobs": 1}):
        body = {"messages": HELLO, "max_tokens": 2, "logprob_token_ids": ids, **more}
        first, _ = served.post("/v1/chat/completions", **body).json()["choices"][0]["logprobs"]["content"]
        assert [one["token"] for one in first["top_logprobs"]] == names
        assert [one["logprob"] for one in first["top_logprobs"]] == [-70.0, -40.0, -41.0]
        with served.openai.chat.completions.create(
            model="tiny",
            messages=HELLO,
            max_tokens=2,
            stream=True,  # type: ignore[call-overload]
            extra_body={"logprob_token_ids": ids, **more},
        ) as chunks:
            streamed = [one for chunk in chunks for c in chunk.choices if c.logprobs for one in c.logprobs.content]
        assert [one.token for one in streamed[0].top_logprobs] == names and len(streamed) == 2
    found = served.post("/v1/completions", prompt="abc", max_tokens=1, logprob_token_ids=ids).json()["choices"][0]["logprobs"]
    assert found["top_logprobs"] == [{found["tokens"][0]: -0.5, **dict(zip(names, [-70.0, -40.0, -41.0], strict=True))}]


@pytest.mark.parametrize(
    ("field", "wrong", "says"),
    [
        ("logprob_token_ids", [1] * 129, "at most 128"),
        ("logprob_token_ids", [10**9], "the vocabulary has ids"),
        ("thinking_token_budget", -3, "at least 0"),
        ("repetition_detection", {"max_pattern_size": 3}, "min_count must be an integer at least 2"),
        ("repetition_detection", {"size": 3}, "has 'size'"),
    ],
)
def test_errors_name_the_field(served: Served, field: str, wrong: Any, says: str) -> None:
    for path, body in (("/v1/completions", {"prompt": "abc"}), ("/v1/chat/completions", {"messages": HELLO})):
        answer = served.post(path, **body, **{field: wrong})
        error = answer.json()["error"]
        assert answer.status_code == 400 and error["param"].startswith(field) and says in error["message"]


def test_fields_that_are_for_extensions_change_nothing(served: Served) -> None:
    asked = {"prompt": "abc", "max_tokens": 3}
    texts = [
        served.post("/v1/completions", **asked, **more).json()["choices"][0]["text"] for more in ({}, {"vllm_xargs": {"a": 1}})
    ]
    assert texts[0] == texts[1] == "ab"  # behind the token that begins a text
