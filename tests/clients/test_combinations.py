"""Options of completions and chat in random company: a stream adds up to the whole answer, and both to what was asked for."""

from __future__ import annotations

import json
import random
from typing import Any

import httpx
import pytest

from tests.server.test_real import Running

PROMPTS = ("The capital", "2 plus 3 is", "Hello", "day after", "a", "ö日 mixed 😀")


def streamed(http: httpx.Client, path: str, body: dict[str, Any]) -> tuple[list[dict[str, Any]], Any]:
    """The sum of a stream: its choices, and the usage at its end."""
    options = {"include_usage": True}
    response = http.post(path, json={**body, "stream": True, "stream_options": options})
    assert response.status_code == 200, response.text
    chunks = [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: {")]
    assert all("error" not in chunk for chunk in chunks), chunks[-1]
    choices: dict[int, dict[str, Any]] = {}
    for one in (choice for chunk in chunks for choice in chunk["choices"]):
        mine = choices.setdefault(one["index"], {"text": "", "logprobs": None, "token_ids": [], "finish_reason": None})
        assert mine["finish_reason"] is None, "news behind the end"
        delta = one.get("delta", {"content": one.get("text")})
        mine["text"] += delta.get("content") or ""
        mine["token_ids"] += one.get("token_ids") or []
        mine["logprobs"] = joined(mine["logprobs"], one["logprobs"])
        mine["finish_reason"], mine["stop_reason"] = one["finish_reason"], one.get("stop_reason")
        if one.get("prompt_token_ids") is not None:
            assert "prompt_token_ids" not in mine
            mine["prompt_token_ids"] = one["prompt_token_ids"]
    return [choices[index] for index in sorted(choices)], chunks[-1]["usage"]


def joined(first: Any, more: Any) -> Any:
    if first is None or more is None:
        return first or more
    return {name: (first[name] or []) + (more[name] or []) or None for name in first}


def whole(http: httpx.Client, path: str, body: dict[str, Any]) -> tuple[list[dict[str, Any]], Any]:
    response = http.post(path, json=body)
    assert response.status_code == 200, response.text
    answer = response.json()
    choices = []
    for one in answer["choices"]:
        text = one["message"]["content"] if "message" in one else one["text"]
        kept = {name: one[name] for name in ("logprobs", "finish_reason", "stop_reason", "prompt_token_ids") if name in one}
        choices.append({"text": text, "token_ids": one.get("token_ids", []), **kept})
    return choices, answer["usage"]


def some(rng: random.Random, *, chat: bool) -> dict[str, Any]:
    n = rng.choice((1, 1, 2, 3))
    body: dict[str, Any] = {"n": n, "seed": rng.randrange(99), "temperature": rng.choice((0.0, 1.0)) if n == 1 else 1.2}
    body["max_tokens"] = rng.choice((1, 2, 7, 20))
    if chat:
        body |= {"logprobs": True, "top_logprobs": rng.choice((0, 1, 3))} if rng.random() < 0.5 else {}
    else:
        body |= {"logprobs": rng.choice((0, 1, 3))} if rng.random() < 0.6 else {}
        body |= {"echo": True, "max_tokens": rng.choice((0, 1, 7))} if rng.random() < 0.5 else {}
    options: list[dict[str, Any]] = [
        {"stop": rng.sample(["o", " is", "e", "th", "😀", ". "], 2), "include_stop_str_in_output": rng.random() < 0.5},
        {"best_of": n},
        {"return_token_ids": True},
        {"return_tokens_as_token_ids": True},
        {"truncate_prompt_tokens": rng.choice((-1, 1, 2, 3)), "truncation_side": rng.choice(("left", "right"))},
        {"ignore_eos": True},
        {"min_tokens": min(2, body["max_tokens"])},
        {"skip_special_tokens": False},
        {"logit_bias": {"2": 5, "40": 3}},
        {"presence_penalty": 0.5, "repetition_penalty": 1.2},
        {"stop_token_ids": [40, 41]},
        {"add_special_tokens": rng.random() < 0.5},
    ]
    for option in rng.sample(options, rng.randrange(4)):
        body |= option
    if rng.random() < 0.1 and "stop" not in body:
        body = {name: body[name] for name in ("n", "max_tokens", "logprobs", "echo", "return_token_ids") if name in body}
        body |= {"use_beam_search": True, "max_tokens": max(1, body["max_tokens"])}
    return body


@pytest.mark.parametrize("seed", range(16))
def test_completions(live: Running, seed: int) -> None:
    rng = random.Random(seed)
    body = some(rng, chat=False)
    with live.http as http:
        given: list[Any] = rng.sample(PROMPTS, rng.choice((1, 1, 3)))
        if rng.random() < 0.3:
            given = [http.post("/tokenize", json={"prompt": text}).json()["tokens"] for text in given]
        body["prompt"] = given[0] if len(given) == 1 and rng.random() < 0.5 else given
        choices, usage = whole(http, "/v1/completions", body)
        check(choices, *streamed(http, "/v1/completions", body), usage)
        assert len(choices) == len(given) * body["n"]
        scored = ask_for_scores(http, body, given)
        if "best_of" not in body and not body.get("use_beam_search"):
            for k, one in enumerate(given):  # alone as in company
                alone, _ = whole(http, "/v1/completions", {**body, "prompt": one})
                assert [c["text"] for c in alone] == [c["text"] for c in choices[k * body["n"] : (k + 1) * body["n"]]]
    for c, choice in enumerate(choices):
        prompt, scores = scored[c // body["n"]]
        if body.get("echo"):
            text = given[c // body["n"]]
            assert choice["text"].startswith(text) if isinstance(text, str) and "truncate_prompt_tokens" not in body else True
        if choice["logprobs"] is None:
            assert body.get("logprobs") is None
            continue
        found = choice["logprobs"]
        assert len({*map(len, found.values())}) == 1 and found["text_offset"] == sorted(found["text_offset"])
        echoed = len(prompt) if body.get("echo") else 0
        assert len(found["tokens"]) - echoed == len(choice["token_ids"]) or "return_token_ids" not in body
        assert len(found["tokens"]) - echoed <= body["max_tokens"]
        if echoed:
            assert found["token_logprobs"][0] is None and found["top_logprobs"][0] is None
            assert found["token_logprobs"][1:echoed] == pytest.approx(scores[1:], abs=2e-2)  # another batch, other roundings
        for score, top in zip(found["token_logprobs"][1:], found["top_logprobs"][1:]):
            assert score in top.values() and len(top) <= body["logprobs"] + 1


def test_what_is_computed_for_echo_alone_ends_nothing(live: Running) -> None:
    body = {"prompt": "Hello", "max_tokens": 0, "echo": True, "logprobs": 0, "stop_token_ids": [*range(640)], "stop": ["!"]}
    with live.http as http:
        (choice,), usage = whole(http, "/v1/completions", body)
        assert choice["finish_reason"] == "length" and choice["stop_reason"] is None and usage["completion_tokens"] == 0
        check([choice], *streamed(http, "/v1/completions", body), usage)


@pytest.mark.parametrize(("prompt_logprobs", "logprobs"), [(0, 3), (4, 1), (2, 0)])
def test_two_wishes_for_scores_of_the_prompt(live: Running, prompt_logprobs: int, logprobs: int) -> None:
    """Each gets as many as it asked for."""
    body = {"prompt": "The capital", "max_tokens": 1, "echo": True, "logprobs": logprobs, "prompt_logprobs": prompt_logprobs}
    with live.http as http:
        (choice,) = http.post("/v1/completions", json=body).json()["choices"]
    echoed = choice["logprobs"]["top_logprobs"][1 : len(choice["prompt_logprobs"])]
    assert all(max(1, logprobs) <= len(top) <= logprobs + 1 for top in echoed) and len(echoed) >= 2
    scores = choice["prompt_logprobs"][1:]
    assert all(max(1, prompt_logprobs) <= len(one) <= prompt_logprobs + 1 for one in scores)
    told = choice["logprobs"]["token_logprobs"][1 : len(scores) + 1]
    assert all(score in [one["logprob"] for one in entry.values()] for score, entry in zip(told, scores))


@pytest.mark.parametrize("by_ids", [False, True])
def test_offsets_point_into_the_text(live: Running, by_ids: bool) -> None:
    """Though the tokenizer puts a token ahead that is not shown, and the end of text is not shown either."""
    with live.http as http:
        ids = http.post("/tokenize", json={"prompt": "The capital"}).json()["tokens"]
        body = {"prompt": ids if by_ids else "The capital", "max_tokens": 40, "temperature": 0, "echo": True, "logprobs": 0}
        for more in ({}, {"return_tokens_as_token_ids": True}, {"echo": False}):
            (choice,), _ = whole(http, "/v1/completions", {**body, **more})
            found, text = choice["logprobs"], choice["text"]
            names = http.post("/v1/completions", json={**body, "echo": more.get("echo", True)}).json()["choices"][0]["logprobs"][
                "tokens"
            ]
            assert choice["finish_reason"] == "stop" and names[-1] == "<|end|>" and text[-1] == "."
            begun = [text[at : at + len(name)] == name for at, name in zip(found["text_offset"], names)]
            assert begun == [by_ids or "echo" in more, *[True] * (len(names) - 2), False]
            (told,), _ = streamed(http, "/v1/completions", {**body, **more})
            assert told["logprobs"]["text_offset"] == found["text_offset"]


@pytest.mark.parametrize("stream", [False, True])
def test_wishes_that_leave_no_token(live: Running, stream: bool) -> None:
    """That is known when it comes to it, and the request's own fault all the same: after a 5xx its client would come again."""
    wishes = {"allowed_token_ids": [40, 41], "structured_outputs": {"regex": "é"}, "stream": stream, "prompt": "Hello"}
    with live.http as http:
        response = http.post("/v1/completions", json=wishes)
    error = response.json()["error"]
    assert (
        response.status_code == 400
        and error["type"] == "invalid_request_error"
        and "every token is ruled out" in error["message"]
    )


@pytest.mark.parametrize(("body", "asked"), [({}, 16), ({"max_tokens": 5}, 5), ({"max_tokens": 0, "echo": True}, 1)])
def test_a_prompt_is_cut_to_leave_room_for_its_answer(live: Running, body: dict[str, Any], asked: int) -> None:
    with live.http as http:
        ids = http.post("/tokenize", json={"prompt": "one two three " * 300}).json()["tokens"]
        more = {"prompt": ids, "truncate_prompt_tokens": -1, "ignore_eos": True}
        usage = http.post("/v1/completions", json={**more, **body}).json()["usage"]
    assert usage["prompt_tokens"] == 512 - asked and usage["completion_tokens"] == body.get("max_tokens", 16)


def ask_for_scores(http: httpx.Client, body: dict[str, Any], given: list[Any]) -> list[tuple[list[int], list[float | None]]]:
    """Each prompt as it came to the engine, and the log-probabilities of its tokens."""
    keep = {name: body[name] for name in ("truncate_prompt_tokens", "truncation_side", "add_special_tokens") if name in body}
    asked = {"prompt": given, "max_tokens": max(1, body["max_tokens"]), "prompt_logprobs": 0, "return_token_ids": True, **keep}
    choices = http.post("/v1/completions", json=asked).json()["choices"]
    found = []
    for choice in choices:
        ids = choice["prompt_token_ids"]
        scores = [one and one[str(token)]["logprob"] for token, one in zip(ids, choice["prompt_logprobs"])]
        found.append((ids, scores))
    return found


@pytest.mark.parametrize("seed", range(8))
def test_chat(live: Running, seed: int) -> None:
    rng = random.Random(1000 + seed)
    body = some(rng, chat=True)
    turns = rng.choice((1, 3))
    body["messages"] = [{"role": ("user", "assistant")[i % 2], "content": rng.choice(PROMPTS)} for i in range(turns)]
    if rng.random() < 0.2:
        body["messages"].append({"role": "assistant", "content": "The capital of"})
        body |= {"continue_final_message": True, "add_generation_prompt": False}
    with live.http as http:
        choices, usage = whole(http, "/v1/chat/completions", body)
        check(choices, *streamed(http, "/v1/chat/completions", body), usage)
    assert len(choices) == body["n"] and all((one["logprobs"] is not None) == bool(body.get("logprobs")) for one in choices)


def check(choices: list[dict[str, Any]], told: list[dict[str, Any]], at_end: Any, usage: Any) -> None:
    """What a stream told is what the whole answer has; of usage only what is found in the cache may differ."""
    assert [{**one, "logprobs": None} for one in told] == [{**one, "logprobs": None} for one in choices]
    for one, other in zip(told, choices):
        assert rounded(one["logprobs"]) == rounded(other["logprobs"])
    for one in (at_end, usage):
        one.pop("prompt_tokens_details")
    assert at_end == usage


def rounded(value: Any) -> Any:
    """Without what the company of other requests does to the last digits."""
    if isinstance(value, float):
        return round(value, 1)
    if isinstance(value, list):
        return [rounded(one) for one in value]
    return {name: rounded(one) for name, one in value.items()} if isinstance(value, dict) else value
