"""What people paste from command lines of vLLM, llama.cpp and Ollama.

Flags are renamed, accepted where they change nothing here, or refused with what to do instead; so are commands.
"""

from __future__ import annotations

import json
import re
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
    "auto_round": "auto-round",
    "inc": "auto-round",
    "int8_per_channel_weight_only": "int8",
}

# Switches without a value that change nothing here.
SWITCHES = {
    "--allow-deprecated-quantization",
    "--async-scheduling",
    "--cont-batching",
    "--disable-cascade-attn",
    "--disable-custom-all-reduce",
    "--disable-fastapi-docs",
    "--disable-frontend-multiprocessing",
    "--disable-log-stats",
    "--enable-auto-tool-choice",
    "--enable-chunked-prefill",
    "--enable-prompt-tokens-details",
    "--enable-reasoning",
    "--enable-request-id-headers",
    "--enable-server-load-tracking",
    "--exclude-tools-when-tool-choice-none",
    "--jinja",
    "--language-model-only",
    "--metrics",
    "--no-async-scheduling",
    "--no-enable-lora",
    "--no-mmap",
    "--no-trust-remote-code",
    "--no-use-tqdm-on-load",
    "--trust-remote-code",
    "--use-tqdm-on-load",
    "--use-v2-block-manager",
    "-cb",
}

BACKENDS = ("{}", *(f'{{"backend":"{name}"}}' for name in ("auto", "xgrammar", "guidance", "outlines", "lm-format-enforcer")))

# Flags with a value, and the values that change nothing here (None: any value).
VALUED: dict[str, tuple[str, ...] | None] = {
    "--allowed-headers": ('["*"]',),
    "--allowed-methods": ('["*"]',),
    "--api-server-count": ("1",),
    "--attention-backend": None,
    "--chat-template-content-format": ("auto", "string"),
    "--code-revision": None,
    "--compilation-config": None,
    "--config-format": ("auto", "hf"),
    "--cuda-graph-sizes": None,
    "--cudagraph-capture-sizes": None,
    "--data-parallel-size": ("1",),
    "--distributed-executor-backend": None,
    "--guided-decoding-backend": None,
    "--h11-max-header-count": None,
    "--h11-max-incomplete-event-size": None,
    "--hf-overrides": ("{}",),
    "--limit-mm-per-prompt": None,
    "--load-format": ("auto", "safetensors"),
    "--logprobs-mode": ("raw_logprobs",),
    "--max-cudagraph-capture-size": None,
    "--max-log-len": None,
    "--max-parallel-loading-workers": None,
    "--max-seq-len-to-capture": None,
    "--mm-processor-kwargs": None,
    "--model-impl": ("auto", "vllm"),
    "--num-scheduler-steps": ("1",),
    "--optimization-level": None,
    "--override-generation-config": ("{}",),
    "--performance-mode": None,
    "--pipeline-parallel-size": ("1",),
    "--prefix-caching-hash-algo": None,
    "--response-role": ("assistant",),
    "--runner": ("auto", "generate"),
    "--scheduler-delay-factor": None,
    "--stream-interval": None,
    "--structured-outputs-config": BACKENDS,
    "--structured-outputs-config.backend": None,
    "--task": ("auto", "generate"),
    "--tensor-parallel-size": ("1",),
    "--tokenizer-mode": ("auto", "hf"),
    "--uvicorn-log-level": None,
}

SIZES = ("--cuda-graph-sizes", "--cudagraph-capture-sizes")  # of those, several numbers may follow

# Flags of ours that take several values in a row.
LISTS = ("--served-model-name", "--api-key")

LORA = "LoRA adapters are not supported: merge the adapter into the model"
SPECULATION = (
    'there are no draft models; --speculative-config \'{"method": "ngram", "num_speculative_tokens": 5}\' guesses from the text'
)
CONFIG = "not supported: edit config.json in the model's directory"

