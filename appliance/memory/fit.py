"""The arithmetic of memory: integers in, a plan or an explained refusal out. Nothing is loaded or measured, and no torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache

from appliance.memory.demand import LOGIT_ROWS, Demand
from appliance.memory.devices import MIB, DeviceInfo
from appliance.memory.grammars import grammar_parts
from appliance.memory.graphs import capture_sizes, graph_bytes
from appliance.memory.host import host_parts, loading_peak
from appliance.memory.inputs import STAGED_BLOCKS, input_bytes
from appliance.memory.loading import Workers
from appliance.memory.offload import Offload, offloaded, on_card
from appliance.memory.plan import RUNTIME, SHORTEST_AUTO, Limit, MemoryPlan, PlanError
from appliance.memory.settings import Settings
from appliance.memory.text import owners, size_text
from quant.errors import InputError

MARGIN = {"cpu": 64 * MIB, "cuda": 150 * MIB}
"""What is left free of what is free when a plan is made. Between then and "ready" other programs take some: a desktop with every
window that opens. vLLM keeps 150 MiB back too when it suggests the size of a cache (v1/worker/gpu_worker.py)."""
MOST_SEQUENCES = 256
"""--max-num-seqs auto gives no more: vLLM's default for such cards."""
KEPT_CONTEXTS = 64
"""Where prefixes are kept, the cache may hold at least so many contexts, however few sequences run: a conversation that goes on
finds its beginning there."""
FAIR_TOKENS = 1366
"""Tokens of a request, prompt and answer: the mean of the public trace AzureLLMInferenceTrace_conv."""
OF_STATES = 3
"""So many times the bytes of its states a sequence of a fair length has in the cache: else --max-num-seqs auto would give most of
the memory to sequences that hardly ever run together, and long contexts would have none."""

KEPT_STATES = 8
"""Places where states of earlier prompts are kept, at most; and one more than sequences run, where these are fewer."""


def fit(demand: Demand, settings: Settings, device: DeviceInfo, host: DeviceInfo | None = None) -> MemoryPlan:
    """The plan for known demands: pure arithmetic. More memory never gives less cache, a shorter context or fewer sequences.

    ``host``: the memory beside a card's (None: not looked at). Raises PlanError where no sequence of the length asked for can
    run, where it cannot be loaded, or where the host has too little memory.
    """
    if settings.max_len is not None and settings.max_len > demand.max_len:
        raise InputError(
            f"--max-model-len is {settings.max_len}, but the model was made for at most {demand.max_len} tokens: "
            f"give at most {demand.max_len}, or auto"
        )
    _check_heads(demand, settings.kv_dtype, device)
    contexts, most = settings.max_seqs or MOST_SEQUENCES, None
    if settings.max_seqs is None:
        running, most = auto_sequences(demand, settings, device)
    else:
        running = min(settings.max_seqs, settings.max_tokens)  # each takes a token of every step
    settings = replace(settings, max_seqs=running)

    def plan(length: int) -> MemoryPlan:
        return _limited(_plan(demand, settings, device, length), settings, contexts, most)

    def checked(found: MemoryPlan) -> MemoryPlan:
        if settings.swaps and not found.swap_blocks:
            raise InputError(
                f"--preemption-mode is swap, but --swap-space is {size_text(settings.swap_bytes)}, and one block has "
                f"{size_text(found.kv.block_bytes)}: give as much at least, or leave the mode out"
            )
        return _checked(_loaded(found, demand, host))

    if settings.max_len is not None:
        return checked(plan(settings.max_len))
    longest = plan(demand.max_len)
    if _holds_one(longest):
        return checked(longest)
    blocks = last(lambda n: _holds_one(plan(n * settings.block_size)), 1, longest.kv.blocks(demand.max_len) - 1) or 0
    return checked(plan(max(blocks * settings.block_size, min(SHORTEST_AUTO, demand.max_len))))


