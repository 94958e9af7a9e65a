"""Flags and commands of vLLM, llama.cpp, SGLang and Ollama, and what becomes of them here."""

from __future__ import annotations

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
    "--lora-paths": "--lora-modules",
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

# Switches that change nothing here; nor do those of vLLM's that turn them off again (--no-...), but for what INSTEAD has.
NOTHING = """
    --allow-deprecated-quantization --async-scheduling --cont-batching --disable-async-output-proc --disable-cascade-attn
    --disable-chunked-mm-input --disable-custom-all-reduce --disable-fastapi-docs --disable-frontend-multiprocessing
    --disable-hybrid-kv-cache-manager --disable-log-stats --disable-mm-preprocessor-cache
    --disable-nccl-for-dp-synchronization --enable-auto-tool-choice --enable-chunked-prefill --enable-log-deltas
    --enable-prompt-tokens-details --enable-reasoning --enable-request-id-headers --enable-server-load-tracking
    --enable-tokenizer-info-endpoint --exclude-tools-when-tool-choice-none --guided-decoding-disable-fallback
    --interleave-mm-strings --jinja --kv-sharing-fast-prefill --kv-unified --language-model-only --log-error-stack --metrics
    --multi-step-stream-outputs --no-context-shift --no-fully-sharded-loras --no-mmap --no-warmup --scheduler-reserve-full-isl
    --skip-mm-profiling --swa-full --trust-remote-code --use-tqdm-on-load --use-v2-block-manager -cb -kvu
"""
SWITCHES = set(NOTHING.split())

BACKENDS = ("{}", *(f'{{"backend":"{name}"}}' for name in ("auto", "xgrammar", "guidance", "outlines", "lm-format-enforcer")))

# Flags with a value, and the values that change nothing here (None: any value).
ANY = """
    --all2all-backend --allowed-local-media-path --allowed-media-domains --attention-backend --attention-config
    --code-revision --compilation-config --cuda-graph-sizes --cudagraph-capture-sizes --distributed-executor-backend
    --distributed-timeout-seconds --fingerprint-mode --guided-decoding-backend --h11-max-header-count
    --h11-max-incomplete-event-size --ignore-patterns --kernel-config --limit-mm-per-prompt --mamba-block-size
    --max-context-len-to-capture --max-cudagraph-capture-size --max-log-len
    --max-long-partial-prefills --max-num-partial-prefills --max-parallel-loading-workers --max-seq-len-to-capture
    --media-io-kwargs --mm-encoder-attn-backend --mm-encoder-tp-mode --mm-processor-cache-gb --mm-processor-cache-type
    --mm-processor-kwargs --mm-shm-cache-max-object-size-mb --model-loader-extra-config --moe-backend --num-lookahead-slots
    --offload-backend --offload-group-size --optimization-level --performance-mode --prefix-caching-hash-algo
    --pt-load-map-location --safetensors-load-strategy --scheduler-delay-factor --sse-keep-alive-interval --stream-interval
    --structured-outputs-config.backend --tokenizer-pool-extra-config --tokenizer-pool-size --tokenizer-pool-type
    --uvicorn-log-level --video-pruning-rate --watermark
"""
VALUED: dict[str, tuple[str, ...] | None] = dict.fromkeys(ANY.split()) | {
    "--additional-config": ("{}",),
    "--allowed-headers": ('["*"]',),
    "--allowed-methods": ('["*"]',),
    "--api-server-count": ("1",),
    "--chat-template-content-format": ("auto", "string"),
    "--config-format": ("auto", "hf"),
    "--convert": ("auto", "none", "embed"),
    "--data-parallel-rank": ("0",),
    "--data-parallel-size": ("1",),
    "--data-parallel-size-local": ("1",),
    "--decode-context-parallel-size": ("1",),
    "--hf-overrides": ("{}",),
    "--mamba-cache-dtype": ("auto", "float32"),
    "--mamba-ssm-cache-dtype": ("auto", "float32"),
    "--kv-cache-dtype-skip-layers": ("[]",),
    "--kv-offloading-backend": ("native",),
    "--load-format": ("auto", "safetensors"),
    "--logprobs-mode": ("raw_logprobs",),
    "--lora-dtype": ("auto",),
    "--lora-extra-vocab-size": ("0",),
    "--long-prefill-token-threshold": ("0",),
    "--model-impl": ("auto", "vllm"),
    "--nnodes": ("1",),
    "--node-rank": ("0",),
    "--num-scheduler-steps": ("1",),
    "--override-generation-config": ("{}",),
    "--pipeline-parallel-size": ("1",),
    "--prefill-context-parallel-size": ("1",),
    "--response-role": ("assistant",),
    "--structured-outputs-config": BACKENDS,
    "--task": ("auto", "generate"),
    "--tensor-parallel-size": ("1",),
    "--tokenizer-mode": ("auto", "hf"),
    "--worker-cls": ("auto",),
}

