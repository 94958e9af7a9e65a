"""Embeddings against transformers: the normalized hidden state behind a text's last token."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import normalize

from appliance import LLM, PoolingParams
from appliance.core.params import RequestError
from appliance.pooling import Pooler, read_pooler
from quant.errors import InputError

HIDDEN, VOCAB = 48, 160
LAST = {
    "word_embedding_dimension": HIDDEN,
    "pooling_mode_mean_tokens": False,
    "pooling_mode_lasttoken": True,
    "include_prompt": True,
}
KINDS = (
    "sentence_transformers.models.Transformer",
    "sentence_transformers.models.Pooling",
    "sentence_transformers.models.Normalize",
)


def modules(directory: Path, pooling: dict[str, Any] | None = None, kinds: tuple[str, ...] = KINDS) -> None:
    """What sentence-transformers keeps beside a model's weights."""
    names = ["", *(f"{n}_{kind.rpartition('.')[2]}" for n, kind in enumerate(kinds[1:], 1))]
    found = [
        {"idx": n, "name": str(n), "path": path, "type": kind} for n, (path, kind) in enumerate(zip(names, kinds, strict=True))
    ]
    (directory / "modules.json").write_text(json.dumps(found))
    (directory / "1_Pooling").mkdir(exist_ok=True)
    (directory / "1_Pooling" / "config.json").write_text(json.dumps(pooling or LAST))


