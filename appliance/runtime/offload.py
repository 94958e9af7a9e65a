"""Weights that stay in host memory (--cpu-offload-gb): taken from the loader layer by layer, and handed to the card's streams."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from appliance.memory.offload import Offload
from appliance.memory.planner import PlanError
from appliance.memory.text import size_text
from kernels.ops import Layer
from models.decoder import Decoder

if TYPE_CHECKING:  # only a card needs Triton
    from kernels.triton.stream import Parked

log = logging.getLogger("appliance.offload")


class Offloading:
    """The layers of one model that a plan has out, from before it is loaded until it can run."""

    def __init__(self, offload: Offload, device: torch.device) -> None:
        self.offload, self.device = offload, device
        self._parked: dict[int, Parked] = {}

    def take(self, number: int, layer: Layer) -> Layer:
        """For models.loader: a layer that is out is moved to the host, and what is returned holds nothing of its weights.

        The device has it whole until then, in each of the loader's workers. PlanError where no memory can be pinned.
        """
        from kernels.triton.stream import park

        if number not in self.offload.layers:
            return layer
        try:
            self._parked[number] = park(layer)
        except torch.OutOfMemoryError:  # of the card
            raise
        except RuntimeError as error:
            raise PlanError(
                f"--cpu-offload-gb: layer {number} found no memory to pin on the host ({size_text(self.offload.host_bytes)} are "
                f"needed in all): a smaller one, or a higher limit on locked memory (ulimit -l) ({str(error).splitlines()[0]})"
            ) from error
        return self._parked[number].layer

    def finish(self, decoder: Decoder) -> Decoder:
        """The model that runs: the buffers are allocated, and the first layers on their way."""
        from kernels.triton.stream import WeightStream

        offload, stream = self.offload, WeightStream(self._parked, self.device)
        if (stream.nbytes, stream.host_nbytes) != (offload.staging_bytes, offload.host_bytes):
            log.warning("planned buffers of %d bytes and %d on the host, but they are %d and %d", offload.staging_bytes,
                        offload.host_bytes, stream.nbytes, stream.host_nbytes)  # fmt: skip
        log.info(
            "%d of %d layers are in host memory (%s, pinned), which frees %s of the card: every step brings %s over the bus, and "
            "its kernels are launched one by one meanwhile (no CUDA graphs)",
            len(offload.layers),
            len(decoder.layers),
            size_text(offload.host_bytes),
            size_text(offload.saved),
            size_text(offload.step_bytes),
        )
        layers = tuple(stream.layers.get(number, layer) for number, layer in enumerate(decoder.layers))
        return replace(decoder, layers=layers)