def auto_sequences(demand: Demand, settings: Settings, device: DeviceInfo) -> tuple[int, int | None]:
    """--max-num-seqs auto: (sequences, blocks at most).

    As many as the cache has room for beside what they cost themselves (inputs, recorded steps) when each has a fair length: that
    of a mean request, but no more than an eighth of the context, since where contexts are short requests are; and longer where
    sequences have states (OF_STATES). At least one.

    What one sequence more costs is missing in the cache. So that more memory never gives a smaller one, the cache stops growing
    where the next sequence will have to be paid, until it can be::

        memory     ----->
        sequences  n                       n + 1
        cache      ........../-------------.........../---
    """
    length = settings.max_len or demand.max_len
    block, needed = settings.block_size, -(-length // settings.block_size) if settings.max_len else 0
    token = demand.kv(block).token_bytes
    beside = min(OF_STATES * demand.sequence_bytes // token, length)
    fair = -(-max(1, min(FAIR_TOKENS, length // 8), beside) // block)

    def good(sequences: int) -> bool:
        context = settings.max_len or min(demand.max_len, (sequences + 1) * fair * block)
        plan = _plan(demand, replace(settings, max_seqs=sequences), device, context)
        return plan.total <= plan.budget and plan.num_blocks >= max(sequences * fair, needed)

    highest = min(MOST_SEQUENCES, settings.max_tokens)
    found = last(good, 1, highest) or 1
    if found == highest or settings.kv_bytes is not None:
        return found, None
    return found, max((found + 1) * fair, needed)


def _plan(demand: Demand, settings: Settings, device: DeviceInfo, max_len: int) -> MemoryPlan:
    """What is left after weights, workspace and runtime becomes blocks, or what was given for them."""
    assert settings.max_seqs is not None
    kv = demand.kv(settings.block_size, settings.kv_dtype)
    sizes = settings.max_tokens, settings.max_seqs, kv.blocks(max_len)
    inputs = input_bytes(*sizes, states=demand.sequence_bytes > 0, wanted=demand.shared_layers > 0)
    scratch = {
        "activations": demand.token_bytes * settings.max_tokens,
        "logits": demand.logits_row_bytes * min(LOGIT_ROWS, settings.max_tokens),
        "products": demand.products(settings.max_tokens, max_len),
        "positions": demand.position_bytes * max_len,
        "inputs": inputs if device.kind == "cuda" else 0,
        "transfers": STAGED_BLOCKS * kv.block_bytes if device.kind == "cuda" else 0,
        **({"exchange": demand.exchange} if demand.exchange else {}),
    }
    graphs = graph_bytes(
        capture_sizes(settings.max_seqs) if settings.graphs else (),
        layers=demand.layers,
        token_bytes=demand.token_bytes,
        slab=demand.layer_slab,
        hidden_bytes=demand.hidden_bytes,
        block_bytes=kv.block_bytes,
        sequence_bytes=demand.sequence_bytes,
        layer_bytes=settings.layer_bytes,
    )
    offload = _offload(tuple(sum(parts.values()) for parts in demand.streamed), settings.offload_gb)
    budget, source = budget_of(settings, device)
    empty = MemoryPlan(
        model=demand.model,
        architecture=demand.architecture,
        quantization=demand.quantization,
        vocab_size=demand.vocab,
        device=device,
        dtype=demand.dtype,
        head=demand.head,
        embedding=demand.embedding,
        budget=budget,
        budget_source=source,
        weights=on_card(demand.weights, demand.streamed, offload),
        scratch=scratch,
        graphs=graphs,
        runtime=RUNTIME[device.kind] if settings.runtime is None else settings.runtime,
        grammars=grammar_parts(demand.vocab, settings.max_seqs) if settings.grammars else {},
        learned=settings.runtime is not None,
        kv=kv,
        num_blocks=0,
        max_model_len=max_len,
        max_num_seqs=settings.max_seqs,
        max_num_batched_tokens=settings.max_tokens,
        free=free_of(settings, device),
        sequence_bytes=demand.sequence_bytes,
        kept_states=min(KEPT_STATES, settings.max_seqs + 1) if demand.sequence_bytes and settings.prefixes else 0,
        swap_blocks=settings.swap_bytes // kv.block_bytes,
        offload=offload,
    )
    left = settings.kv_bytes if settings.kv_bytes is not None else max(0, budget - empty.fixed)
    return replace(empty, num_blocks=left // kv.block_bytes)


def _limited(plan: MemoryPlan, settings: Settings, contexts: int, most: int | None) -> MemoryPlan:
    """No more blocks than so many contexts fill, with as many kept beside those that run; but what was given is given.

    ``contexts``: --max-num-seqs, or the most that auto gives: not how many run, so that a smaller step gives no smaller cache.
    ``most``: blocks at most for another reason, see auto_sequences.
    """
    if settings.kv_bytes is not None:
        return plan
    held = max(2 * contexts, KEPT_CONTEXTS) if settings.prefixes else contexts
    reason = ", running or kept; --kv-cache-memory-bytes gives more" if settings.prefixes else ": more would never be filled"
    why = f"{held:,} contexts of {plan.max_model_len:,} tokens{reason}"
    blocks = held * plan.kv.blocks(plan.max_model_len)
    if most is not None and most < blocks:
        blocks, why = most, f"{most:,} blocks: more is kept until it is enough for one more sequence"
    return plan if plan.num_blocks <= blocks else replace(plan, num_blocks=blocks, limit=Limit(blocks, why))


def _loaded(plan: MemoryPlan, demand: Demand, host: DeviceInfo | None) -> MemoryPlan:
    """With what loading takes, by as many workers as there is room for; and, for a card, what the host has to have."""
    device, through, parts = demand.loading.device, demand.loading.host, {}
    if plan.offload.layers:  # each is on the card for a while; their buffers are made when all are out
        device = replace(device, layer=device.layer + max(sum(parts.values()) for parts in demand.streamed))
    if plan.device.kind != "cpu":
        inputs, sequences = plan.scratch["inputs"], plan.max_num_seqs
        swap = plan.swap_blocks, plan.kv.block_bytes
        parts = host_parts(
            swap=swap,
            ghosts=plan.ghost_bytes,
            inputs=inputs,
            sequences=sequences,
            offload=plan.offload,
            grammars=plan.grammar_bytes,
        )
    found = replace(plan, host=parts, host_budget=None if host is None else max(0, host.available - MARGIN["cpu"]))
    for workers in Workers.choices(demand.threads):
        weights = plan.weight_bytes - plan.offload.staging_bytes
        peak, lasting = plan.runtime + device.peak(weights, workers), sum(parts.values())
        beside = max(lasting, loading_peak(parts, through.peak(0, workers))) if parts else 0
        found = replace(found, workers=workers, load_peak=peak, host_peak=beside)
        if peak <= plan.budget and (found.host_budget is None or beside <= found.host_budget):
            break
    return found


@lru_cache(maxsize=64)
def _offload(sizes: tuple[int, ...], gib: float) -> Offload:
    """A plan is tried many times with the same."""
    return offloaded(sizes, gib)


def _check_heads(demand: Demand, cache: str | None, device: DeviceInfo) -> None:
    """Two features of a head lie in a byte of int4; a card's kernels take two bytes at a time, of what is rotated too."""
    if cache is None:
        return
    whole = (4 if cache == "int4" else 2) if device.kind == "cuda" else 2 if cache == "int4" else 1
    rotated = demand.position_bytes // 4
    heads = [("heads", size) for _, size in demand.kv(1).by_layer]
    for what, features in (*heads, ("rotated features of heads", rotated if device.kind == "cuda" else 0)):
        if features % whole:
            raise InputError(f"--kv-cache-dtype is {cache}, but {what} of {features} are no multiple of {whole}: take auto")


def free_of(settings: Settings, device: DeviceInfo) -> int:
    """Bytes that a budget can be at most."""
    return max(0, device.available - MARGIN[device.kind] - settings.reserve)


def budget_of(settings: Settings, device: DeviceInfo) -> tuple[int, str]:
    """Bytes that may be taken, and why so many: a share of the memory, but never more than is free less a margin."""
    total, available, cpu = device.total, device.available, device.kind == "cpu"
    free, share = free_of(settings, device), settings.utilization
    less = f"less a margin of {size_text(MARGIN[device.kind])}"
    if settings.reserve:
        less += f" and --gpu-memory-reserve {size_text(settings.reserve)}"
    if settings.kv_bytes is not None:
        why = f"as --kv-cache-memory-bytes {settings.kv_bytes} decides, not --gpu-memory-utilization"
        return free, f"all that is available, {why}, {less}"
    cap = int(share * (available if cpu else total))
    held = "" if cpu or available >= total else f", of which the driver and others hold {size_text(total - available)}"
    if cap > free:
        return free, f"the {size_text(available)} that are available, {less}" if cpu else (
            f"the {size_text(available)} that are free of {size_text(total)}{held}, {less}"
        )
    return cap, f"{share:g} of {size_text(available)} available" if cpu else f"{share:g} of {size_text(total)}{held}"


def last(good: Callable[[int], bool], low: int, high: int) -> int | None:
    """The largest n in low .. high with good(n), where good holds up to some n and no further; None where it never does."""
    if low > high or not good(low):
        return None
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if good(middle) else (low, middle - 1)
    return low


def _holds_one(plan: MemoryPlan) -> bool:
    """Whether one sequence of the longest length can run (a --kv-cache-memory-bytes that is too much is another matter)."""
    return plan.fixed <= plan.budget and plan.kv.blocks(plan.max_model_len) <= plan.num_blocks


def _shortage(plan: MemoryPlan) -> str | None:
    """Why a plan is none: the numbers, in words."""
    graphs = f"CUDA graphs {size_text(plan.graph_bytes)} ({plan.max_num_seqs} sequences), " if plan.graphs else ""
    swap = (
        f"swap space {size_text(plan.swap_bytes + plan.ghost_bytes)}, " if plan.swap_blocks and plan.device.kind == "cpu" else ""
    )
    swap += f"grammars {size_text(plan.grammar_bytes)}, " if plan.grammars and plan.device.kind == "cpu" else ""
    states = f"states {size_text(plan.state_bytes)} ({owners(plan)}), " if plan.sequence_bytes else ""
    parts = (
        f"weights {size_text(plan.weight_bytes)}, workspace {size_text(plan.workspace)} "
        f"({plan.max_num_batched_tokens} tokens a step), {graphs}{states}{swap}runtime {size_text(plan.runtime)}"
    )
    budget = f"the budget is {size_text(plan.budget)} ({plan.budget_source})"
    if plan.fixed > plan.budget:
        return f"{parts} make {size_text(plan.fixed)}, but {budget}"
    if plan.total > plan.budget:  # only with --kv-cache-memory-bytes
        return f"{parts} and a KV cache of {size_text(plan.kv_bytes)} make {size_text(plan.total)}, but {budget}"
    if plan.load_peak > plan.budget:
        return (
            f"while weights are loaded one layer at a time, {size_text(plan.load_peak)} are taken for a moment "
            f"({size_text(plan.load_peak - plan.fixed)} more than by what then stays beside the KV cache), but {budget}"
        )
    if plan.host_budget is not None and plan.host_peak > plan.host_budget:
        return _host_shortage(plan)
    need = plan.kv.blocks(plan.max_model_len)
    if need > plan.num_blocks:
        return (
            f"one sequence of {plan.max_model_len} tokens needs {need} KV blocks of {plan.kv.block_size} tokens "
            f"({size_text(need * plan.kv.block_bytes)}), but there is room for {plan.num_blocks} ({size_text(plan.kv_bytes)}): "
            f"{budget}, of which {parts} are taken"
        )
    return None


def _host_shortage(plan: MemoryPlan) -> str:
    parts = [f"{name} {size_text(size)}" for name, size in plan.host.items() if size]
    loading = plan.host_peak - sum(plan.host.values())
    if loading > 0:
        parts.append(f"loading {size_text(loading)} more for a while")
    return (
        f"the host has {size_text(plan.host_budget or 0)} of memory available, but {size_text(plan.host_peak)} are needed there: "
        f"{', '.join(parts)}"
    )


def _checked(plan: MemoryPlan) -> MemoryPlan:
    reason = _shortage(plan)
    if reason is not None:
        raise PlanError(f"{plan.model} does not fit: {reason}")
    return plan