SIZES = ("--cuda-graph-sizes", "--cudagraph-capture-sizes")  # of those, several numbers may follow

# Flags of ours that take several values in a row.
LISTS = ("--served-model-name", "--api-key", "--lora-modules")

ONE_ENGINE = "one engine per server: start several servers"
LORA = "not supported: LoRA adapters are given with --lora-modules NAME=DIRECTORY, --max-loras and --max-lora-rank; leave it out"
SPECULATION = (
    'there are no draft models; --speculative-config \'{"method": "ngram", "num_speculative_tokens": 5}\' guesses from the text'
)
CONFIG = "not supported: edit config.json in the model's directory"

# What to do instead, for flags that would change something: those above with another value, and those never accepted.
INSTEAD = {
    "--additional-config": "not supported: leave it out",
    "--allow-credentials": "no cookies are used, a key comes in the Authorization header: leave it out",
    "--allowed-headers": "all are allowed to --allowed-origins: leave it out",
    "--allowed-methods": "all are allowed to --allowed-origins: leave it out",
    "--cache-reuse": "what prompts begin with is cached anyway: leave it out",
    "--calculate-kv-scales": "not supported: `appliance quantize --kv-scales` makes some; --kv-cache-dtype int8 needs none",
    "--cpu-offload-params": "--cpu-offload-gb chooses the layers: leave it out",
    "--data-parallel-size": ONE_ENGINE,
    "--disable-access-log-for-endpoints": "health checks, /metrics, /stats and /logs are logged at debug alone: leave it out",
    "--disable-sliding-window": "not supported: a --max-model-len of no more than the window has that effect",
    "--download-dir": "set HF_HOME in the environment",
    "--embedding": "use --runner pooling",
    "--embeddings": "use --runner pooling",
    "--enable-expert-parallel": "only one device is supported: leave it out",
    "--enable-force-include-usage": 'requests say it: "stream_options": {"include_usage": true}',
    "--enable-log-outputs": "the log holds no texts: --audit-log FILE with --audit-content writes them to a file",
    "--enable-offline-docs": "there are no pages of documentation: GET /openapi.json has the description",
    "--enable-per-request-metrics": "the log has a line with the times of each request: leave it out",
    "--enable-prompt-embeds": "embeddings as a prompt are not supported: leave it out",
    "--enable-return-routed-experts": "not supported: leave it out",
    "--enable-sleep-mode": "POST /v1/models/unload frees a model's memory, and --idle-unload does it by itself: leave it out",
    "--enable-ssl-refresh": "certificates are read at start: leave it out, and start the server again for new ones",
    "--fingerprint-value": "not supported: leave it out",
    "--grpc": "only HTTP is spoken here: leave it out",
    "--guided-decoding-disable-any-whitespace": 'requests say it: "structured_outputs": {"disable_any_whitespace": true, ...}',
    "--headless": "one engine per server: leave it out",
    "--hf-config-path": CONFIG,
    "--hf-overrides": CONFIG,
    "--hf-token": "set HF_TOKEN in the environment",
    "--kv-cache-dtype-skip-layers": "all layers have the same --kv-cache-dtype: leave it out",
    "--kv-offloading-backend": "--swap-space is host memory: leave it out",
    "--kv-transfer-config": "the KV cache stays with its server: leave it out",
    "--log-config-file": "use --log-level and --log-format",
    "--long-prefill-token-threshold": "use --max-num-batched-tokens, which bounds every step",
    "--max-num-active-seqs": "use --max-num-seqs",
    "--max-num-queued-tokens": "use --max-num-queued-reqs",
    "--middleware": "not supported: put a proxy in front of the server",
    "--mlock": "not supported: leave it out",
    "--lora-dtype": "adapters are computed in what --dtype says: leave it out",
    "--lora-extra-vocab-size": "adapters with tokens of their own are not supported: leave it out",
    "--mm-encoder-only": "only text is read: leave it out",
    "--no-enable-chunked-prefill": "prompts are always computed in chunks: raise --max-num-batched-tokens for larger ones",
    "--num-gpu-blocks-override": "use --kv-cache-memory-bytes",
    "--numa-bind": "use numactl, or systemd's NUMAPolicy=",
    "--override-generation-config": "write it into a generation_config.json, and name its directory with --generation-config",
    "--plan-only": "appliance plan MODEL tells the same, and loads nothing",
    "--pipeline-parallel-size": "only one device is supported: leave it out",
    "--quantization-param-path": "scales come with the checkpoint: `appliance quantize --kv-scales` makes some",
    "--return-tokens-as-token-ids": 'requests say it: "return_tokens_as_token_ids": true',
    "--root-path": "not supported: let the proxy in front strip the path",
    "--rope-scaling": CONFIG,
    "--slots": "there is no /slots: GET /stats and /metrics tell what runs",
    "--spec-method": SPECULATION,
    "--spec-tokens": SPECULATION,
    "--ssl-cert-reqs": "use --ssl-ca-certs, which asks clients for a certificate",
    "--ssl-ciphers": "not supported: leave it out",
    "--ssl-keyfile-password": "not supported: take the password off the key (openssl pkey), and let nobody else read its file",
    "--structured-outputs-config": "only a backend may be named here; --reasoning-parser is an option of its own",
    "--task": "use --runner: generate, or pooling for embeddings",
    "--system-prompt-file": "requests say it: a message with the role system",
    "--tensor-parallel-size": "only one device is supported: leave it out, or use 1",
    "--tokenizer-revision": "use --revision, which is for the model and its tokenizer",
    "--tokens-only": "prompts may be token ids, and return_token_ids gives those of answers: leave it out",
    "--tool-server": "tools are run by clients: leave it out",
    "--trust-request-chat-template": "templates are not taken from requests: use --chat-template",
    "--uds": "unix sockets are not supported: use --host and --port",
    "-m": "name the model as the first argument: a directory, or organisation/model",
}

