"""Plans and refusals worked out by hand."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from appliance.memory import grammars
from appliance.memory.advice import advise
from appliance.memory.demand import LOGIT_ROWS
from appliance.memory.devices import DeviceInfo
from appliance.memory.fit import MARGIN, fit
from appliance.memory.graphs import LAYER_BYTES, POOL_BYTES
from appliance.memory.plan import RUNTIME, KVSpec, PlanError
from appliance.text import grammar as text_grammar
from quant.errors import InputError
from tests.memory.test_plan import DEFAULTS, GIB, LLAMA_8B, cpu, parse, plan_or_none


def test_a_plan_worked_out_by_hand() -> None:
    plan = fit(LLAMA_8B, replace(DEFAULTS, max_len=8192), cpu(24))
    workspace = 120_000 * 2048 + 128256 * 6 * LOGIT_ROWS + (100 << 20) + 512 * 8192
    assert plan.free == 24 * GIB - MARGIN["cpu"]
    reserved = (16 << 20) + 832 * 128256 + 64 * (64 << 10) + 256 * (128256 // 8 + (128 << 10))
    assert plan.grammar_bytes == reserved
    left = 12 * GIB - 6 * GIB - workspace - RUNTIME["cpu"] - reserved
    assert plan.kv == KVSpec(32, 8, 128, 16, "float16")
    assert plan.kv.token_bytes == 128 * 1024 and plan.kv.block_bytes == 2 << 20  # the worked example of Llama-3-8B
    assert plan.workspace == workspace
    assert plan.num_blocks == left // (2 << 20)
    assert plan.sequences(8192) == plan.num_blocks / 512
    assert plan.sequences(8193) == plan.num_blocks / 513


def test_auto_takes_the_whole_context_where_it_fits_and_the_longest_elsewhere() -> None:
    assert fit(LLAMA_8B, DEFAULTS, cpu(64)).max_model_len == 131072
    plan = fit(LLAMA_8B, DEFAULTS, cpu(24))
    assert 256 < plan.max_model_len < 131072 and plan.max_model_len % 16 == 0 and plan.sequences(plan.max_model_len) >= 1


def test_no_more_blocks_than_the_sequences_can_fill() -> None:
    few = replace(DEFAULTS, max_len=100, max_seqs=3, prefixes=False)
    plan = fit(LLAMA_8B, few, cpu(64))
    assert plan.num_blocks == 3 * 7 and plan.total < plan.budget // 2
    assert "  limited to 3 contexts of 100 tokens: more would never be filled\n" in plan.table()
    assert fit(LLAMA_8B, replace(few, max_seqs=300), cpu(64)).num_blocks == 300 * 7


def test_where_prefixes_are_kept_there_is_room_for_those_of_earlier_requests() -> None:
    few = replace(DEFAULTS, max_len=100, max_seqs=3)
    plan = fit(LLAMA_8B, few, cpu(64))
    assert plan.num_blocks == 64 * 7 and fit(LLAMA_8B, replace(few, max_seqs=300), cpu(64)).num_blocks == 600 * 7
    limit = "64 contexts of 100 tokens, running or kept; --kv-cache-memory-bytes gives more"
    assert f"  limited to {limit}\n" in plan.table()
    assert plan.to_dict()["kv_cache"]["limit"] == limit  # type: ignore[index]
    assert replace(plan, num_blocks=63 * 7).limited == "", "a card has measured that there is less"
    tight = fit(LLAMA_8B, replace(DEFAULTS, max_len=8192), cpu(24))
    assert not tight.limited and tight.to_dict()["kv_cache"]["limit"] is None and "limited" not in tight.table()  # type: ignore[index]


def test_the_cache_of_auto_waits_for_the_next_sequence() -> None:
    """Where each costs 64 MiB in recorded steps: what would be missing then is not given away before."""
    demand = replace(LLAMA_8B, token_bytes=64 << 20)
    chosen = replace(DEFAULTS, max_seqs=None, max_len=8192, max_tokens=64, graphs=True, utilization=1.0)
    cards = [DeviceInfo("cuda", "card", gib * GIB, gib * GIB) for gib in range(14, 22)]
    waiting = [(card, plan) for card in cards if (plan := fit(demand, chosen, card)).limited]
    assert 0 < len(waiting) < len(cards)
    for card, plan in waiting:
        after = plan.max_num_seqs + 1
        assert plan.num_blocks == after * 64 and plan.limited.startswith(
            f"{after * 64:,} blocks: more is kept until it is enough"
        )
        assert fit(demand, replace(chosen, max_seqs=after), card).num_blocks < plan.num_blocks


def test_a_cache_that_was_given_is_given() -> None:
    """Whatever can run: two sequences of 100 tokens would fill 28 MiB. What the device does not have is refused."""
    given = replace(DEFAULTS, max_len=100, max_seqs=2, kv_bytes=GIB)
    plan = fit(LLAMA_8B, given, cpu(64))
    assert plan.kv_bytes == GIB and not plan.limited
    with pytest.raises(PlanError, match=r"and a KV cache of 100\.00 GiB make 106\.") as error:
        fit(LLAMA_8B, replace(given, kv_bytes=100 * GIB), cpu(24))
    found = advise(error.value, LLAMA_8B, replace(given, kv_bytes=100 * GIB), cpu(24)).remedies
    most = int(found[0].flags.removeprefix("--kv-cache-memory-bytes "))
    assert fit(LLAMA_8B, replace(given, kv_bytes=most), cpu(24)).kv_bytes == most
    assert plan_or_none(LLAMA_8B, replace(given, kv_bytes=most + plan.kv.block_bytes), cpu(24)) is None


def test_no_more_sequences_run_than_a_step_has_tokens() -> None:
    """Each takes a token of every step, so nothing is set aside for the others, and no speed is told of them."""
    card = DeviceInfo("cuda", "card", 24 * GIB, 23 * GIB)
    for asked in (256, None):
        wide = replace(DEFAULTS, max_seqs=asked, max_len=8192, graphs=True, utilization=0.92)
        few = fit(LLAMA_8B, replace(wide, max_tokens=16), card)
        exact = fit(LLAMA_8B, replace(wide, max_tokens=16, max_seqs=16), card)
        assert few.max_num_seqs == 16 and (few.fixed, few.host) == (exact.fixed, exact.host)
        assert few.num_blocks == exact.num_blocks and few.decode_sizes == (1, 2, 4, 8, 16)
        assert "(at most 16 run together)" in few.table()
        assert fit(LLAMA_8B, replace(wide, max_tokens=16, prefixes=False), cpu(24)).max_num_seqs == 16


def test_a_card_shared_with_others_gives_what_is_free() -> None:
    card = DeviceInfo("cuda", "card", 24 * GIB, 23 * GIB)
    wide = replace(DEFAULTS, utilization=0.92)
    assert fit(LLAMA_8B, wide, card).budget == int(0.92 * 24 * GIB)
    taken = fit(LLAMA_8B, wide, replace(card, available=10 * GIB))
    assert taken.budget == 10 * GIB - MARGIN["cuda"]
    assert taken.budget_source == (
        "the 10.00 GiB that are free of 24.00 GiB, of which the driver and others hold 14.00 GiB, less a margin of 150.00 MiB"
    )
    spared = fit(LLAMA_8B, replace(wide, reserve=2 * GIB), replace(card, available=10 * GIB))
    assert spared.budget == taken.budget - 2 * GIB and spared.budget_source.endswith(" and --gpu-memory-reserve 2.00 GiB")
    assert fit(LLAMA_8B, replace(wide, reserve=GIB // 2), card).budget == int(0.92 * 24 * GIB)  # more than that stays free anyway


def test_recorded_steps_worked_out_by_hand() -> None:
    """Sizes 1, 2, 4, 8, 16, 24: a pool for the largest, each step's result and what the driver keeps, and a block for padding."""
    card, few = DeviceInfo("cuda", "card", 24 * GIB, 23 * GIB), replace(DEFAULTS, utilization=0.92, max_seqs=24, max_len=8192)
    eager, recorded = fit(LLAMA_8B, few, card), fit(LLAMA_8B, replace(few, graphs=True), card)
    expected = 24 * 120_000 + (30 << 20) + 55 * 8192 + 6 * 32 * LAYER_BYTES + POOL_BYTES + (2 << 20)
    assert eager.graph_bytes == 0 and recorded.graph_bytes == expected
    assert recorded.runtime == eager.runtime and recorded.scratch == eager.scratch
    assert (eager.num_blocks - recorded.num_blocks) in (expected // (2 << 20), expected // (2 << 20) + 1)
    assert "CUDA graphs, 6 sizes" in recorded.table() and "CUDA graphs" not in eager.table()
    assert recorded.to_dict()["graphs_bytes"] == {**recorded.graphs, "total": expected}
    assert eager.to_dict()["graphs_bytes"] == {"total": 0}
    assert fit(LLAMA_8B, replace(few, graphs=True, max_tokens=7), card).decode_sizes == (1, 2, 4, 7)


def test_inputs_are_planned_as_they_are_sent() -> None:
    card = DeviceInfo("cuda", "card", 24 * GIB, 23 * GIB)
    plan = fit(LLAMA_8B, replace(DEFAULTS, utilization=0.92, max_len=4096, block_size=64), card)
    tables, tokens, sequences = 256 * 64 * 4, 3 * 2048 * 8, 6 * 256 * 8 + 256 * 4
    assert plan.scratch["inputs"] == tables + tokens + sequences + 257 * 4 // 64 * 64 + 64  # the last one on a line of its own
    assert fit(LLAMA_8B, replace(DEFAULTS, max_len=4096), cpu(24)).scratch["inputs"] == 0


def test_refusals_of_cards_advise_fewer_sequences_or_none_recorded() -> None:
    card = DeviceInfo("cuda", "card", 8 * GIB, 8 * GIB)
    wide = replace(DEFAULTS, utilization=0.97, graphs=True, max_seqs=512, max_len=2048)
    with pytest.raises(PlanError, match=r"CUDA graphs \d+\.\d\d MiB \(512 sequences\), runtime 800\.00 MiB") as error:
        fit(LLAMA_8B, wide, card)
    advised = advise(error.value, LLAMA_8B, wide, card)
    flags = [remedy.flags for remedy in advised.remedies]
    assert "--enforce-eager" in flags and any(flag.startswith("--max-num-seqs ") for flag in flags)


def test_refusals_have_the_numbers_and_the_flags() -> None:
    fixed = replace(DEFAULTS, runtime=300 << 20)
    long = replace(fixed, max_len=65536)
    with pytest.raises(PlanError) as short:
        fit(LLAMA_8B, long, cpu(24))
    numbers = (
        r"llama does not fit: one sequence of 65536 tokens needs 4096 KV blocks of 16 tokens \(8\.00 GiB\), but there is "
        r"room for 2\d\d\d \(5\.\d\d GiB\): the budget is 12\.00 GiB \(0\.5 of 24\.00 GiB available\), of which "
        r"weights 6\.00 GiB, workspace .* MiB \(2048 tokens a step\), grammars 157\.68 MiB, runtime 300\.00 MiB are taken$"
    )
    assert re.match(numbers, str(short.value)), str(short.value)
    advised = advise(short.value, LLAMA_8B, long, cpu(24))
    caches = "--kv-cache-dtype fp8, or --kv-cache-dtype int4"
    remedies = rf"What would fit: --gpu-memory-utilization 0\.6\d, or {caches}, or --max-model-len 4\d{{4}}$"
    assert re.search(remedies, str(advised)), str(advised)
    assert (
        advised.remedies[1].effect
        == f"keys and values in 8 bits; room for {advised.remedies[1].tokens:,} tokens, 65,536 in one sequence"
    )

    with pytest.raises(PlanError, match=r"weights 6\.00 GiB, .* make 6\.\d\d GiB, but the budget is 4\.00 GiB"):
        fit(LLAMA_8B, fixed, cpu(8))
    with pytest.raises(PlanError, match=r"and a KV cache of 30\.00 GiB make 36\..* but the budget is 23\.94 GiB \(all that is"):
        fit(LLAMA_8B, replace(fixed, kv_bytes=30 * GIB), cpu(24))
    with pytest.raises(InputError, match=r"--max-model-len is 131073, but the model was made for at most 131072 tokens") as long:
        fit(LLAMA_8B, replace(DEFAULTS, max_len=131073), cpu(240))
    assert not isinstance(long.value, PlanError)


def test_one_set_of_flags_where_no_single_one_helps() -> None:
    tight = replace(DEFAULTS, utilization=0.1, max_tokens=8192, max_len=100_000)
    with pytest.raises(PlanError) as error:
        fit(LLAMA_8B, tight, cpu(7))
    advised = advise(error.value, LLAMA_8B, tight, cpu(7))
    assert len(advised.remedies) == 1
    flags = r"--gpu-memory-utilization 1 --max-num-batched-tokens \d{3,4} --kv-cache-dtype int4 --max-model-len \d+"
    assert re.fullmatch(flags, advised.remedies[0].flags)
    less = replace(tight, **(parse(advised.remedies[0].flags) | {"utilization": 0.99}))
    assert plan_or_none(LLAMA_8B, less, cpu(7)) is None
    given = replace(tight, kv_bytes=16 * GIB)
    with pytest.raises(PlanError) as error:
        fit(LLAMA_8B, given, cpu(7.36))
    assert re.fullmatch(
        r"--kv-cache-dtype fp8 --max-num-batched-tokens \d{3,4} --max-model-len \d+ --kv-cache-memory-bytes \d+",
        advise(error.value, LLAMA_8B, given, cpu(7.36)).remedies[0].flags,
    )
    hopeless = advise(error.value, LLAMA_8B, tight, cpu(2))
    assert hopeless.remedies == () and "needs one with more memory, or a smaller model" in str(hopeless)


def test_the_table_says_it_all() -> None:
    plan = fit(LLAMA_8B, replace(DEFAULTS, max_len=8192), cpu(24))
    table = plan.table()
    assert f"Maximum concurrency for 8,192 tokens per request: {plan.sequences(8192):.2f}x" in table
    assert f"KV cache: {plan.tokens:,} tokens in blocks of 16 (2.00 MiB a block, 128.00 KiB a token)" in table
    for part in (
        "weights",
        "  mlp",
        "workspace",
        "  logits",
        "grammars",
        "  masks and places",
        "runtime",
        "total",
        "left of the budget",
    ):
        assert re.search(rf"^  {part} +\d+\.\d\d [GMK]iB +\d+\.\d%", table, re.M), part
    for length in ("512", "1,024", "4,096", "8,192"):
        assert re.search(rf"^ +{length} +[\d,]+\.\d$", table, re.M), length
    assert max(map(len, table.splitlines())) <= 100
    assert "16,384" not in table
    full = re.search(r"^  total .*?(█+)[▏▎▍▌▋▊▉]?$", table, re.M)[1]
    assert len(full) == round(plan.total / plan.budget * 240) // 8  # in eighths


def test_as_many_grammars_are_planned_as_are_kept_and_none_without_a_tokenizer() -> None:
    assert grammars.KEPT == text_grammar.KEPT
    assert grammars.mask_bytes(32000) == 4000 and grammars.mask_bytes(32001) == 4004
    plain, card = replace(DEFAULTS, max_len=8192), DeviceInfo("cuda", "card", 24 * GIB, 23 * GIB)
    reserved, none = (fit(LLAMA_8B, replace(plain, grammars=on), cpu(24)) for on in (True, False))
    assert none.grammar_bytes == 0 and none.to_dict()["grammars_bytes"] == {"total": 0}
    assert "grammars" in reserved.table() and "grammars" not in none.table()
    assert none.num_blocks - reserved.num_blocks in (reserved.grammar_bytes >> 21, (reserved.grammar_bytes >> 21) + 1)
    one = fit(LLAMA_8B, replace(plain, max_seqs=1), cpu(24))
    place = grammars.mask_bytes(LLAMA_8B.vocab) + grammars.PLACE
    assert one.grammars["masks and places"] == place
    assert reserved.grammar_bytes - one.grammar_bytes == (reserved.max_num_seqs - 1) * place
    beside, alone = (fit(LLAMA_8B, replace(plain, grammars=on), card) for on in (True, False))
    assert beside.num_blocks == alone.num_blocks and not alone.host["grammars"]
    assert beside.host["grammars"] == reserved.grammar_bytes
