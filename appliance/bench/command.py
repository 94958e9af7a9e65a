"""``appliance bench serve``: its options. What it does is imported when it runs."""

from __future__ import annotations

from typing import Annotated

from cyclopts import App, Parameter

from appliance.config import BenchConfig

app = App(name="bench", help="Measure a server.", result_action="return_value")
DEFAULTS = BenchConfig()


FLAT = Parameter(name="*", negative_iterable=(), negative_none=(), consume_multiple=True)


@app.command
def serve(*, config: Annotated[BenchConfig, FLAT] = DEFAULTS) -> int:
    """Send requests to a server with OpenAI's API, this one or another, and tell how long it took. Exit code 1: some failed.

    Latencies count from when a request should have begun, not from when there was time to send it.
    """
    from appliance.bench.serve import serve

    return serve(config)
