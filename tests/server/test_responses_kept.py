"""Responses that are kept: asked for again, gone on with, cancelled, each key's own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from appliance.config import EngineConfig, ServerConfig
from appliance.core.params import RequestError
from appliance.server.responses import answer
from appliance.server.responses.store import Record, ResponseStore
from appliance.text.tokenizer import Tokenizer
from tests.server.conftest import Served, serve_in_thread
from tests.server.fake import FakeClient
from tests.server.responses import ask, kinds, say
from tests.server.test_lifecycle import eventually
from tests.server.test_tools import prompt_of, serve


@pytest.fixture(scope="module")
def hermes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serve(tmp_path_factory.mktemp("hermes"), "Hermes") as one:
        yield one


def test_instructions_do_not_carry_over(hermes: Served) -> None:
    say(hermes, "Yes.")
    first = ask(
        hermes, instructions="Be brief.", input=[{"role": "developer", "content": "And kind."}, {"role": "user", "content": "a"}]
    )
    assert prompt_of(hermes) == "<s>system: Be brief.\n\nAnd kind.user: aassistant: "
    ask(hermes, previous_response_id=first["id"], input="b")
    assert prompt_of(hermes) == "<s>system: And kind.user: aassistant: Yes.user: bassistant: "


def test_reasoning_comes_back_to_the_template(hermes: Served) -> None:
    say(hermes, "<think>Hm.</think>Yes.")
    first = ask(hermes)
    assert kinds(first) == ["reasoning", "message"] and first["usage"]["output_tokens_details"]["reasoning_tokens"] > 0
    ask(hermes, previous_response_id=first["id"], input="b")
    assert "assistant: <think>Hm.</think>Yes.user: b" in prompt_of(hermes)
    by_id = [{"type": "item_reference", "id": item["id"]} for item in first["output"]]
    ask(hermes, input=[{"role": "user", "content": "hello"}, *by_id, {"role": "user", "content": "b"}])
    assert "user: helloassistant: <think>Hm.</think>Yes.user: b" in prompt_of(hermes)


def test_what_is_kept(hermes: Served) -> None:
    client = hermes.openai
    say(hermes, "Yes.")
    kept = client.responses.create(model="tiny", input="hello")
    assert client.responses.retrieve(kept.id).to_dict() == kept.to_dict()
    page = client.responses.input_items.list(kept.id)
    assert [part.text for item in page for part in item.content] == ["hello"]  # type: ignore[union-attr]
    client.responses.delete(kept.id)
    loose = client.responses.create(model="tiny", input="hello", store=False)
    for gone in (kept.id, loose.id, "resp_of_nobody"):
        with pytest.raises(openai.NotFoundError) as caught:
            client.responses.retrieve(gone)
        assert caught.value.code == "response_not_found"
        with pytest.raises(openai.BadRequestError) as refused:
            client.responses.create(model="tiny", input="on", previous_response_id=gone)
        assert refused.value.code == "previous_response_not_found"
    named = {"X-Request-Id": "mine"}
    first, second = (client.responses.create(model="tiny", input=text, extra_headers=named) for text in "ab")
    assert first.id == "resp_mine" != second.id and second.id.startswith("resp_mine_")
    with pytest.raises(openai.BadRequestError, match="has ended already"):
        client.responses.cancel(first.id)


def test_cancel(hermes: Served) -> None:
    say(hermes, "y" * 4000)
    hermes.client.delay_s = 0.005
    try:
        with hermes.openai.responses.create(model="tiny", input="hello", stream=True) as stream:
            for event in stream:
                if event.type == "response.created":
                    running = event.response.id
                if event.type == "response.output_text.delta":
                    break
            assert hermes.openai.responses.retrieve(running).status == "in_progress"
            with pytest.raises(openai.BadRequestError, match="still in progress"):
                hermes.openai.responses.create(model="tiny", input="on", previous_response_id=running)
            assert hermes.openai.responses.cancel(running).status == "cancelled"
            last = list(stream)[-1]
        assert (
            last.type == "response.incomplete"
            and last.response.status == "cancelled"
            and last.response.output_text.startswith("y")
        )
        assert hermes.openai.responses.retrieve(running).status == "cancelled"
        with hermes.openai.responses.create(model="tiny", input="hello", stream=True) as stream:
            gone = next(event.response.id for event in stream if event.type == "response.created")
        eventually(lambda: not hermes.client.running)
        assert hermes.state.shared.responses.find(None, gone) is None  # its client went away
    finally:
        hermes.client.delay_s = 0.0


def test_each_key_has_its_own(tokenizer: Tokenizer, model_dir: Path) -> None:
    config = ServerConfig(served_model_name=("tiny",), api_key=("sk-first-first", "sk-second-second"), max_stored_responses=2)
    with serve_in_thread(FakeClient, tokenizer, EngineConfig(model=str(model_dir)), config) as one:
        first, second = (one.openai.with_options(api_key=key) for key in config.api_key)
        mine = first.responses.create(model="tiny", input="hello", max_output_tokens=2)
        for refused in (
            second.responses.retrieve,
            second.responses.delete,
            second.responses.cancel,
            second.responses.input_items.list,
        ):
            with pytest.raises(openai.NotFoundError):
                refused(mine.id)
        with pytest.raises(openai.BadRequestError):
            second.responses.create(model="tiny", input="on", previous_response_id=mine.id)
        with pytest.raises(openai.BadRequestError, match="no item of that id"):
            second.responses.create(model="tiny", input=[{"type": "item_reference", "id": mine.output[0].id}])  # type: ignore[arg-type,list-item]
        for _ in range(3):
            second.responses.create(model="tiny", input="hello", max_output_tokens=2)
        assert first.responses.retrieve(mine.id).id == mine.id
        for _ in range(2):
            first.responses.create(model="tiny", input="hello", max_output_tokens=2)
        with pytest.raises(openai.NotFoundError):
            first.responses.retrieve(mine.id)


def test_references_cost_no_more_than_what_they_refer_to(hermes: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """A response is read once for all references to its items, and an item is taken once: a small body stays small."""
    say(hermes, "Yes.")
    items = [{"role": "user", "id": f"msg_{i}", "content": "hello"} for i in range(300)]
    kept = hermes.post("/v1/responses", model="tiny", input=items).json()
    reads, read = [], Record.items.fget
    monkeypatch.setattr(Record, "items", property(lambda record: reads.append(record.id) or read(record)))  # type: ignore[misc]
    by_id = [{"type": "item_reference", "id": item["id"]} for item in items]
    assert hermes.post("/v1/responses", model="tiny", input=[*by_id, {"role": "user", "content": "on"}]).status_code == 200
    assert reads == [kept["id"]] and prompt_of(hermes).count("user: hello") == 300
    again = hermes.post("/v1/responses", model="tiny", input=[by_id[7], *by_id])
    assert again.status_code == 400
    assert again.json()["error"]["message"] == "input[8].id is 'msg_7': the input has that item already"


def test_a_circle_of_responses_has_an_end(hermes: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """An id is free again once its response is deleted, also for one that goes on with it and is under way by then."""
    client, named, begin = hermes.openai, {"X-Request-Id": "round"}, answer._begin
    first = client.responses.create(model="tiny", input="hello", extra_headers=named)

    async def deleted_meanwhile(*args: Any) -> Any:
        hermes.state.shared.responses.delete(None, first.id)
        return await begin(*args)

    with monkeypatch.context() as patch:
        patch.setattr(answer, "_begin", deleted_meanwhile)
        second = client.responses.create(model="tiny", input="on", previous_response_id=first.id, extra_headers=named)
    assert second.id == second.previous_response_id == first.id
    with pytest.raises(openai.BadRequestError) as refused:
        client.responses.create(model="tiny", input="on", previous_response_id=second.id)
    assert refused.value.code == "previous_response_not_found"
    store = ResponseStore(3)
    for name, previous in ("ab", "bc", "ca"):
        store.put(None, record(name, previous))
    with pytest.raises(RequestError, match="'a' is kept here"):
        store.chain(None, "a")


def record(name: str, previous: str | None = None, size: int = 0) -> Record:
    return Record.of({"id": name, "previous_response_id": previous, "output": [], "x": "y" * size}, [])


def test_the_store_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    store = ResponseStore(3)
    for name in "abc":
        store.put("alice", record(name, chr(ord(name) - 1) if name > "a" else None))
    store.put("bob", record("a"))
    assert [one.id for one in store.chain("alice", "c")] == ["a", "b", "c"]
    store.put("alice", record("d"))
    assert store.find("alice", "a") is None and store.find("bob", "a") is not None
    with pytest.raises(RequestError, match="'a' is kept here"):
        store.chain("alice", "c")
    assert store.find("carol", "d") is None and store.find(None, "d") is None
    monkeypatch.setattr("appliance.server.responses.store.KEY_BYTES", 1000)
    for name in "xyz":
        store.put("alice", record(name, size=400))
    assert store.find("alice", "x") is None and store.find("alice", "y") is not None
    monkeypatch.setattr("appliance.server.responses.store.ALL_BYTES", 1000)
    store.put("bob", record("e", size=100))
    assert store.find("alice", "z") is None and store.find("bob", "a") is not None and store.find("bob", "e") is not None
    endless = ResponseStore(-1)
    for name in "abcde":
        endless.put(None, record(name))
    assert all(endless.find(None, name) for name in "abcde")
    nothing = ResponseStore(0)
    nothing.put(None, record("a"))
    assert nothing.find(None, "a") is None