# What to do instead, for flags that would change something: those above with another value, and those never accepted.
INSTEAD = {
    "--allow-credentials": "no cookies are used, a key comes in the Authorization header: leave it out",
    "--allowed-headers": "all are allowed to --allowed-origins: leave it out",
    "--allowed-methods": "all are allowed to --allowed-origins: leave it out",
    "--cache-reuse": "what prompts begin with is cached anyway: leave it out",
    "--calculate-kv-scales": "not supported: `appliance quantize --kv-scales` makes some; --kv-cache-dtype int8 needs none",
    "--data-parallel-size": "one engine per server: start several servers",
    "--disable-sliding-window": "not supported: a --max-model-len of no more than the window has that effect",
    "--download-dir": "set HF_HOME in the environment",
    "--embedding": "embeddings are not supported: leave it out",
    "--embeddings": "embeddings are not supported: leave it out",
    "--enable-expert-parallel": "only one device is supported: leave it out",
    "--enable-force-include-usage": 'requests say it: "stream_options": {"include_usage": true}',
    "--enable-log-outputs": "the log holds no texts: --audit-log FILE with --audit-content writes them to a file",
    "--enable-sleep-mode": "sleeping is not supported: leave it out",
    "--headless": "one engine per server: leave it out",
    "--hf-config-path": CONFIG,
    "--hf-overrides": CONFIG,
    "--hf-token": "set HF_TOKEN in the environment",
    "--kv-transfer-config": "the KV cache stays with its server: leave it out",
    "--log-config-file": "use --log-level and --log-format",
    "--max-num-queued-tokens": "use --max-num-queued-reqs",
    "--middleware": "not supported: put a proxy in front of the server",
    "--mlock": "not supported: leave it out",
    "--no-enable-chunked-prefill": "prompts are always computed in chunks: raise --max-num-batched-tokens for larger ones",
    "--num-gpu-blocks-override": "use --kv-cache-memory-bytes",
    "--override-generation-config": "write it into a generation_config.json, and name its directory with --generation-config",
    "--pipeline-parallel-size": "only one device is supported: leave it out",
    "--return-tokens-as-token-ids": 'requests say it: "return_tokens_as_token_ids": true',
    "--root-path": "not supported: let the proxy in front strip the path",
    "--rope-scaling": CONFIG,
    "--slots": "there is no /slots: GET /stats and /metrics tell what runs",
    "--spec-method": SPECULATION,
    "--spec-tokens": SPECULATION,
    "--ssl-cert-reqs": "use --ssl-ca-certs, which asks clients for a certificate",
    "--structured-outputs-config": "only a backend may be named here; --reasoning-parser is an option of its own",
    "--system-prompt-file": "requests say it: a message with the role system",
    "--tensor-parallel-size": "only one device is supported: leave it out, or use 1",
    "--tokenizer-revision": "use --revision, which is for the model and its tokenizer",
    "--uds": "unix sockets are not supported: use --host and --port",
    "-m": "name the model as the first argument: a directory, or organisation/model",
}

# The same for several flags each; most of these are llama.cpp's.
SEVERAL = {
    "-hf -hfr --hf-repo": "name the model as the first argument: organisation/model",
    "-c --ctx-size": "use --max-model-len",
    "-t": "use --threads",
    "-tb --threads-batch": "--threads is for prompts and answers: leave it out",
    "-np --parallel": "use --max-num-seqs",
    "-b -ub --batch-size --ubatch-size": "use --max-num-batched-tokens",
    "-a --alias": "use --served-model-name",
    "-s": "use --seed",
    "-v --verbose": "use --log-level debug",
    "-ctk -ctv --cache-type-k --cache-type-v": "use --kv-cache-dtype, which is for keys and values: fp8, int8 or int4",
    "-fa --flash-attn": "there is one way of computing attention: leave it out",
    "-ngl --n-gpu-layers --gpu-layers": "all layers are on the card with --device cuda, but for what --cpu-offload-gb leaves out",
    "-ts -mg -sm --tensor-split --main-gpu --split-mode": "only one device is supported: leave it out",
    "-n --n-predict --predict": "requests say it: max_tokens",
    "-md --model-draft --draft-max --draft-min --spec-model --speculative-model --num-speculative-tokens": SPECULATION,
    "--chat-template-file": "use --chat-template",
    "--reasoning-format": "use --reasoning-parser",
    "--no-webui": "use --no-web-ui",
    "--rope-theta --rope-freq-base --rope-freq-scale": CONFIG,
    "--temp --temperature --top-k --top-p --min-p --repeat-penalty --repetition-penalty --presence-penalty --frequency-penalty": (
        "requests say it; for those that do not, the model's generation_config.json, or that of --generation-config DIRECTORY"
    ),
}
INSTEAD |= {name: told for names, told in SEVERAL.items() for name in names.split()}

# Commands of others.
COMMANDS = {
    "collect-env": "appliance doctor tells what this machine has",
    "complete": "appliance chat --prompt TEXT asks one question",
    "create": "appliance serve DIRECTORY serves a checkpoint as it is",
    "help": "appliance --help, or appliance COMMAND --help, lists what there is",
    "list": "models are your directories, and what the hub's cache has: none is registered here",
    "ls": "models are your directories, and what the hub's cache has: none is registered here",
    "ps": "appliance tui --once shows what a running server does",
    "pull": "appliance serve ORGANISATION/MODEL fetches a model, and serves it",
    "rm": "models are your directories, and what the hub's cache has: delete them there",
    "run": "appliance chat MODEL talks to a model, appliance serve MODEL serves one",
    "show": "appliance plan MODEL tells what a model is, and what it needs",
    "stop": "a server ends with ctrl-C where it was started, or with SIGTERM",
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
        if joined := re.fullmatch(r"-O(\d)", token):
            name, equals, value = "-O", "=", joined[1]
        name = RENAMED.get(name, name)
        if name in SWITCHES and not equals:
            notes.append(f"{name} changes nothing here")
        elif name in VALUED:
            value = value if equals else _next(name, rest)
            while name in SIZES and rest and rest[0].isdecimal():
                rest.pop(0)
            if (allowed := VALUED[name]) is not None and value.replace(" ", "") not in allowed:
                raise InputError(f"{name} {value}: {INSTEAD.get(name, f'only {allowed[0]} is supported')}")
            notes.append(f"{name} changes nothing here")
        elif name in INSTEAD or "lora" in name:
            raise InputError(f"{name}: {INSTEAD.get(name, LORA)}")
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
