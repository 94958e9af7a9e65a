"""The server's own options, refused by name before anything is loaded where they could not do what they say."""

from __future__ import annotations

import ipaddress
import math
import re
from collections.abc import Sequence
from dataclasses import fields
from urllib.parse import urlsplit

from appliance.config import ServerConfig
from quant.errors import InputError

SECONDS = ("idle_unload", "engine_step_timeout", "shutdown_timeout")
LEAST = {  # with what -1 says, where that is allowed: the least that does, and what the smallest value means
    "max_logprobs": (0, "0 for none"),
    "max_num_queued_reqs": (1, ""),
    "max_stored_responses": (0, "0 for none"),
}
ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[!-~]+")
PORTS = {"http": 80, "https": 443}  # browsers leave these out


def check_server(server: ServerConfig) -> None:
    """Raises InputError for a value that would be ignored, or break a request later."""
    for field in fields(server):
        if (
            field.type == "str | None" and getattr(server, field.name) == ""
        ):  # as of a variable that is not set: a file of keys left out would let everybody in
            raise InputError(f"{_flag(field.name)} is empty: give it a value, or leave it out")
    for name in SECONDS:
        if not 0 <= (seconds := getattr(server, name)) < math.inf:
            raise InputError(f"{_flag(name)} is {seconds:g}: seconds, 0 or more, are needed")
    for name, (least, none) in LEAST.items():
        if (value := getattr(server, name)) < least and value != -1:
            means = f" ({none})" if none else ""
            raise InputError(f"{_flag(name)} is at least {least}{means}, or -1 for no limit, got {value}")
    for name in ("max_prompt_tokens", "max_output_tokens"):
        if (value := getattr(server, name)) is not None and value < 1:
            raise InputError(f"{_flag(name)} is {value}: at least 1 is needed; what the context holds when left out")
    for origin in server.allowed_origins:
        if not _is_origin(origin):
            raise InputError(
                f"--allowed-origins is {origin!r}: what browsers call an origin is needed, as https://chat.example or "
                "http://localhost:3000 (a scheme, a name in small letters, a port if it is not the scheme's own, no path), or *"
            )
    _check_proxies(server.forwarded_allow_ips)


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _is_origin(text: str) -> bool:
    """Whether a browser can send that as its Origin: what it never sends is never let in. Pages out of files have null."""
    if text in ("*", "null"):
        return True
    try:
        parts = urlsplit(text)
        bare = parts.port is None or parts.port != PORTS.get(parts.scheme)
    except ValueError:
        return False
    whole = f"{parts.scheme}://{parts.netloc}" == text and not text.endswith(":")
    return bool(ORIGIN.fullmatch(text)) and whole and bare and "@" not in text and text == text.lower()


def _check_proxies(proxies: Sequence[str]) -> None:
    """uvicorn takes what is no address for the name of a socket, and believes nobody."""
    if "*" in proxies and len(proxies) > 1:
        raise InputError("--forwarded-allow-ips is * and more: * is all there are, give it alone")
    for one in proxies:
        try:
            ipaddress.ip_network(one) if "/" in one else one == "*" or ipaddress.ip_address(one)
        except ValueError as error:
            raise InputError(
                f"--forwarded-allow-ips is {one!r}: an address (10.0.0.1), a network (10.0.0.0/8) or * is needed ({error}); "
                "the option may be given several times"
            ) from None
