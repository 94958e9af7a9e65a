"""A card is believed once it has computed something right: before its cache is made, what it says is held against the reference.

A small part of the model goes through the card's kernels and through the reference's operators on the CPU: one layer (the first,
or the first with experts; of states and of attention, or of two kinds of heads, one each), with the embedding and the head of a
few hundred tokens, in steps of many tokens and of one. That finds kernels that compute nonsense on a card, driver or compiler
that nobody has tried; it says nothing of speed. A combination that was right is remembered.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from appliance.config import EngineConfig
from appliance.memory.plan import MemoryPlan
from appliance.memory.proofs import SEPARATOR, card_key, known, remember
from appliance.runtime.runner import Runner
from appliance.runtime.staging import Lane
from kernels.layout import HEADS, head_bits
from kernels.ops import get_ops
from models.decoder import Decoder
from models.loader import load_model
from models.per_layer import TABLE
from models.spec import ModelSpec
from models.tables import EMBEDDING, HEAD
from quant.checkpoint import Checkpoint
from quant.errors import InputError
from quant.headers import TensorInfo
from quant.tensor import QuantTensor

log = logging.getLogger("appliance.startup")

LAYER = re.compile(r"model\.layers\.(\d+)\.")
TOKENS, KNOWN = 192, 512  # of the text, and those that it is made of
STEPS = (128, 17, 1)  # tokens at once: tiles for many rows and for few, attention of chunks and of single tokens
ALLOWED = 0.1  # root of the mean squared difference of logits, in shares of their spread; 0.035 with FP8 products


class CardError(InputError):
    """The card computes something else than the reference."""


def prove(config: EngineConfig, plan: MemoryPlan, decoder: Decoder, lane: Lane | None = None) -> None:
    """Let the loaded model show that its device computes what the reference does. Raises CardError.

    Nothing is done where this card, these kernels and a model of these shapes and formats have been right before.
    """
    name = key(plan, decoder)
    if name in known():
        return
    oracle, tokens = load_oracle(config, plan, decoder)
    for at_once, off in deviations(decoder, oracle, tokens, plan, lane):
        log.debug("steps of %d tokens: logits differ from the reference's by %.2f %% of their spread", at_once, 100 * off)
        if not off <= ALLOWED:  # nor NaN
            raise CardError(
                f"{plan.device.name}: in steps of {at_once} tokens logits differ from the reference's by {off:.0%} of their "
                f"spread, and {ALLOWED:.0%} is allowed: its kernels cannot be trusted with this driver and Triton "
                f"{version('triton')}; --device cpu serves this model"
            )
    log.info("%s computes what the reference does: one layer and %d tokens were compared", plan.device.name, TOKENS)
    remember(name)


def load_oracle(config: EngineConfig, plan: MemoryPlan, decoder: Decoder) -> tuple[Decoder, Tensor]:
    """These layers for the reference on the CPU, and the tokens [KNOWN] int64, rising, that its embedding and head have."""
    bits = head_bits(config.lm_head_dtype, ops=decoder.ops.name, dtype=plan.dtype)
    vocab, layers = decoder.spec.vocab, tried(decoder.spec)
    tokens = torch.randperm(vocab, generator=torch.Generator().manual_seed(0))[:KNOWN].sort().values
    with Checkpoint.open(Path(str(config.model)), config.quantization) as whole:
        oracle = load_model(
            _Part(whole, layers.start, tokens, vocab),
            replace(ModelSpec.from_config(whole.config).part(layers), vocab=len(tokens)),
            get_ops("cpu", reference=True),
            dtype=decoder.dtype,
            max_len=min(plan.max_model_len, TOKENS),
            lm_head_dtype=next(word for word, known in HEADS.items() if known == bits),
            embedding_dtype=config.embedding_dtype,
        )
    return oracle, tokens


def tried(spec: ModelSpec) -> range:
    """The layers that are compared: two, beside each other, where some have states, or other heads."""
    kinds = [(spec.is_linear(layer), spec.heads_of(layer)) for layer in range(spec.layers)]
    if len(set(kinds)) > 1:
        second = next(layer for layer in range(1, spec.layers) if kinds[layer] != kinds[layer - 1])
        return range(second - 1, second + 1)
    first = next((layer for layer in range(spec.layers) if spec.mixture_of(layer) is not None), 0)
    return range(first, first + 1)


class _Part(Checkpoint):
    """A checkpoint as if it began with this layer, and had only these tokens; what else is in it is not missed."""

    def __init__(self, whole: Checkpoint, first: int, tokens: Tensor, vocab: int) -> None:
        super().__init__(whole.index, whole.config, whole.scheme)
        self.whole, self.first, self.tokens, self.vocab = whole, first, tokens, vocab

    def _name(self, name: str) -> str:
        return LAYER.sub(lambda found: f"model.layers.{int(found[1]) + self.first}.", name, count=1)

    def has(self, name: str) -> bool:
        return self.whole.has(self._name(name))

    def info(self, name: str) -> TensorInfo | None:
        return self.whole.info(self._name(name))

    def take(self, name: str, *, dtypes: tuple[str, ...], shape: tuple[int | None, ...] | None = None) -> Tensor:
        return self.whole.take(self._name(name), dtypes=dtypes, shape=shape)

    def weight(self, name: str, expect: tuple[int, int] | None = None) -> QuantTensor | Tensor:
        if name not in (EMBEDDING, HEAD, TABLE) or expect is None:
            return self.whole.weight(self._name(name), expect)
        table = self.whole.weight(name, expect=(self.vocab, expect[1]))
        return table.select_rows(self.tokens) if isinstance(table, QuantTensor) else table[self.tokens]

    def leftover(self) -> list[str]:
        return []


def deviations(
    decoder: Decoder, oracle: Decoder, tokens: Tensor, plan: MemoryPlan, lane: Lane | None
) -> Iterable[tuple[int, float]]:
    """(tokens at once, how far the logits of ``tokens`` are from the oracle's, in shares of these' spread)."""
    count = min(TOKENS, plan.max_model_len)
    text = torch.randint(len(tokens), (count,), generator=torch.Generator().manual_seed(1))
    layers, spec = tried(decoder.spec), decoder.spec.part(tried(decoder.spec))
    kv = replace(plan.kv, layers=spec.kv_layers, shapes=spec.kv_shapes)
    small = replace(plan, kv=kv, num_blocks=kv.blocks(count), swap_blocks=0)
    expected = _logits(Runner(oracle, small, device=torch.device("cpu")), text, min(count, plan.max_num_batched_tokens))
    before = decoder.spec.part(range(layers.start)).kv_layers
    largest = decoder.kv_largest[before : before + spec.kv_layers]
    first = replace(decoder, spec=spec, layers=decoder.layers[layers.start : layers.stop], kv_largest=largest)
    runner = Runner(first, small, device=decoder.ops.device, lane=lane)
    for at_once in STEPS:
        found = _logits(runner, tokens[text], min(at_once, plan.max_num_batched_tokens))[:, tokens]
        yield at_once, float((found - expected).square().mean().sqrt() / expected.std())


@torch.inference_mode()
def _logits(runner: Runner, text: Tensor, at_once: int) -> Tensor:
    return torch.cat([part.cpu().clone() for part in runner.every_logit(text.tolist(), at_once)])  # each is overwritten


def key(plan: MemoryPlan, decoder: Decoder) -> str:
    """What a result holds for: the card with its compiler and kernels, and all of the model that chooses among these."""
    spec, layers = decoder.spec, [decoder.layers[number] for number in tried(decoder.spec)]
    weights = [*(weight for layer in layers for weight in layer.weights), decoder.head, decoder.embedding]
    found = [plan.dtype, plan.kv.dtype, plan.kv.block_size, os.environ.get("APPLIANCE_FP16_SUMS", "0")]
    found += [spec.architecture, spec.hidden, spec.intermediate, spec.heads, spec.kv_heads, spec.head_dim, spec.vocab]
    found += [spec.mixture, spec.recurrent, spec.wide, *([spec.per_layer] if spec.per_layer is not None else [])]
    found += [f"{type(weight).__name__} {weight.nbytes} {getattr(weight, 'rounds', '')}" for weight in weights]
    return SEPARATOR.join([card_key(plan.device), *map(str, found)])
