"""Run by a test in a process and folder of its own: transformers' logits in float32 for small random models of every kind.

    python oracle.py OUTPUT_DIR < cases.json      {name: {"architecture": ..., "config": {...}}}

Writes OUTPUT_DIR/NAME/{config.json, model.safetensors} and OUTPUT_DIR/NAME.expected.safetensors: ids [T], logits [T, V], and as
``rounded`` those of the same model in bfloat16.
"""

import json
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file

LENGTH = 45


def main() -> None:
    output = Path(sys.argv[1])
    for number, (name, case) in enumerate(json.load(sys.stdin).items()):
        torch.manual_seed(number)
        kind = getattr(transformers, case["architecture"])
        config = kind.config_class(**case["config"])
        config._attn_implementation = config._experts_implementation = "eager"  # others want sizes that are multiples of 8
        model = kind(config).float().eval()
        vocab = config.get_text_config().vocab_size
        with torch.no_grad():
            for parameter in model.parameters():  # initial values are so small that attention would be uniform
                parameter.copy_(torch.randn_like(parameter) * 0.15 + (1.0 if parameter.dim() == 1 else 0.0))
            model.tie_weights()
            ids = torch.randint(0, vocab, (LENGTH,))
            logits = model(ids[None]).logits[0]
            model.save_pretrained(output / name)
            rounded = model.bfloat16()(ids[None]).logits[0].float()
        found = {"ids": ids, "logits": logits.contiguous(), "rounded": rounded.contiguous()}
        save_file(found, output / f"{name}.expected.safetensors")


if __name__ == "__main__":
    main()