# The same for several flags each.
SEVERAL = {
    "--data-parallel-address --data-parallel-backend --data-parallel-external-lb --data-parallel-hybrid-lb --data-parallel-rank "
    "--data-parallel-rpc-port --data-parallel-size-local --data-parallel-start-rank --master-addr --master-port": ONE_ENGINE,
    "--decode-context-parallel-size --prefill-context-parallel-size --nnodes --node-rank --cp-kv-cache-interleave-size "
    "--enable-dbo --dbo-decode-token-threshold --enable-eplb --eplb-config --expert-placement-strategy "
    "--num-redundant-experts": "only one device is supported: leave it out",
    "--io-processor-plugin --logits-processors --logits-processor-pattern --scheduler-cls --worker-cls --worker-extension-cls": (
        "no code from elsewhere is loaded: leave it out"
    ),
    "--tool-parser-plugin --reasoning-parser-plugin": (
        "no code from elsewhere is loaded: --tool-call-parser and --reasoning-parser name one of those that are there"
    ),
    "--cudagraph-metrics --enable-layerwise-nvtx-tracing --enable-logging-iteration-details --enable-mfu-metrics "
    "--kv-cache-metrics --kv-cache-metrics-sample --profiler-config --show-hidden-metrics-for-version": (
        "not supported: GET /metrics and /stats have all that is measured"
    ),
    "--otlp-traces-endpoint --collect-detailed-traces": "no traces are made: each request's X-Request-Id is in the log",
    "--ec-transfer-config --kv-events-config --weight-transfer-config": "the KV cache stays with its server: leave it out",
    "--default-mm-loras --enable-tower-connector-lora": "only text is read: leave it out",
    "--enable-prompt-adapter --prompt-adapters": "prompt adapters are not supported: leave it out",
    "--fully-sharded-loras": "only one device is supported: leave it out",
    "--max-cpu-loras": "adapters stay where the model is, all that are loaded: use --max-loras",
    "--override-pooler-config --pooler-config": "embeddings are the last token's hidden state, as --runner pooling has it",
    "--pooling": "use --runner pooling, which takes the last token's hidden state",
    "--is-embedding": "use --runner pooling",
    "--engine-use-ray --worker-use-ray --ray-workers-use-nsight": "everything runs on one machine, without ray: leave it out",
    "--ngram-prompt-lookup-max --ngram-prompt-lookup-min --spec-decoding-acceptance-method": SPECULATION,
    # llama.cpp's
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
    "-hff --hf-file": "a repository is served as a whole: name it as the first argument",
    "-cram --cache-ram": "use --swap-space",
    "-ot -cmoe -ncmoe --override-tensor --cpu-moe --n-cpu-moe": "use --cpu-offload-gb",
    "--lora --lora-scaled": "use --lora-modules NAME=DIRECTORY, of an adapter as PEFT writes it; requests name it as their model",
    "--lora-init-without-apply": "requests name an adapter as their model, or the model itself: leave it out",
    "-mm --mmproj": "only text is read: leave it out",
    "--log-file --log-disable": "the log goes to stderr: send it where it is to be",
    "--models-dir --models-preset": "use --models FILE",
    "--reasoning-budget": "requests say it: thinking_token_budget, or what the chat template knows in chat_template_kwargs",
    "--sleep-idle-seconds": "use --idle-unload",
    "--reasoning-format": "use --reasoning-parser",
    "--no-webui --no-ui": "use --no-web-ui",
    "--rope-theta --rope-freq-base --rope-freq-scale": CONFIG,
    "--temp --temperature --top-k --top-p --min-p --repeat-penalty --repetition-penalty --presence-penalty --frequency-penalty": (
        "requests say it; for those that do not, the model's generation_config.json, or that of --generation-config DIRECTORY"
    ),
    # SGLang's
    "--model-path": "name the model as the first argument: a directory, or organisation/model",
    "--tp --tp-size": "only one device is supported: leave it out",
    "--context-length": "use --max-model-len",
    "--mem-fraction-static": "use --gpu-memory-utilization",
    "--max-running-requests": "use --max-num-seqs",
    "--max-queued-requests": "use --max-num-queued-reqs",
    "--chunked-prefill-size": "use --max-num-batched-tokens",
    "--disable-radix-cache": "use --no-enable-prefix-caching",
    "--disable-cuda-graph": "use --enforce-eager",
    "--schedule-policy": "use --scheduling-policy",
    "--max-loras-per-batch --max-loaded-loras": "use --max-loras",
}
INSTEAD |= {name: told for names, told in SEVERAL.items() for name in names.split()}

# Of bench serve: names that the other clients here have, and vLLM's flags that change nothing here (with a value or not).
BENCH_RENAMED = {"--url": "--base-url", "--plot": "--svg"}
BENCH_NOTHING = {"--tokenizer": True, "--tokenizer-mode": True, "--trust-remote-code": False, "--skip-tokenizer-init": False}
BENCH_INSTEAD = {
    "--profile": "not supported: leave it out",
    "--lora-modules": "an adapter is asked for as a model: use --model NAME",
    "--use-beam-search": "use --extra-body '{\"use_beam_search\": true}'",
    "--hf-name": "use --dataset-name text, custom or sharegpt with --dataset-path FILE",
}

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
