"""What options and a checkpoint's small files make of an engine: its device, its scheduler, the tokens that end an answer."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from appliance.config import EngineConfig
from appliance.core.blocks import BlockPool
from appliance.core.drafts import Drafts
from appliance.core.request import Request
from appliance.core.scheduler import Scheduler
from appliance.memory.early import check_order
from appliance.memory.giving_way import GivingWay
from appliance.memory.planner import MemoryPlan
from appliance.memory.proofs import device_kind
from models.spec import ModelSpec
from quant.errors import InputError
from quant.headers import read_json


def choose_device(name: str) -> torch.device:
    """Of --device (appliance.memory.proofs.device_kind). InputError where it is unknown, or no card can be used.

    From here on CUDA counts cards as nvidia-smi does, whose first one is planned for: by itself it begins with the fastest.
    """
    kind = device_kind(name)
    if kind == "cuda":
        os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
        if not torch.cuda.is_available():
            raise InputError(
                f"--device cuda: this torch ({torch.__version__}) finds no NVIDIA card that it can use, mostly since the driver "
                "is older than its CUDA (`appliance doctor` says); use --device cpu"
            )
    return torch.device(kind)


def make_scheduler(config: EngineConfig, plan: MemoryPlan, spec: ModelSpec) -> Scheduler:
    """For the pool of a plan, with the host memory that it has for swapping. InputError for options that do not exist."""
    check_order(config)
    cost = GivingWay.of(spec, plan.device, plan.kv.block_bytes, plan.weight_bytes)
    size, mode = plan.kv.block_size, config.preemption_mode

    def swaps(request: Request) -> bool:
        cheaper = cost.swap_s(-(-request.computed // size)) < cost.recompute_s(request.computed)
        return mode == "swap" or (mode == "auto" and cheaper)

    return Scheduler(
        BlockPool(plan.num_blocks, size),
        max_num_batched_tokens=plan.max_num_batched_tokens,
        max_num_seqs=plan.max_num_seqs,
        host=BlockPool(plan.swap_blocks, size) if plan.swap_blocks else None,
        caching=config.enable_prefix_caching,
        kept=plan.kept_states,
        priorities=config.scheduling_policy == "priority",
        swaps=swaps,
        turn=cost.turn,
        drafts=Drafts.of(config.speculative_config, plan.device.kind),
    )


def eos_token_ids(directory: Path, spec: ModelSpec) -> tuple[int, ...]:
    """End-of-text ids: generation_config.json's (chat models list several there) together with config.json's."""
    path = directory / "generation_config.json"
    more = read_json(path).get("eos_token_id") if path.is_file() else None
    ids = [] if more is None else more if isinstance(more, list) else [more]
    if not all(type(one) is int and one >= 0 for one in ids):
        raise InputError(f"{path}: eos_token_id is {more!r:.60}, expected a token id or a list of them")
    return tuple(sorted({*spec.eos_token_ids, *ids}))
