"""``appliance serve``: the port first, then the engine, then answers until a signal comes."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import socket
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from appliance.adapters import adapter_limits, read_names
from appliance.config import EngineConfig, ServerConfig
from appliance.hub import called, demo_model, resolve, with_adapters
from appliance.memory.early import check_options
from appliance.memory.planner import MemoryPlan, make_plan
from appliance.memory.proofs import untried
from appliance.memory.together import Wish, named, seats, settled
from appliance.models_file import Entry, read_models
from appliance.server import logs
from appliance.server.audit import check_writable
from appliance.server.beside import give_memory_back
from appliance.server.host import EngineHost
from appliance.server.http import check_tls, raise_file_limit
from appliance.server.keys import Keyring
from appliance.server.options import check_server
from appliance.server.parsers import Parsers
from appliance.server.service import Service
from appliance.server.state import Shared
from appliance.text.defaults import model_defaults
from appliance.text.files import check_tokenizer
from appliance.text.template import explicit_defaults, explicit_template
from quant.errors import InputError


def serve(engine: EngineConfig, server: ServerConfig) -> int:
    """Serve until SIGINT or SIGTERM. Returns the exit code; raises InputError where port, model or options do not do."""
    logs.setup(server)
    check_server(server)
    check_tls(server)
    if server.audit_log:
        check_writable(server.audit_log)
    elif server.audit_content:
        raise InputError("--audit-content needs --audit-log FILE")
    keys = Keyring(server.api_key, server.api_key_file)
    raise_file_limit()
    give_memory_back()
    with contextlib.closing(bind(server.host, server.port)) as sock:
        if not keys.required and not server.insecure:
            check_local(server.host, sock)
        if engine.device == "auto" and (said := untried()) is not None:
            logs.tell(said, server)
        entries, plans, budget = planned(engine, server)
        return asyncio.run(_serve(sock, entries, plans, budget, server))


async def _serve(
    sock: socket.socket, entries: Sequence[Entry], plans: Sequence[MemoryPlan], budget: int, server: ServerConfig
) -> int:
    shared = Shared(server)
    shared.budget = budget if server.models is not None else None
    hosts = [EngineHost(entry, plan, shared) for entry, plan in zip(entries, plans)]
    return await Service(sock, hosts, shared, budget, server).run()


def planned(engine: EngineConfig, server: ServerConfig) -> tuple[list[Entry], Sequence[MemoryPlan], int]:
    """The models with local directories, their plans, and the bytes that they may take together. Says the plans."""
    if server.models is None:
        check(engine, server)
        engine, server = locate(engine, server)
        assert engine.model is not None  # locate() has filled it in
        plan = make_plan(Path(engine.model), engine)
        logs.tell(plan.table(), server)
        return [Entry(server.served_model_name[0], engine, server)], [plan], plan.budget
    if engine.model is not None or server.served_model_name:
        strange = engine.model or "--served-model-name"
        raise InputError(f"--models {server.models} names the models: leave out {strange}")
    entries = read_models(server.models, engine, server)
    for entry in entries:
        with named(entry.name):
            check(entry.engine, entry.server)
    entries = [located(entry) for entry in entries]
    found = seats([Wish(one.name, Path(str(one.engine.model)), one.engine) for one in entries], engine)
    logs.tell(found.text(), server)
    entries = [replace(one, engine=settled(one.engine, plan)) for one, plan in zip(entries, found.plans)]
    return entries, found.plans, found.budget


def check(engine: EngineConfig, server: ServerConfig) -> None:
    """Raises InputError for what needs no model to be refused, before one is looked for, and perhaps fetched."""
    if not all(name.strip() for name in server.served_model_name):
        raise InputError("--served-model-name is empty: clients need a name to ask for")
    check_options(engine)
    read_names(engine.lora_modules)
    Parsers.of(None, server)
    model_defaults(None, server.generation_config)
    if server.chat_template is not None:
        explicit_template(server.chat_template)
    explicit_defaults(server.default_chat_template_kwargs)


def located(entry: Entry) -> Entry:
    with named(entry.name):
        engine, server = locate(entry.engine, entry.server)
        if not engine.skip_tokenizer_init:
            check_tokenizer(Path(str(engine.tokenizer)))  # now, and not when somebody asks for the model
    return replace(entry, engine=engine, server=server)


def bind(host: str, port: int) -> socket.socket:
    """A socket bound to host and port. Raises InputError with one line for the user."""
    if not 0 <= port <= 65535:
        raise InputError(f"--port is 0 to 65535, got {port}")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        sock = socket.socket(family, kind, protocol)
    except UnicodeError:
        raise InputError(f"--host {host} cannot be a name: an address, or a machine's name, is needed") from None
    except OSError as error:
        raise InputError(f"--host {host}: {error.strerror or error}") from None
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(2048)
    except OSError as error:
        sock.close()
        hint = "stop what listens there, or choose another --port (0 picks a free one)"
        raise InputError(f"cannot listen on {host} port {port}: {error.strerror or error}; {hint}") from None
    return sock


def check_local(host: str, sock: socket.socket) -> None:
    """Raises InputError where other machines can reach a server that asks nobody for a key."""
    address = ipaddress.ip_address(sock.getsockname()[0])
    inner = getattr(address, "ipv4_mapped", None) or address
    if not inner.is_loopback:
        hint = (
            "give --api-key-file FILE (`appliance key NAME >> FILE` makes a key) or --api-key, or --insecure where that is meant"
        )
        raise InputError(f"--host {host} lets other machines in, and nobody is asked for a key: {hint}")


def locate(engine: EngineConfig, server: ServerConfig) -> tuple[EngineConfig, ServerConfig]:
    """The same options with local directories for model and tokenizer, and a name under which the model is served."""
    names = server.served_model_name or (called(engine.model or "demo"),)
    directory = resolve(engine.model, engine.revision) if engine.model is not None else demo_model()
    tokenizer = resolve(engine.tokenizer, engine.revision, weights=False) if engine.tokenizer else directory
    engine = with_adapters(replace(engine, model=str(directory), tokenizer=str(tokenizer)))
    if taken := sorted(read_names(engine.lora_modules).keys() & set(names)):
        raise InputError(f"--lora-modules: {taken[0]!r} is a name of the model itself: give the adapter another one")
    if limits := adapter_limits(engine):  # an engine that is started later, with other adapters, has as much room for them
        engine = replace(engine, enable_lora=True, max_loras=limits.count, max_lora_rank=limits.rank)
    return engine, replace(server, served_model_name=tuple(names))
