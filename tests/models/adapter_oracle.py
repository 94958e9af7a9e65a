"""Run by a test in a process and folder of its own: what PEFT makes of random LoRA adapters, with transformers in float32.

    python adapter_oracle.py OUTPUT_DIR < cases.json      {name: {"architecture": ..., "config": {...}}}

Writes OUTPUT_DIR/NAME/{config.json, model.safetensors}, the adapter OUTPUT_DIR/NAME-adapter, as PEFT does, and
OUTPUT_DIR/NAME.expected.safetensors: ids [T], plain [T, V] and adapted [T, V].
"""

import json
import random
import sys
import zlib
from pathlib import Path

import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file

LENGTH = 37
LINEARS = ("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "gate_proj", "up_proj", "gate_up_proj", "down_proj")


def main() -> None:
    output = Path(sys.argv[1])
    for name, case in json.load(sys.stdin).items():
        seed = zlib.crc32(name.encode())
        torch.manual_seed(seed)
        kind = getattr(transformers, case["architecture"])
        config = kind.config_class(**case["config"])
        config._attn_implementation = config._experts_implementation = "eager"
        model = kind(config).float().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn_like(parameter) * 0.15 + (1.0 if parameter.dim() == 1 else 0.0))
            model.tie_weights()
            model.save_pretrained(output / name)
            ids = torch.randint(0, config.get_text_config().vocab_size, (LENGTH,))
            plain = model(ids[None]).logits[0].clone()
            adapted = with_adapter(model, random.Random(seed))
            for what, parameter in adapted.named_parameters():
                if ".lora_" in what:
                    parameter.copy_(torch.randn_like(parameter) * 0.15)
            logits = adapted(ids[None]).logits[0]
        adapted.save_pretrained(output / f"{name}-adapter")
        found = {"ids": ids, "plain": plain, "adapted": logits.contiguous()}
        save_file(found, output / f"{name}.expected.safetensors")


def with_adapter(model, rng: random.Random):
    """Of most linears of attention and of MLPs, in ranks that differ, scaled in one way or the other.

    Of mixtures attention's alone: PEFT takes the name of an MLP there for that of experts, too.
    """
    parents = (".self_attn",) if any("experts" in name for name, _ in model.named_parameters()) else (".self_attn", ".mlp")
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name.endswith(LINEARS) and "vis" not in name
        if name.rpartition(".")[0].endswith(parents)
    ]
    chosen = [name for name in names if rng.random() < 0.8] or names
    ranks = {name: rng.choice([1, 3, 8]) for name in chosen if rng.random() < 0.3}
    alphas = {name: rng.choice([2, 5]) for name in chosen if rng.random() < 0.3}
    options = {"rank_pattern": ranks, "alpha_pattern": alphas, "use_rslora": rng.random() < 0.5}
    return get_peft_model(model, LoraConfig(r=4, lora_alpha=6, target_modules=chosen, **options))


main()
