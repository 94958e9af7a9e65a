"""Run by a test in a process and folder of its own: transformers' logits in float32 for small random models of every kind.

    python oracle.py OUTPUT_DIR < cases.json      {name: {"architecture": ..., "config": {...}}}

Writes OUTPUT_DIR/NAME/{config.json, model.safetensors} and OUTPUT_DIR/NAME.expected.safetensors: ids [T], logits [T, V], and as
``rounded`` those of the same model in bfloat16. Experts of gpt-oss are written in MXFP4, and computed with what
transformers makes of that.
"""

import json
import sys
import zlib
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

LENGTH = 45


def main() -> None:
    output = Path(sys.argv[1])
    for name, case in json.load(sys.stdin).items():
        torch.manual_seed(zlib.crc32(name.encode()))  # whatever cases there are beside it
        kind = getattr(transformers, case["architecture"])
        config = kind.config_class(**case["config"])
        config._attn_implementation = config._experts_implementation = "eager"  # others want sizes that are multiples of 8
        model = kind(config).float().eval()
        vocab = config.get_text_config().vocab_size
        with torch.no_grad():
            for kind, parameter in model.named_parameters():  # initial values are so small that attention would be uniform
                random = torch.randn_like(parameter)
                if kind.endswith(".A_log"):  # states that are forgotten at once, and some that last
                    parameter.copy_(random * 2 - 2)
                else:
                    parameter.copy_(random * 0.15 + (1.0 if parameter.dim() == 1 else 0.0))
            for what, buffer in model.named_buffers():
                if what.endswith(("correction_bias", "expert_bias")):
                    buffer.copy_(torch.randn_like(buffer) * 0.3)
                elif what.endswith("layer_scalar"):
                    buffer.copy_(1 + torch.randn_like(buffer) * 0.3)
            model.tie_weights()
            packed = random_mxfp4(model) if name.startswith("gpt-oss") else {}
            ids = torch.randint(0, vocab, (LENGTH,))
            logits = model(ids[None]).logits[0]
            model.save_pretrained(output / name)
            if packed:
                write_mxfp4(output / name, model, packed)
            rounded = model.bfloat16()(ids[None]).logits[0].float()
        found = {"ids": ids, "logits": logits.contiguous(), "rounded": rounded.contiguous()}
        save_file(found, output / f"{name}.expected.safetensors")


def random_mxfp4(model) -> dict[str, torch.Tensor]:
    """Replaces the weights of all experts by random ones in MXFP4; what those are written as."""
    packed = {}
    for name, parameter in model.named_parameters():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            experts, inputs, outputs = parameter.shape
            blocks = torch.randint(0, 256, (experts, outputs, inputs // 32, 16), dtype=torch.uint8)
            scales = torch.randint(121, 125, (experts, outputs, inputs // 32), dtype=torch.uint8)
            scales[0, 0], blocks[0, 0] = 0, 0  # a row of zeros
            packed |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
            parameter.copy_(convert_moe_packed_tensors(blocks, scales, dtype=torch.float32))
    return packed


def write_mxfp4(folder: Path, model, packed: dict[str, torch.Tensor]) -> None:
    names = {name.rpartition("_")[0] for name in packed}
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items() if name not in names}
    save_file(tensors | packed, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "mxfp4",
        "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"],
    }
    (folder / "config.json").write_text(json.dumps(config))


if __name__ == "__main__":
    main()
