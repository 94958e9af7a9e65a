"""Every option once: name, default, type and help. The command line, TOML files and the environment are made from these."""

from __future__ import annotations

from dataclasses import dataclass, field

GIB = 1024**3


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """What the engine needs to know. Nothing is ever written back into it."""

    model: str | None = None
    """A directory with a Hugging Face checkpoint, or a name on the hub; demo, the embedded model, when left out."""
    tokenizer: str | None = None
    """Where the tokenizer is, if not with the model."""
    revision: str | None = None
    """Branch, tag or commit of a model that comes from the hub."""
    quantization: str | None = None
    """awq, gptq, auto-round, compressed-tensors, fp8, mxfp4, modelopt or none. Read from the checkpoint when not given; another
    one is an error. int8 or int4: the layers of an unquantized checkpoint are rounded to so many bits while it is loaded."""
    dtype: str = "auto"
    """Activations: auto, float16 (half), bfloat16, float32 (float)."""
    lm_head_dtype: str = "auto"
    """What an unquantized output head (and an embedding tied to it) is stored as: int8, int4, model (as --dtype says); auto: int8
    with native CPU kernels and on a card, unless --dtype is float32."""
    embedding_dtype: str = "auto"
    """What an unquantized embedding that is not one with the head is stored as: int8, int4, model (as --dtype says, and what auto
    is). It saves memory, not time."""
    activation_dtype: str = "auto"
    """What kernels round activations to for products with integer weights: int8 (a scale for 128 inputs) or bf16 (they stay as
    they are); auto: int8 with native CPU kernels, unless --dtype is float32, and on a card what the checkpoint asks for."""
    runner: str = "auto"
    """generate: the model generates text; pooling: it makes embeddings, the hidden state behind a text's last token; auto: what
    it was made for (sentence-transformers' modules.json)."""
    device: str = "auto"
    """cpu or cuda; auto: an NVIDIA card that --device cuda has tried and found right once, else the CPU."""
    max_model_len: int | str = "auto"
    """Longest prompt plus answer, in tokens (32k is understood); auto: the longest that the model and the memory allow."""
    gpu_memory_utilization: float | None = None
    """The most memory that the engine takes, all in all: a share of a card's total (default 0.92), or of what is available at
    start on the CPU (default 0.5), where the server itself comes on top (docs/operations.md). Unused where
    kv-cache-memory-bytes is given."""
    gpu_memory_reserve: int | str | None = None
    """Memory that stays free: bytes, or as 2GiB or 2G. Where given, gpu-memory-utilization is 1 unless that is given too."""
    kv_cache_memory_bytes: int | str | None = None
    """Size of the KV cache: bytes, or as 2GiB or 2G. It decides alone: gpu-memory-utilization then counts for nothing."""
    kv_cache_dtype: str = "auto"
    """What keys and values are stored as: auto (as --dtype says), fp8 (fp8_e4m3), fp8_e5m2, int8 or int4."""
    swap_space: float | str = 0.0
    """Host memory for preempted sequences and for cached prefixes that the pool has no room for: in GiB, or as 512MiB."""
    enable_prefix_caching: bool = True
    """Keep the blocks of finished requests while nobody needs their room, for later prompts that begin alike. Of models
    whose layers keep states (Qwen3.5) also a few of these states, with memory of their own."""
    cpu_offload_gb: float = 0.0
    """GiB of a card to free: weights of so many layers stay in host memory and are streamed in ahead of their use."""
    block_size: int | str = "auto"
    """Tokens in one KV block: 8, 16, 32, 64, 128 or 256; auto: 64 on a card, where attention then reads a block at a time, and 16
    elsewhere."""
    max_num_batched_tokens: int = 2048
    """Most tokens in one step, prompts and answers together."""
    max_num_seqs: int | str = "auto"
    """Most sequences in one step; auto: as many as the KV cache has room for at a fair length, up to 256."""
    scheduling_policy: str = "fcfs"
    """fcfs: requests are served in order of arrival; priority: those with a lower priority field first."""
    preemption_mode: str = "auto"
    """What happens to a sequence that must give way: swap (to --swap-space, which must be given), recompute, or auto: whichever
    costs less."""
    speculative_config: str | None = None
    """On a CPU: guess what comes next from what the text has said already, and compute it together with the next token. JSON:
    {"method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_min": 2, "prompt_lookup_max": 5}."""
    enable_lora: bool = False
    """Let requests ask for LoRA adapters of the model: memory for --max-loras of them, of rank --max-lora-rank, is set aside."""
    lora_modules: tuple[str, ...] = ()
    """Adapters to load at start, as NAME=DIRECTORY: a request names one as its model. They switch --enable-lora on."""
    max_loras: int | None = None
    """Most adapters that are loaded at a time; as many as --lora-modules names when left out, and at least 1."""
    max_lora_rank: int | None = None
    """Largest rank of an adapter; that of --lora-modules when left out, and at least 16."""
    enforce_eager: bool = False
    """On a card: launch the kernels of every step one by one, instead of replaying recorded decode steps (CUDA graphs)."""
    seed: int = 0
    """Seeds the requests that bring no seed of their own."""
    threads: int | None = None
    """CPU threads; default: the physical cores. (APPLIANCE_CPU_ISA in the environment chooses the instruction set.)"""
    skip_tokenizer_init: bool = False
    """Work on token ids alone."""
    reference_ops: bool = False
    """Compute with the slow reference operators."""


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """What the HTTP server needs to know."""

    host: str = "127.0.0.1"
    """Address to listen on."""
    port: int = 8000
    """Port to listen on; 0 picks a free one and prints it."""
    served_model_name: tuple[str, ...] = ()
    """Names under which the model answers; the first one is the one returned."""
    chat_template: str | None = None
    """A Jinja file, or the template itself, instead of the model's own."""
    default_chat_template_kwargs: str | None = None
    """What the chat template is told where requests do not say otherwise in chat_template_kwargs, in JSON:
    '{"enable_thinking": false}'."""
    tool_call_parser: str = "auto"
    """How the model writes tool calls: auto (its chat template says), none, hermes, llama3_json, mistral, openai, ..."""
    reasoning_parser: str = "auto"
    """How the model marks its reasoning: auto (its chat template says), none, deepseek_r1, qwen3, openai_gptoss, ..."""
    strict_requests: bool = False
    """Refuse requests with unknown fields (400) instead of naming them once in the log."""
    generation_config: str = "auto"
    """auto: the model's generation_config.json gives the sampling defaults; a directory: the one there; appliance: its own
    defaults are used."""
    max_logprobs: int = 20
    """Most logprobs a request may ask for; -1 for no limit."""
    api_key: tuple[str, ...] = field(default=(), repr=False)
    """A key that requests must bring; several may be given. In the environment it is not seen in the list of processes."""
    api_key_file: str | None = None
    """A file of hashed keys with names, limits and expiry, as `appliance key` prints them; read again when it changes."""
    api_key_usage: str | None = None
    """Where the server keeps what keys with a limit of tokens per day have used; FILE.used beside the keys when left out."""
    insecure: bool = False
    """Listen beyond this machine without asking for keys."""
    max_num_queued_reqs: int = 1024
    """Most requests that wait for their first token; more are refused (503). -1 for no limit."""
    max_prompt_tokens: int | None = None
    """Most tokens in one prompt; longer ones are refused. What the context holds when left out."""
    max_output_tokens: int | None = None
    """Most tokens in one answer, whatever it asks for: it ends there. What the context holds when left out."""
    max_stored_responses: int = 1000
    """Most answers of /v1/responses that are kept in memory for each key, to be asked for again or gone on with; 0 keeps none,
    -1 for no limit but that of bytes (32 MiB a key)."""
    allowed_origins: tuple[str, ...] = ()
    """Origins whose web pages may use the server from a browser, as https://chat.example; * for all."""
    forwarded_allow_ips: tuple[str, ...] = ()
    """Proxies (addresses, networks, or *) that are believed when they say in X-Forwarded-For who asks."""
    web_ui: bool = True
    """Answer at / with a page to chat in a browser."""
    ssl_certfile: str | None = None
    """Certificate chain (PEM): answer by HTTPS."""
    ssl_keyfile: str | None = None
    """The certificate's private key, if not in the same file."""
    ssl_ca_certs: str | None = None
    """Ask clients for a certificate, too, that one of these authorities has signed."""
    audit_log: str | None = None
    """Write who asked what to this file, as JSON lines without prompts and answers; kept to ten files of 100 MB."""
    audit_content: bool = False
    """Write prompts and answers to the audit log, too."""
    models: str | None = None
    """Serve several models: a TOML file with a table for each, which holds any of the engine's options, aliases, load and
    idle_unload."""
    idle_unload: float = 0.0
    """Seconds without a request after which a model's engine ends, and its memory is free; the next request loads it again. 0: it
    stays."""
    allow_runtime_lora_updating: bool = False
    """Let whoever may ask the server load LoRA adapters from directories of its machine, and unload them
    (/v1/load_lora_adapter, /v1/unload_lora_adapter)."""
    engine_step_timeout: float = 600.0
    """Seconds after which an engine that has work and finishes no step is stuck, is ended, and started again (sooner where it
    does not even use the processor). 0: it is waited for."""
    shutdown_timeout: float = 5.0
    """Seconds that running requests get to finish after ctrl-C or SIGTERM."""
    log_level: str = "info"
    """debug, info, warning or error."""
    log_format: str = "text"
    """text, or json: an object a line."""
    vllm_metrics: bool = True
    """Metrics under vLLM's names, too."""
    enable_log_requests: bool = True
    """A line of the log for each request that has ended: what it asked of whom, its tokens and seconds, never its text."""


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """What `appliance bench serve` asks, of whom, and how often. Names and meanings are those of `vllm bench serve`."""

    backend: str = "openai"
    """openai: completions (also vllm); openai-chat: chat; openai-embeddings: embeddings of the prompts."""
    base_url: str | None = None
    """Where the server is, as https://example.org:8000, instead of --host and --port."""
    host: str = "127.0.0.1"
    """Address of the server."""
    port: int = 8000
    """Its port."""
    endpoint: str | None = None
    """Path that is asked; /v1/completions, /v1/chat/completions or /v1/embeddings when left out, as --backend says."""
    header: tuple[str, ...] = ()
    """Headers to send, as NAME=VALUE."""
    api_key: str | None = field(default=None, repr=False)
    """Key to send; OPENAI_API_KEY in the environment when left out."""
    ssl_ca_certs: str | None = None
    """Trust these certificates (PEM)."""
    insecure: bool = False
    """Take any certificate."""
    model: str | None = None
    """Name of the model; the first one that the server names when left out."""
    served_model_name: str | None = None
    """Name to ask for, if not --model."""
    dataset_name: str = "random"
    """random, sharegpt, custom (JSON lines with prompt or messages), text (cuts from a text), timed_trace (arrivals and lengths:
    Azure's CSV, or JSON lines as Mooncake's)."""
    dataset_path: str | None = None
    """File of the data set."""
    num_prompts: int = 1000
    """Requests to send; of a trace the first so many."""
    input_len: int | None = None
    """The same as --random-input-len."""
    output_len: int | None = None
    """Tokens of each answer, whatever the data set says."""
    random_input_len: int = 1024
    """Tokens of a random prompt (words, of a text)."""
    random_output_len: int = 128
    """Tokens of its answer."""
    random_range_ratio: float = 0.0
    """Lengths vary by this share up and down."""
    random_prefix_len: int = 0
    """Tokens that all random prompts begin with, beside the others."""
    sharegpt_output_len: int | None = None
    """Tokens of each answer, instead of those that the conversation had."""
    custom_output_len: int = 256
    """Tokens of each answer where the file does not say; -1: as long as the model likes."""
    timed_trace_chunk_hash_size: int = 512
    """Tokens that an id of the trace's hash_ids stands for."""
    timed_trace_sec_multiplier: float = 0.001
    """Seconds that 1 in the timestamps of JSON lines stands for."""
    self_timed: bool | None = None
    """Send requests when the trace says; on for timed_trace."""
    speedup: float = 1.0
    """Replay a trace so many times as fast."""
    scale_lengths: float = 1.0
    """Multiply a trace's lengths, as for a model of a shorter context."""
    disable_shuffle: bool = False
    """Take a data set in its order."""
    no_oversample: bool = False
    """Send each request of a data set once, even where that is fewer than --num-prompts."""
    request_rate: float = float("inf")
    """Requests a second; inf: all at once."""
    burstiness: float = 1.0
    """Shape of the gamma distribution of gaps between requests: 1 is a Poisson process, less is burstier, more is more even."""
    max_concurrency: int | None = None
    """Most requests under way."""
    ramp_up_strategy: str | None = None
    """linear or exponential: the rate changes from --ramp-up-start-rps to --ramp-up-end-rps."""
    ramp_up_start_rps: float | None = None
    """Rate of the first requests."""
    ramp_up_end_rps: float | None = None
    """Rate of the last ones."""
    num_warmups: int = 0
    """Requests to send before, which do not count."""
    ready_check_timeout_sec: int = 0
    """Seconds to wait for a server that does not answer yet."""
    request_timeout: float = 21_600.0
    """Seconds after which a request is given up."""
    seed: int = 0
    """Of prompts, lengths and arrivals."""
    ignore_eos: bool = False
    """Ask for answers that do not end before their length."""
    temperature: float | None = None
    """Sampling: left to the server when left out, like the five below."""
    top_p: float | None = None
    """Sampling."""
    top_k: int | None = None
    """Sampling."""
    min_p: float | None = None
    """Sampling."""
    frequency_penalty: float | None = None
    """Sampling."""
    presence_penalty: float | None = None
    """Sampling."""
    repetition_penalty: float | None = None
    """Sampling."""
    logprobs: int | None = None
    """Ask for so many log-probabilities a token."""
    extra_body: str | None = None
    """JSON object with more fields for each request."""
    request_id_prefix: str | None = None
    """Send an X-Request-Id that begins so, and ends with the request's number."""
    percentile_metrics: str = "ttft,tpot,itl,e2el"
    """Latencies to show."""
    metric_percentiles: str = "90,95,99"
    """Percentiles to show beside mean and median."""
    goodput: tuple[str, ...] = ()
    """Most milliseconds of a good request, as ttft:200 tpot:50 e2el:5000; how many were good a second is shown."""
    json: str | None = None
    """Write all results to this file."""
    svg: str | None = None
    """Draw latencies and the course of the run into this file."""
    save_result: bool = False
    """Write results to a file with a name of its own, in --result-dir."""
    save_detailed: bool = False
    """With the figures and the text of each request in it."""
    append_result: bool = False
    """Add a line to the file of --result-filename, instead of a new file."""
    result_dir: str | None = None
    """Folder for results; this one when left out."""
    result_filename: str | None = None
    """Name of the file."""
    label: str | None = None
    """First part of the file's name; the backend when left out."""
    metadata: tuple[str, ...] = ()
    """More facts for the results, as NAME=VALUE."""
    disable_tqdm: bool = False
    """No progress bar."""
