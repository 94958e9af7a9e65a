"""What the routes about the server, its models and its tokenizer answer, for the description of the API (``openapi.py``)."""

from __future__ import annotations

from typing import Any, Literal, NotRequired

from pydantic import with_config
from typing_extensions import TypedDict  # pydantic knows typing's from Python 3.12 on

from appliance.core.messages import EngineInfo, Stats
from appliance.server.answers import Error

Status = Literal["loading", "ok", "draining", "dead", "unloaded"]


class Model(TypedDict):
    """Of a LoRA adapter ``root`` is its directory, and ``parent`` the model that it belongs to."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None
    max_model_len: int | None
    status: Status
    permission: list[Any]


class Models(TypedDict):
    object: Literal["list"]
    data: list[Model]


class ModelChange(TypedDict):
    success: Literal[True]
    model: str
    status: Status


class Tokens(TypedDict):
    """vLLM's form."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class TokenPiece(TypedDict):
    id: int
    piece: str


class LlamaTokens(TypedDict):
    """llama.cpp's form, which ``content`` asks for."""

    tokens: list[int] | list[TokenPiece]


class Text(TypedDict):
    """The text under both names: vLLM's and llama.cpp's."""

    prompt: str
    content: str


@with_config(extra="allow")
class TokenizerInfo(TypedDict):
    tokenizer_class: str
    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    unk_token: str | None
    chat_template: str | None


class Health(TypedDict):
    status: Literal["ok"]


class NotReady(TypedDict):
    status: Status | Literal["stuck"]
    error: Error
    loaded_bytes: NotRequired[int]
    total_bytes: NotRequired[int]


class Version(TypedDict):
    version: str


class Load(TypedDict):
    server_load: int


class Success(TypedDict):
    success: Literal[True]


class Aborted(TypedDict):
    id: str
    object: Literal["request"]
    aborted: Literal[True]


class LogLine(TypedDict):
    seq: int
    time: str
    level: str
    logger: str
    message: str


class LogLines(TypedDict):
    """``next`` is the ``after`` to ask with next time."""

    lines: list[LogLine]
    next: int


class Latency(TypedDict):
    """Seconds: percentiles of the last minute's values, where there are any."""

    count: int
    sum_s: float
    window: int
    p50_s: float | None
    p95_s: float | None
    p99_s: float | None


class Latencies(TypedDict):
    ttft: Latency
    itl: Latency


class ModelState(TypedDict):
    """``bytes``: that it takes while loaded, where that is known; ``waiting``: requests that wait for it to be loaded."""

    name: str
    names: list[str]
    state: Status
    bytes: int | None
    waiting: int


class ServerStats(TypedDict):
    """``engine.requests_now`` has for each request also whose it is and what it asked for, where the server knows."""

    version: str
    model: str
    state: Status
    uptime_s: float
    info: EngineInfo | None
    engine: Stats
    latency: Latencies
    hardware: dict[str, Any]
    loading: tuple[int, int] | None
    models: list[ModelState]
