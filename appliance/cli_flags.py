"""Flags that people paste from vLLM command lines: renamed, accepted where they change nothing here, or refused by name."""

from __future__ import annotations

import json
from collections.abc import Sequence

from quant.errors import InputError

RENAMED = {
    "-q": "--quantization",
    "--device-memory-utilization": "--gpu-memory-utilization",
    "--disable-log-requests": "--no-enable-log-requests",
    "--disable-uvicorn-access-log": "--no-enable-log-requests",
    "--kv-cache-memory": "--kv-cache-memory-bytes",
    "--kv-offloading-size": "--swap-space",
    "-tp": "--tensor-parallel-size",
    "-pp": "--pipeline-parallel-size",
    "-dp": "--data-parallel-size",
    "-cc": "--compilation-config",
    "-O": "--optimization-level",
    "-sc": "--speculative-config",
}

# Other names for what the checkpoint says itself.
QUANTIZATION = {
    "awq_marlin": "awq",
    "auto_awq": "awq",
    "gptq_marlin": "gptq",
    "auto_gptq": "gptq",
    "compressed_tensors": "compressed-tensors",
}

# Switches without a value that change nothing here.
SWITCHES = {
    "--async-scheduling",
    "--disable-custom-all-reduce",
    "--disable-fastapi-docs",
    "--disable-frontend-multiprocessing",
    "--disable-log-stats",
    "--enable-auto-tool-choice",
    "--enable-chunked-prefill",
    "--enable-prompt-tokens-details",
    "--exclude-tools-when-tool-choice-none",
    "--no-async-scheduling",
    "--no-trust-remote-code",
    "--trust-remote-code",
    "--use-v2-block-manager",
}

# Flags with a value, and the values that change nothing here (None: any value).
VALUED: dict[str, tuple[str, ...] | None] = {
    "--api-server-count": ("1",),
    "--chat-template-content-format": ("auto", "string"),
    "--code-revision": None,
    "--compilation-config": None,
    "--config-format": ("auto", "hf"),
    "--cudagraph-capture-sizes": None,
    "--data-parallel-size": ("1",),
    "--distributed-executor-backend": None,
    "--guided-decoding-backend": None,
    "--hf-overrides": ("{}",),
    "--limit-mm-per-prompt": None,
    "--load-format": ("auto", "safetensors"),
    "--logprobs-mode": ("raw_logprobs",),
    "--max-cudagraph-capture-size": None,
    "--max-log-len": None,
    "--max-seq-len-to-capture": None,
    "--model-impl": ("auto", "vllm"),
    "--num-scheduler-steps": ("1",),
    "--optimization-level": None,
    "--override-generation-config": ("{}",),
    "--performance-mode": None,
    "--pipeline-parallel-size": ("1",),
    "--response-role": ("assistant",),
    "--runner": ("auto", "generate"),
    "--stream-interval": None,
    "--task": ("auto", "generate"),
    "--tensor-parallel-size": ("1",),
    "--tokenizer-mode": ("auto", "hf"),
    "--uvicorn-log-level": None,
}

# Flags of ours that take several values in a row.
LISTS = ("--served-model-name", "--api-key")

# What to do instead, for flags that would change something: those above with another value, and those never accepted.
INSTEAD = {
    "--data-parallel-size": "one engine per server: start several servers",
    "--download-dir": "set HF_HOME in the environment",
    "--enable-expert-parallel": "only one device is supported: leave it out",
    "--enable-lora": "LoRA adapters are not supported: merge the adapter into the model",
    "--enable-sleep-mode": "sleeping is not supported: leave it out",
    "--hf-token": "set HF_TOKEN in the environment",
    "--lora-modules": "LoRA adapters are not supported: merge the adapter into the model",
    "--max-lora-rank": "LoRA adapters are not supported: merge the adapter into the model",
    "--max-loras": "LoRA adapters are not supported: merge the adapter into the model",
    "--max-num-queued-tokens": "use --max-num-queued-reqs",
    "--no-enable-chunked-prefill": "prompts are always computed in chunks: raise --max-num-batched-tokens for larger ones",
    "--num-gpu-blocks-override": "use --kv-cache-memory-bytes",
    "--pipeline-parallel-size": "only one device is supported: leave it out",
    "--root-path": "not supported: let the proxy in front strip the path",
    "--rope-scaling": "not supported: edit rope_scaling in the model's config.json",
    "--speculative-config": "speculative decoding is not supported: leave it out",
    "--ssl-cert-reqs": "use --ssl-ca-certs, which asks clients for a certificate",
    "--tensor-parallel-size": "only one device is supported: leave it out, or use 1",
    "--tokenizer-revision": "use --revision, which is for the model and its tokenizer",
    "--uds": "unix sockets are not supported: use --host and --port",
}


def translate(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Arguments with foreign flags taken out or renamed, and notes about those. Raises InputError for one that cannot be."""
    out: list[str] = []
    notes: list[str] = []
    rest = list(argv)
    while rest:
        token = rest.pop(0)
        if not token.startswith("-") or token == "--":
            out.append(token)
            continue
        name, equals, value = token.partition("=")
        name = name.replace("_", "-") if name.startswith("--") else name
        name = RENAMED.get(name, name)
        if name in SWITCHES and not equals:
            notes.append(f"{name} changes nothing here")
        elif name in VALUED:
            value = value if equals else _next(name, rest)
            if (allowed := VALUED[name]) is not None and value not in allowed:
                raise InputError(f"{name} {value}: {INSTEAD.get(name, f'only {allowed[0]} is supported')}")
            notes.append(f"{name} changes nothing here")
        elif name in INSTEAD:
            raise InputError(f"{name}: {INSTEAD[name]}")
        else:
            out += _own(name, equals, value, rest)
    return out, notes


def _own(name: str, equals: str, value: str, rest: list[str]) -> list[str]:
    """A flag of ours, in the form that the parser reads."""
    if name == "--quantization":
        value = value if equals else _next(name, rest)
        return [name, QUANTIZATION.get(value, value)]
    if name == "--model":  # becomes the positional one: two models are an error, and both win over environment and file
        return [value if equals else _next(name, rest)]
    if name in LISTS and not equals:  # several values may follow
        values = [_next(name, rest)]
        while rest and not rest[0].startswith("-"):
            values.append(rest.pop(0))
        return [part for one in values for part in (name, one)]
    if name == "--allowed-origins":  # vLLM's is a list in JSON
        value = value if equals else _next(name, rest)
        return [f"{name}={one}" for one in _strings(name, value)]
    return [f"{name}={value}" if equals else name]


def _strings(name: str, value: str) -> list[str]:
    if not value.startswith("["):
        return [value]
    try:
        found = json.loads(value)
    except ValueError:
        found = None
    if not isinstance(found, list) or not all(isinstance(one, str) for one in found):
        raise InputError(f"{name} is an origin, as https://chat.example, or a list of them in JSON, got {value}")
    return found


def _next(name: str, rest: list[str]) -> str:
    if not rest:
        raise InputError(f"{name} needs a value")
    return rest.pop(0)
