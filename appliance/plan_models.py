"""``appliance plan --models FILE``: what each of several models takes, and which of them fit on the device together."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from json import dumps

from appliance.config import EngineConfig, ServerConfig
from appliance.hub import headers_of, with_adapters
from appliance.memory.early import check_options
from appliance.memory.plan import PlanError
from appliance.memory.together import Wish, named, seats
from appliance.models_file import read_models
from appliance.plan_command import Asked, chosen_devices
from quant.errors import InputError


def plan_models(file: str, engine: EngineConfig, asked: Asked) -> int:
    """Print it. 0: all fit together; 1: some do not, or one does not fit at all. Raises InputError for bad input."""
    given = {"--sequences": asked.sequences, "--context": asked.context, "--svg": asked.svg, "--check": asked.check}
    strange = [flag for flag, value in {**given, engine.model or "a model": engine.model}.items() if value]
    if strange:
        raise InputError(f"--models plans for several models, and {strange[0]} is for one: leave out one of the two")
    devices = chosen_devices(engine, asked)
    if len(devices) > 1:
        raise InputError("--models plans for one card, and --gpu names several: name one")
    entries = read_models(file, engine, ServerConfig())
    engines = []
    for one in entries:
        with named(one.name):
            check_options(one.engine, devices[0])
            engines.append(with_adapters(one.engine, weights=False))
    with ExitStack() as stack:
        wishes = [
            Wish(one.name, stack.enter_context(headers_of(str(one.engine.model), one.engine.revision)), engine)
            for one, engine in zip(entries, engines, strict=True)
        ]
        try:
            found = seats(wishes, engine, devices[0])
        except PlanError as error:
            if asked.json:
                print(dumps({"fits": False, "error": str(error)}, indent=2))
            print(f"appliance: error: {error}", file=sys.stderr)
            return 1
    print(dumps({"fits": found.all_fit, **found.to_dict()}, indent=2) if asked.json else f"{devices[0].name}\n{found.text()}")
    return 0 if found.all_fit else 1