def qwen(directory: Path, *, bare: bool) -> Any:
    """A random Qwen3, saved with its head or, as Qwen3-Embedding is, without what stands before the names of its tensors."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(7)
    config = Qwen3Config(
        vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=256, tie_word_embeddings=bare, eos_token_id=3,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config).eval()
    for parameter in model.parameters():  # norms as well
        torch.nn.init.normal_(parameter, 1.0 if parameter.ndim == 1 else 0.0, 0.2)
    model.save_pretrained(directory)
    if bare:
        tensors = load_file(directory / "model.safetensors")
        stripped = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
        assert "embed_tokens.weight" in stripped and not any(name.startswith("model.") for name in stripped)
        save_file(stripped, directory / "model.safetensors", metadata={"format": "pt"})
    return model


def loaded(directory: Path, **options: Any) -> LLM:
    sizes = {"kv_cache_memory_bytes": 4 << 20, "max_num_batched_tokens": 32}
    return LLM(directory, dtype="float32", skip_tokenizer_init=True, threads=1, **sizes, **options)


def prompts(lengths: tuple[int, ...]) -> list[list[int]]:
    rng = torch.Generator().manual_seed(11)
    return [torch.randint(4, VOCAB, (length,), generator=rng).tolist() for length in lengths]


@torch.no_grad()
def expected(model: Any, ids: list[int]) -> torch.Tensor:
    return model.model(torch.tensor([ids])).last_hidden_state[0, -1]


@pytest.mark.parametrize("bare", [False, True])
def test_as_transformers_computes_them(tmp_path: Path, bare: bool) -> None:
    model = qwen(tmp_path, bare=bare)
    modules(tmp_path)
    many = prompts((1, 2, 15, 16, 17, 33, 100, 112))  # blocks, several steps of one prompt, and all that the context holds
    llm = loaded(tmp_path, block_size=16, max_model_len=112)
    for _ in range(2):  # the second time most of it comes from the cache
        outputs = llm.embed(many, use_tqdm=False)
        for ids, output in zip(many, outputs, strict=True):
            assert output.prompt_token_ids == ids and output.finished
            found = torch.tensor(output.outputs.embedding)
            torch.testing.assert_close(found, normalize(expected(model, ids), dim=0), atol=2e-5, rtol=1e-4)
            assert math.isclose(found.norm().item(), 1.0, abs_tol=1e-5)
    assert outputs[-2].num_cached_tokens == 96
    with pytest.raises(RequestError, match="maximum context length is 112 tokens"):
        llm.embed(prompts((113,)))
    with pytest.raises(InputError, match=r"makes embeddings: use embed\(\)"):
        llm.generate([[5, 6]])


def test_the_first_numbers_and_as_they_are(tmp_path: Path) -> None:
    model = qwen(tmp_path, bare=True)
    modules(tmp_path, kinds=KINDS[:2])
    llm, ids = loaded(tmp_path), prompts((9,))[0]
    whole = expected(model, ids)
    for params, wanted in (
        (None, whole),  # there is no Normalize among the modules
        (PoolingParams(normalize=True), normalize(whole, dim=0)),
        (PoolingParams(dimensions=5), whole[:5]),
        (PoolingParams(dimensions=5, normalize=True), normalize(whole[:5], dim=0)),
        (PoolingParams(dimensions=HIDDEN), whole),
    ):
        found = llm.embed(ids, pooling_params=params, use_tqdm=False)[0].outputs.embedding
        torch.testing.assert_close(torch.tensor(found), wanted, atol=2e-4, rtol=1e-4)
    with pytest.raises(RequestError, match=f"dimensions must be an integer at least 1 and at most {HIDDEN} .*got 49"):
        llm.embed(ids, pooling_params=PoolingParams(dimensions=49))
    with pytest.raises(RequestError, match="dimensions must be an integer at least 1"):
        PoolingParams(dimensions=0)
    with pytest.raises(RequestError, match="the prompt is empty"):
        llm.embed([[]])


def test_layers_without_a_head(tmp_path: Path) -> None:
    """As e5-mistral: MistralModel, whose embedding is not tied to anything."""
    from transformers import MistralConfig, MistralModel

    torch.manual_seed(8)
    config = MistralConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=12, max_position_embeddings=256, sliding_window=8, tie_word_embeddings=False,
    )  # fmt: skip
    model = MistralModel(config).eval()
    model.save_pretrained(tmp_path)
    llm = loaded(tmp_path)  # its architecture says that it embeds
    for ids in prompts((3, 30)):
        with torch.no_grad():
            wanted = normalize(model(torch.tensor([ids])).last_hidden_state[0, -1], dim=0)
        found = llm.embed(ids, use_tqdm=False)[0].outputs.embedding
        torch.testing.assert_close(torch.tensor(found), wanted, atol=2e-5, rtol=1e-4)


def test_any_model_can_and_is_asked_first(tmp_path: Path) -> None:
    qwen(tmp_path, bare=False)
    with pytest.raises(InputError, match='runner="pooling"'):
        loaded(tmp_path).embed([[5, 6]])
    assert len(loaded(tmp_path, runner="pooling").embed([[5, 6]], use_tqdm=False)[0].outputs.embedding) == HIDDEN
    modules(tmp_path)
    assert loaded(tmp_path, runner="generate").generate([[5, 6]], use_tqdm=False)[0].outputs
    with pytest.raises(InputError, match="runner is 'embed': one of auto, generate, pooling is needed"):
        loaded(tmp_path, runner="embed")


def test_what_modules_say(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["Qwen3ForCausalLM"]}))
    assert read_pooler(tmp_path, "auto") is None
    assert read_pooler(tmp_path, "pooling") == Pooler(normalize=True)
    modules(tmp_path)
    assert read_pooler(tmp_path, "auto") == Pooler(normalize=True)
    modules(tmp_path, {"pooling_mode": "lasttoken"}, ("sentence_transformers.base.modules.Transformer", "x.Pooling"))
    assert read_pooler(tmp_path, "auto") == Pooler(normalize=False)
    for pooling, words in (
        ({"pooling_mode_mean_tokens": True, "pooling_mode_lasttoken": False}, "the pooling is mean: only lasttoken"),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_lasttoken": True}, "mean and lasttoken"),
        ({"pooling_mode": "cls"}, "the pooling is cls"),
        ({"word_embedding_dimension": 3}, "the pooling is none"),
    ):
        modules(tmp_path, pooling)
        with pytest.raises(InputError, match=words):
            read_pooler(tmp_path, "auto")
        assert read_pooler(tmp_path, "generate") is None
    modules(tmp_path, kinds=(*KINDS[:2], "sentence_transformers.models.Dense"))
    with pytest.raises(InputError, match="the modules are Transformer, Pooling, Dense"):
        read_pooler(tmp_path, "auto")
    for text in ("{", "[3]", '[{"type": "a.Transformer"}]', "{}"):
        (tmp_path / "modules.json").write_text(text)
        with pytest.raises(InputError, match=r"modules\.json"):
            read_pooler(tmp_path, "auto")


def test_models_that_look_ahead_are_refused(tmp_path: Path) -> None:
    """Their embeddings need attention to what comes after a token, as gte-Qwen2's."""
    qwen(tmp_path, bare=False)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "is_causal": False}))
    with pytest.raises(InputError, match="is_causal = False is not supported"):
        loaded(tmp_path)
