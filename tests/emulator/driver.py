"""A card that is not there: Triton compiles for it as ever, and its kernels' PTX runs on the CPU, some blocks at a time.

    install(80)          # before anything is launched, in a process whose kernels are not the interpreter's

Tensors are the CPU's. A kernel may touch the memory of its arguments, and of caches in a table of addresses, and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import driver
from triton.runtime.cache import get_cache_manager

from tests.emulator.instructions import build
from tests.emulator.machine import Blocks, Execute, Ranges
from tests.emulator.program import Program, parse
from tests.kernels.triton.cards import CARDS

TOGETHER = 4096  # threads: to begin an instruction takes as long as to execute it for so many
launches: dict[str, int] = {}
"""How often each kernel was launched."""
_allowed: list[Tensor] = []  # what kernels reach by addresses that they load


class Launcher:
    """What Triton calls to start a compiled kernel."""

    def __init__(self, source: Any, metadata: Any) -> None:
        path = get_cache_manager(metadata.hash).get_file(f"{metadata.name}.ptx")
        assert path is not None, metadata.name
        with open(path) as file:
            self.program: Program = parse(file.read())
        self.code: list[Execute] = build(self.program)
        self.metadata = metadata
        self.wanted = [kind != "constexpr" for kind in source.signature.values()]
        self.kinds = [kind for kind in source.signature.values() if kind != "constexpr"]

    def __call__(self, x: int, y: int, z: int, *launch: Any) -> None:
        args = launch[len(launch) - len(self.wanted) :]  # behind streams, handles and hooks
        given = [arg for arg, wanted in zip(args, self.wanted, strict=True) if wanted]
        tensors = [*(arg for arg in given if isinstance(arg, Tensor)), *_allowed]
        storages = (tensor.untyped_storage() for tensor in tensors)
        ranges = Ranges([(storage.data_ptr(), storage.data_ptr() + storage.nbytes()) for storage in storages if storage.nbytes()])
        numbers = [_bits(arg, kind) for arg, kind in zip(given, self.kinds, strict=True)]
        numbers += [0] * (len(self.program.parameters) - len(numbers))  # scratch memory that no kernel here asks for
        values = {name: number for (name, _), number in zip(self.program.parameters, numbers, strict=True)}
        launches[self.metadata.name] = launches.get(self.metadata.name, 0) + 1
        places = [(place[2], place[1], place[0]) for place in np.ndindex(z, y, x)]
        threads = 32 * self.metadata.num_warps
        together = max(1, TOGETHER // threads)
        for begin in range(0, len(places), together):
            Blocks(
                self.program,
                self.code,
                values,
                threads=threads,
                places=places[begin : begin + together],
                grid=(x, y, z),
                shared=self.metadata.shared,
                ranges=ranges,
            ).run()


def _bits(value: Any, kind: str) -> int:
    if isinstance(value, Tensor):
        return value.data_ptr()
    if kind in ("fp32", "f32"):
        return int(np.array(value, "f4").view("u4"))
    if kind in ("fp64", "f64"):
        return int(np.array(value, "f8").view("u8"))
    return int(value)


class Utilities:
    """What Triton asks of a driver's C part."""

    def __init__(self, capability: int) -> None:
        self.card = CARDS[capability]

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": self.card.shared_of_block, "multiprocessor_count": 2, "warpSize": 32}

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[Any, ...]:
        return object(), object(), 0, 0, 1024


class Emulated(DriverBase):
    """An NVIDIA card of one architecture."""

    def __init__(self, capability: int) -> None:
        self.target, self.utils = GPUTarget("cuda", capability, 32), Utilities(capability)
        self.launcher_cls: Callable[..., Launcher] = Launcher
        self.get_current_stream = lambda device: 0
        self.get_device_capability = lambda device=0: divmod(capability, 10)

    @staticmethod
    def is_active() -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def set_current_device(self, device: int) -> None:
        assert device == 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_interface(self) -> Any:
        raise NotImplementedError

    def get_empty_cache_for_benchmark(self) -> Any:
        raise NotImplementedError

    def clear_cache(self, cache: Any) -> None:
        raise NotImplementedError

    def get_benchmarker(self) -> Any:
        raise NotImplementedError

    def map_python_to_cpp_type(self, kind: str) -> str:
        raise NotImplementedError


def without_machine_code(backend: Any = None, stages: dict[str, Any] | None = None, *rest: Any) -> tuple[str, str]:
    """For Triton: what it compiles ends with PTX, which is all that runs here. Newer ones put the answer into a kernel's key."""
    if stages is not None:
        stages["cubin"] = lambda ptx, metadata: b""
    return "emulated", "emulated"


def install(capability: int) -> Emulated:
    """Make it the card that Triton finds, and tensors of the CPU a card's as far as kernels/triton asks."""
    card = Emulated(capability)
    driver.set_active(card)
    # Apart from what cards run: Triton 3.6 would take a kernel without machine code for one of theirs.
    knobs.cache.dir = str(Path(knobs.cache.dir) / "emulated")
    knobs.runtime.add_stages_inspection_hook = without_machine_code
    torch.Tensor.is_cuda = property(lambda tensor: True)  # type: ignore[assignment, misc]
    from kernels.triton import attention, copy, kv, weights

    make = copy.CacheTable.__init__

    def init(table: copy.CacheTable, *args: Any, **fields: Any) -> None:
        make(table, *args, **fields)
        _allowed.extend(table.tensors)

    copy.CacheTable.__init__ = init  # type: ignore[method-assign]
    for module in (attention, kv, weights):
        module.capability = lambda device: capability  # type: ignore[attr-defined]
    return card
