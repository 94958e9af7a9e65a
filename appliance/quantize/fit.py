"""``--fit``: which quantized versions of a model fit on a card, with so many sequences of such a length, by the planner."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from appliance.config import EngineConfig
from appliance.memory.cards import find_cards
from appliance.memory.demand import Demand
from appliance.memory.devices import DeviceInfo, this_device
from appliance.memory.early import check_options
from appliance.memory.modules import Machinery, layer_weights
from appliance.memory.plan import MemoryPlan, PlanError
from appliance.memory.planner import read_settings
from appliance.memory.roofline import Work
from appliance.memory.settings import parse_length
from appliance.memory.sizes import parse_size
from appliance.memory.study import Study
from appliance.memory.text import size_text
from models.plain import INPUTS
from models.spec import ModelSpec
from quant.errors import InputError
from quant.scheme import QuantScheme

ASKED = {"max_model_len", "max_num_seqs", "kv_cache_dtype"}  # the engine's options that can be asked for here, too
USUAL = 8192  # tokens of context where --context is not given, or the model's longest if that is less

ANY = sys.maxsize


@dataclass(frozen=True)
class Place:
    """A device, and what has to fit there beside the weights, with all else as ``appliance serve`` has it by default."""

    name: str  # as it was given
    device: DeviceInfo
    engine: EngineConfig
    context: int
    sequences: int

    @classmethod
    def read(cls, name: str, context: str | None, sequences: int, kv_cache_dtype: str, longest: int = ANY) -> Place:
        """``name``: a card, a size (24GB), or cpu or cuda for what this machine has. ``longest``: the model's own, once known.

        Raises InputError.
        """
        if sequences < 1:
            raise InputError(f"--sequences is {sequences}: at least 1 is needed")
        wanted = min(USUAL, longest)
        if context is not None:
            try:
                length = parse_length(context)
            except InputError:
                length = None
            if length is None:
                raise InputError(
                    f"--context is {context!r}: a number of at least 2 tokens is needed (32k = 32,000, 32K = 32,768)"
                )
            wanted = length
        if wanted > longest:
            raise InputError(f"--context is {wanted}, but the model was made for at most {longest} tokens")
        device = _device(name)
        engine = EngineConfig(device=device.kind, kv_cache_dtype=kv_cache_dtype)
        check_options(engine, device)
        return cls(name, device, engine, wanted, sequences)

    def study(self, config: Mapping[str, Any]) -> Study:
        """The model that has this config.json, in the planner's terms. Raises InputError."""
        spec, scheme = ModelSpec.from_config(dict(config)), QuantScheme.from_config(config)
        machinery = Machinery.choose(self.engine, spec.dtype, self.device, float16=spec.float16)
        demand = Demand.of(spec, scheme, machinery, model="the model")
        settings = read_settings(self.engine, self.device)
        return Study(self.device, None, 1, settings, demand, Work.of(spec, scheme, machinery), (spec, scheme, machinery))

    def plan(self, study: Study) -> MemoryPlan | None:
        """The plan for that context, with room for that many sequences; None where there is not. As ``appliance plan`` has it."""
        usual = study.other()
        if usual is None or study.other(max_len=self.context) is None:
            return None
        found = study.other(max_len=self.context, max_seqs=max(self.sequences, usual.max_num_seqs))
        return found if found is not None and found.sequences(self.context) >= self.sequences else None

    def refusal(self, study: Study, bits: int) -> InputError:
        """Why not even that model fits, and what would."""
        begin, most = f"--fit {self.name!r}: even at {bits} bits", max(self.sequences, 1)
        asked = replace(study, settings=replace(study.settings, max_len=self.context, max_seqs=most))
        larger = ", ".join(card.name for card in asked.larger())
        words = f"; the smallest cards that would do: {larger}" if larger else ""
        try:
            found = asked.plan
        except PlanError as error:
            facts = re.split(r"\. (?:What would fit|No setting)", str(error))[0]
            known = [str(remedy) for remedy in error.remedies if remedy.options and set(remedy.options) <= ASKED]
            would = f"; what would fit: {', or '.join(known)}" if known else ""
            said = f"{begin} {facts}{would}{words}"
            return InputError(said.replace("--max-model-len", "--context").replace("--max-num-seqs", "--sequences"))
        longest = study.longest(most)
        length = 0 if longest is None else longest.max_model_len
        room = f"weights {size_text(found.weight_bytes)}, room for {found.sequences(self.context):.1f} of them"
        remedies = f"take --context {length} or less, fewer --sequences, or --kv-cache-dtype fp8"
        return InputError(f"{begin} {most} sequences of {self.context:,} tokens do not fit: {room}; {remedies}{words}")

    def __str__(self) -> str:
        several = f"{self.sequences} sequences" if self.sequences > 1 else "a sequence"
        return f"{self.device.name} with {several} of {self.context:,} tokens"


def _device(name: str) -> DeviceInfo:
    """Raises InputError."""
    if name in ("cpu", "cuda"):
        return this_device(name)
    if re.fullmatch(r"[0-9.]+\s*[KMGT]i?B?", name.strip(), re.IGNORECASE):
        size = parse_size("--fit", name)
        return DeviceInfo("cuda", f"a card with {size_text(size)}", size, size)
    cards = find_cards([name], flag="--fit")
    if len(cards) != 1:
        raise InputError(f"--fit {name!r}: {len(cards)} cards; models are served on one")
    return cards[0].device()


def weights_in_memory(study: Study) -> dict[str, int]:
    """Bytes of the decoder layers' linears on the device, by unit (appliance.quantize.recipe.units)."""
    spec, scheme, machinery = study.whole
    found: dict[str, int] = {}
    for one in layer_weights(spec, scheme):
        prefix, short = re.fullmatch(r"(model\.layers\.\d+)\.(.+)", one.module.name).groups()  # type: ignore[union-attr]
        unit = f"{prefix}.{INPUTS[short]}"
        found[unit] = found.get(unit, 0) + one.nbytes(machinery)
    return found
