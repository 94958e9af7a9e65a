"""``appliance bench serve``: its options. What it does is imported when it runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from cyclopts import App, Parameter

from appliance.config import BenchConfig

app = App(name="bench", help="Measure a server.", result_action="return_value")
OWN = Parameter(show_env_var=False)  # see appliance.cli_sources.Variables


@dataclass(frozen=True, kw_only=True)
class Options(BenchConfig):
    """Variables of these names are a server's."""

    ssl_ca_certs: Annotated[str | None, OWN] = None
    insecure: Annotated[bool, OWN] = False
    model: Annotated[str | None, OWN] = None
    served_model_name: Annotated[str | None, OWN] = None


DEFAULTS = Options()
FLAT = Parameter(name="*", negative_iterable=(), negative_none=(), consume_multiple=True)


@app.command
def serve(*, config: Annotated[Options, FLAT] = DEFAULTS) -> int:
    """Send requests to a server with OpenAI's API, this one or another, and tell how long it took. Exit code 1: some failed.

    Latencies count from when a request should have begun, not from when there was time to send it.
    """
    from appliance.bench.serve import serve

    return serve(config)
