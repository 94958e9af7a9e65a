"""``appliance tui``: its options. What it shows is imported when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

SWITCH = Parameter(negative=())
LIST = Parameter(negative=())
OWN = Parameter(show_env_var=False)
TRUST = Parameter(negative=(), show_env_var=False)  # see appliance.cli_sources.Variables


def tui(
    *flags: Annotated[str, Parameter(allow_leading_hyphen=True)],
    url: Annotated[tuple[str, ...], LIST] = (),
    api_key: Annotated[tuple[str, ...], LIST] = (),
    model: Annotated[str | None, OWN] = None,
    interval: float = 1.0,
    once: Annotated[bool, SWITCH] = False,
    json: Annotated[bool, SWITCH] = False,
    serve: str | None = None,
    record: Path | None = None,
    replay: Path | None = None,
    ssl_ca_certs: Annotated[str | None, TRUST] = None,
    insecure: Annotated[bool, TRUST] = False,
) -> int:
    """Watch running servers in the terminal, or start one and watch it.

    Parameters
    ----------
    flags
        Behind --: options for the server that --serve starts, as in `appliance tui --serve MODEL -- --max-model-len 8k`.
    url
        Where a server is (default http://127.0.0.1:8000); several may be given. Any server with vLLM's metrics will do.
    api_key
        A key of the server, where it asks for one: one for all servers, or one for each in their order.
    model
        Which to show of a server with several; else the first one.
    interval
        Seconds between two looks.
    once
        Print one look as text, and end.
    json
        Print the server's own /stats as JSON, and end.
    serve
        Start a server for this model (demo: the embedded one) on a free port, and end it with the dashboard.
    record
        Write all that is seen to this file; compressed where its name ends in .gz.
    replay
        Show what such a file has, instead of asking a server.
    ssl_ca_certs
        Trust these certificates (PEM), of a server with one of its own.
    insecure
        Take any certificate.
    """
    from appliance.tui.run import Asked, main

    asked = Asked(url, api_key, interval, once, json, serve, flags, record, replay, ssl_ca_certs, insecure, model)
    return main(asked)
