"""Mixed precision: more bits for the units of a model where they help most, as many as a target or a card has room for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import groupby
from typing import Any

from appliance.memory.fit import last
from appliance.memory.text import columns, size_text
from appliance.quantize.allot import Front
from appliance.quantize.fit import Place, weights_in_memory
from appliance.quantize.options import Options
from appliance.quantize.recipe import KEPT, Recipe, stored_bytes, units
from models.spec import ModelSpec
from quant.algorithms.grid import Grid
from quant.errors import InputError
from quant.publish import check_shape

WIDTHS = (2, 3, 4, 8, KEPT)
KINDS = ("attention", "heads", "mlp", "inner")
Sizes = dict[str, dict[int, int]]  # bytes by unit and bits
Costs = Mapping[str, Mapping[int, float]]


class Mixer:
    """Chooses bits for units: ``--target-bits``, or what the planner says of ``--fit``."""

    def __init__(self, options: Options, spec: ModelSpec, grid: Grid, config: Callable[[Recipe | None], dict[str, Any]]) -> None:
        """``config``: config.json of the checkpoint that a recipe makes; of the model as it is, for None.

        Raises InputError for what cannot be done, or need not.
        """
        self.options, self.spec, self.grid, self.config = options, spec, grid, config
        self.shapes = {module.name: (module.N, module.K) for module in spec.modules() if module.part in ("attention", "mlp")}
        self.units = units(spec)
        self.weights = sum(N * K for N, K in self.shapes.values())
        self.place = None
        if options.fit is not None:
            self.place = Place.read(options.fit, options.context, options.sequences, options.kv_cache_dtype, spec.max_len)
        self.widths = self._widths()
        for bits in self.widths[:-1]:
            for module in spec.layer_modules():
                check_shape(str(options.format), module.name, module.N, module.K, replace(grid, bits=bits))
        self.room = self._room()

    def _widths(self) -> tuple[int, ...]:
        """That are worth a try, KEPT among them: those of the format; below 4 bits only for a target that 4 bits do not reach."""
        least = 4
        if self.options.target_bits is not None:
            target = self.options.target_bits
            possible = [bits for bits in WIDTHS if bits <= 4 and (bits == 4 or self.options.format != "awq")]
            reached = [bits for bits in possible if self._mean(self.uniform(bits)) <= target]
            if not reached or target >= KEPT:
                low = self._mean(self.uniform(possible[0]))
                raise InputError(
                    f"--target-bits is {target:g}: at least {low:.4g} (all at {possible[0]} bits, with scales) and less than {KEPT} "
                    f"are needed with --format {self.options.format} and --group-size {self.options.group_size}"
                )
            least = reached[-1]
        return tuple(bits for bits in WIDTHS if bits >= least and (bits != 8 or self.options.format != "awq"))

    def uniform(self, bits: int) -> dict[str, int]:
        return dict.fromkeys(self.units, bits)

    def _room(self) -> int:
        """Bytes that the linears' weights can take, in the file for a target and in memory for a card."""
        if self.place is None:
            assert self.options.target_bits is not None
            return int(self.options.target_bits * self.weights / 8)
        if self.place.plan(self.place.study(self.config(None))) is not None:
            raise InputError(
                f"--fit {self.options.fit!r}: the model fits as it is ({self.place}), so nothing need be quantized; "
                "--bits or --target-bits make it smaller and faster all the same"
            )
        smallest = self.place.study(self.config(self.recipe(self.uniform(self.widths[0]))))
        if self.place.plan(smallest) is None:
            raise self.place.refusal(smallest, self.widths[0])
        self.sizes = self._in_memory()
        front = Front.of({unit: {bits: -size for bits, size in of.items()} for unit, of in self.sizes.items()}, self.sizes)
        return int(front.sizes[self._largest(front)])

    def _in_memory(self) -> Sizes:
        assert self.place is not None
        found: Sizes = {unit: {} for unit in self.units}
        for bits in self.widths:
            recipe = None if bits == KEPT else self.recipe(self.uniform(bits))
            for unit, size in weights_in_memory(self.place.study(self.config(recipe))).items():
                found[unit][bits] = size
        return found

    def _largest(self, front: Front) -> int:
        """The number of the last combination that fits on the card, by planning it."""
        place = self.place
        assert place is not None
        fits = last(
            lambda n: place.plan(place.study(self.config(self.recipe(front.bits(n))))) is not None, 0, len(front.sizes) - 1
        )
        return fits or 0

    @property
    def grids(self) -> dict[int, Grid]:
        """Those that something may be rounded to, by bits."""
        return {bits: replace(self.grid, bits=bits) for bits in self.widths if bits != KEPT}

    def choose(self, costs: Costs) -> dict[str, int]:
        """Bits by unit, for what rounding costs (appliance.quantize.sensitivity; nothing where a unit is left as it is)."""
        costs = {unit: {**own, KEPT: 0.0} for unit, own in costs.items()}
        if self.place is not None:
            front = Front.of(costs, self.sizes)
            return front.bits(self._largest(front))
        front = Front.of(costs, {unit: {bits: self.stored(unit, bits) for bits in self.widths} for unit in self.units})
        found = front.within(self.room)
        assert found is not None, "the smallest is within the target"
        return front.bits(found)

    def stored(self, unit: str, bits: int) -> int:
        """Bytes of a unit in the file."""
        grid = None if bits == KEPT else replace(self.grid, bits=bits)
        return sum(stored_bytes(*self.shapes[module], grid) for module in self.units[unit])

    def recipe(self, bits: Mapping[str, int]) -> Recipe:
        """The width that most weights have is the default."""
        share: dict[int, int] = {}
        for unit, own in bits.items():
            if own != KEPT:
                share[own] = share.get(own, 0) + self.stored(unit, KEPT)
        usual = max(share, key=lambda own: (share[own], -own)) if share else self.grid.bits
        others = {module: own for unit, own in bits.items() if own != usual for module in self.units[unit]}
        return Recipe(replace(self.grid, bits=usual), others)

    def _mean(self, bits: Mapping[str, int]) -> float:
        """Bits of a weight of the linears, with scales and zero points."""
        return 8 * sum(self.stored(unit, own) for unit, own in bits.items()) / self.weights

    def told(self, bits: Mapping[str, int]) -> str:
        """What was chosen, in a line, and layer by layer."""
        size = sum(self.stored(unit, own) for unit, own in bits.items())
        asked = f"--target-bits {self.options.target_bits:g}"
        if self.place is not None:
            asked = f"--fit: {size_text(self.room)} for the linears' weights on {self.place}"
        head = f"{asked}: {self._mean(bits):.3f} bits a weight with scales, {size_text(size)}"
        rows = []
        for own, layers in groupby(range(self.spec.layers), lambda n: tuple(bits[f"model.layers.{n}.{kind}"] for kind in KINDS)):
            numbers = list(layers)
            name = str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]}"
            rows.append((name, *map(str, own)))
        return "\n".join([head, *columns(("layer", "q, k, v", "o", "gate, up", "down"), rows)])
