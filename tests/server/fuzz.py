"""What schemathesis is told of our API: how to make bodies that get beyond the first check, and which checks hold."""

from __future__ import annotations

import copy
from collections import deque
from itertools import count
from typing import Any

import schemathesis
from hypothesis import strategies as st

from appliance.server.operations import OPERATIONS

# Which fields go together no schema says, so not every body that fits it is served: that check alone is left out.
LEFT_OUT = "positive_data_acceptance"
MOST = {"max_tokens": 16, "max_completion_tokens": 16, "max_output_tokens": 16, "n": 4, "best_of": 4}  # a run shall have an end
LENGTH = {"/v1/chat/completions": "max_completion_tokens", "/v1/responses": "max_output_tokens"}
SLOW = ("/v1/models/load", "/v1/models/unload")
_calls = count()
_kept: deque[str] = deque(maxlen=8)  # ids of responses
ONE_OF = {
    "/tokenize": (("prompt", "messages", "content"), "Hello"),
    "/v1/responses": (("input", "previous_response_id"), "Hello!"),
    "/v1/responses/input_tokens": (("input", "previous_response_id"), "Hello!"),
}


@schemathesis.hook
def before_generate_body(context: Any, strategy: Any) -> Any:
    """Of two bodies one is an example with up to three of the fields that were made up: more often served than all of them."""
    operation = OPERATIONS.get(f"{context.operation.method.upper()} {context.operation.path}")
    if operation is None or operation.example is None:
        return strategy
    example = dict(operation.example)
    names = sorted(operation.body.model_fields.keys() - example.keys())  # type: ignore[union-attr]

    def overlaid(body: Any, chosen: list[str]) -> Any:
        if not isinstance(body, dict):  # one that is wrong on purpose, with an account of what is wrong in it
            return body
        return {**copy.deepcopy(example), **{name: body[name] for name in chosen if name in body}}

    few = st.lists(st.sampled_from(names), max_size=3, unique=True)
    return st.one_of(strategy, st.builds(overlaid, strategy, few))


@schemathesis.hook
def before_call(context: Any, case: Any, kwargs: Any) -> None:
    """Answers are short, models are seldom loaded: a run shall have an end. Where one of some fields is needed, one is there."""
    path = case.operation.path
    if path.startswith("/v1/responses/{") and _kept and next(_calls) % 2:
        case.path_parameters["response_id"] = _kept[-1] if "delete" not in case.method.lower() else _kept.pop()
    if isinstance(case.body, dict):
        names, value = ONE_OF.get(path, ((), None))
        if names and all(case.body.get(name) is None for name in names):
            case.body[names[0]] = value
        for name, most in MOST.items():
            value = case.body.get(name)
            if (type(value) is int and most < value < 2**63) or (value is None and name == LENGTH.get(path)):
                case.body[name] = most
        if path in SLOW and next(_calls) % 10:
            case.body["model"] = "another"


@schemathesis.hook
def after_call(context: Any, case: Any, response: Any) -> None:
    """Of the routes about responses that are kept every second is asked for one that is."""
    if case.operation.path == "/v1/responses" and response.status_code == 200 and "json" in response.headers["content-type"][0]:
        _kept.append(response.json()["id"])
