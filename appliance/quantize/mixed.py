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

WIDTHS = (2, 3, 4, 8)
FINER = (128, 64, 32)  # groups that are tried where --group-size is larger: a small step between two widths
KINDS = ("attention", "heads", "mlp", "inner")
Choice = dict[str, str]  # by unit: "4", "4 g32", .., "16"
Costs = Mapping[str, Mapping[int, float]]


class Mixer:
    """Chooses grids for units: ``--target-bits``, or what the planner says of ``--fit``."""

    def __init__(
        self,
        options: Options,
        spec: ModelSpec,
        grid: Grid,
        config: Callable[[Recipe | None], dict[str, Any]],
        chosen: Choice | None = None,
    ) -> None:
        """``config``: config.json of the checkpoint that a recipe makes; of the model as it is, for None.

        ``chosen``: by the job that is gone on with; what has room is not asked again then. Raises InputError for what cannot be
        done, or need not.
        """
        self.options, self.spec, self.grid, self.config = options, spec, grid, config
        self.shapes = {module.name: (module.N, module.K) for module in spec.modules() if module.part in ("attention", "mlp")}
        self.units = units(spec)
        self.weights = sum(N * K for N, K in self.shapes.values())
        self.place = None
        if options.fit is not None:
            self.place = Place.read(options.fit, options.context, options.sequences, options.kv_cache_dtype, spec.max_len)
        self.names = self._names()
        self.sizes = self._in_files() if self.place is None else self._in_memory(self.place)
        known = chosen is not None and chosen.keys() == self.units.keys() and set(chosen.values()) <= self.names.keys()
        self.chosen = chosen if known else None
        self.room = self._room()

    def _room(self) -> int:
        """Bytes that the linears' weights take in files at most. Raises InputError."""
        if self.chosen is not None:
            return sum(self._stored(unit, self.names[name]) for unit, name in self.chosen.items())
        return self._target() if self.place is None else self._fitting(self.place)

    def forget(self) -> None:
        """What was chosen was not for this job."""
        if self.chosen is not None:
            self.chosen = None
            self.room = self._room()

    def _names(self) -> dict[str, Grid | None]:
        """What a unit can be: the format's widths, 4 bits or less in groups of --group-size and smaller ones, or as it is.

        Less than 4 bits are tried only where 4 are more than the target. Raises InputError for shapes that cannot be.
        """
        mixing, target = self.options.format != "awq", self.options.target_bits
        found: dict[str, Grid | None] = {}
        for bits in WIDTHS if mixing else (4,):
            grid = replace(self.grid, bits=bits)
            if bits < 4 and (target is None or target >= self._mean(replace(grid, bits=4))):
                continue
            if bits < 3 and target is not None and target >= self._mean(replace(grid, bits=3)):
                continue
            self._check(grid)
            found[str(bits)] = grid
            for size in FINER if mixing and bits <= 4 else ():
                finer = replace(grid, group_size=size)
                if (grid.group_size == -1 or size < grid.group_size) and self._can(finer):
                    found[f"{bits} g{size}"] = finer
        return {**found, str(KEPT): None}

    def _check(self, grid: Grid) -> None:
        for module in self.spec.layer_modules():
            check_shape(str(self.options.format), module.name, module.N, module.K, grid)

    def _can(self, grid: Grid) -> bool:
        try:
            self._check(grid)
        except InputError:
            return False
        return True

    def _target(self) -> int:
        """Bytes that the linears' weights can take in files."""
        target, least = self.options.target_bits, next(iter(self.names))
        assert target is not None
        low = self._mean(self.names[least])
        if not low <= target < KEPT:
            how = f"--format {self.options.format} and --group-size {self.options.group_size}"
            raise InputError(
                f"--target-bits is {target:g}: with {how} at least {low:.4g} (all at {least} bits, with scales) and "
                f"less than {KEPT} are needed"
            )
        return int(target * self.weights / 8)

    def _fitting(self, place: Place) -> int:
        """Bytes that they take in files at most. Raises InputError where the model fits as it is, or in no way."""
        if place.plan(place.study(self.config(None))) is not None:
            raise InputError(
                f"--fit {self.options.fit!r}: the model fits as it is ({place}), so nothing need be quantized; "
                "--bits or --target-bits make it smaller and faster all the same"
            )
        least = next(iter(self.names))
        smallest = place.study(self.config(self._uniform(self.names[least])))
        if place.plan(smallest) is None:
            raise place.refusal(smallest, int(least))
        return min(2 * self.weights, place.device.available)

    def _in_files(self) -> dict[str, dict[int, int]]:
        return {unit: {n: self._stored(unit, grid) for n, grid in enumerate(self.names.values())} for unit in self.units}

    def _in_memory(self, place: Place) -> dict[str, dict[int, int]]:
        found: dict[str, dict[int, int]] = {unit: {} for unit in self.units}
        for n, grid in enumerate(self.names.values()):
            study = place.study(self.config(None if grid is None else self._uniform(grid)))
            for unit, size in weights_in_memory(study).items():
                found[unit][n] = size
        return found

    def _largest(self, front: Front, place: Place) -> int:
        """The number of a combination that fits beside one that does not, by planning them; the first is known to fit."""
        count = len(front.sizes) - 1
        return (
            last(lambda n: place.plan(place.study(self.config(self.recipe(self._choice(front, n))))) is not None, 0, count) or 0
        )

    def _choice(self, front: Front, number: int) -> Choice:
        names = list(self.names)
        return {unit: names[n] for unit, n in front.bits(number).items()}

    @property
    def grids(self) -> dict[int, Grid]:
        """Those that units may be rounded to, by their numbers among what a unit can be."""
        return {n: grid for n, grid in enumerate(self.names.values()) if grid is not None}

    def choose(self, costs: Costs) -> Choice:
        """For what rounding costs, by unit and number (appliance.quantize.sensitivity): that which costs least."""
        front = Front.of({unit: {**own, len(self.names) - 1: 0.0} for unit, own in costs.items()}, self.sizes)
        if self.place is not None:
            return self._choice(front, self._largest(front, self.place))
        found = front.within(self.room)
        assert found is not None, "the smallest is within the target"
        return self._choice(front, found)

    def _stored(self, unit: str, grid: Grid | None) -> int:
        """Bytes of a unit in files."""
        form = str(self.options.format)
        return sum(stored_bytes(*self.shapes[module], grid, form) for module in self.units[unit])

    def _mean(self, grid: Grid | None) -> float:
        """Bits of a weight, with scales and zero points, where all are on that grid."""
        return 8 * sum(self._stored(unit, grid) for unit in self.units) / self.weights

    def _uniform(self, grid: Grid | None) -> Recipe:
        return self.recipe(dict.fromkeys(self.units, next(name for name, its in self.names.items() if its == grid)))

    def recipe(self, choice: Choice) -> Recipe:
        """The grid that most weights are on is the default."""
        share: dict[str, int] = {}
        for unit, name in choice.items():
            share[name] = share.get(name, 0) + self._stored(unit, None)
        usual = max((name for name in share if self.names[name] is not None), key=lambda name: share[name], default=None)
        others = {module: self.names[name] for unit, name in choice.items() if name != usual for module in self.units[unit]}
        return Recipe((None if usual is None else self.names[usual]) or self.grid, others)

    def told(self, choice: Choice) -> str:
        """What was chosen, in a line, and layer by layer."""
        size = sum(self._stored(unit, self.names[name]) for unit, name in choice.items())
        asked = f"--target-bits {self.options.target_bits}"
        if self.place is not None:
            asked = f"--fit: {self.place}"
        head = f"{asked}: {8 * size / self.weights:.3f} bits a weight with scales, {size_text(size)}"
        rows = []
        for own, layers in groupby(
            range(self.spec.layers), lambda n: tuple(choice[f"model.layers.{n}.{kind}"] for kind in KINDS)
        ):
            numbers = list(layers)
            rows.append((str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]}", *own))
        return "\n".join([head, *columns(("layer", "q, k, v", "o", "gate, up", "down"), rows)])
