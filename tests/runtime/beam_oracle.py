"""Run by a test in a process and folder of its own: transformers' beam search over a small random Llama in float32.

    python beam_oracle.py OUTPUT_DIR

Writes OUTPUT_DIR/model and OUTPUT_DIR/expected.json: [{prompt, width, steps, eos, tokens, scores}], sums of log-probabilities.
"""

import json
import random
import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

CONFIG = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def main() -> None:
    output = Path(sys.argv[1])
    torch.manual_seed(0)
    config = LlamaConfig(**CONFIG)
    config._attn_implementation = "eager"
    model = LlamaForCausalLM(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.15 + (1.0 if parameter.dim() == 1 else 0.0))
    model.save_pretrained(output / "model")
    rng, cases = random.Random(0), []
    for width, steps, length in [(1, 6, 5), (2, 12, 17), (3, 20, 9), (4, 8, 16), (6, 10, 30)]:
        prompt = [rng.randrange(3, 97) for _ in range(length)]
        free = search(model, prompt, width, steps, None)
        cases.append(free)
        cases += [search(model, prompt, width, steps, eos) for eos in {tokens[steps // 2] for tokens in free["tokens"]}]
    (output / "expected.json").write_text(json.dumps(cases))


def search(model, prompt, width, steps, eos):
    ids = torch.tensor([prompt])
    model.generation_config.eos_token_id = eos
    with torch.no_grad():
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            num_beams=width,
            num_return_sequences=width,
            max_new_tokens=steps,
            length_penalty=0.0,
            early_stopping="never",
            eos_token_id=eos,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_scores=True,
        )
    tokens = [row[len(prompt) :] for row in out.sequences.tolist()]
    if eos is not None:
        tokens = [row[: row.index(eos) + 1] if eos in row else row for row in tokens]
    scores = out.sequences_scores.tolist() if width > 1 else [total(model, prompt, tokens[0])]
    return {"prompt": prompt, "width": width, "steps": steps, "eos": eos, "tokens": tokens, "scores": scores}


def total(model, prompt, answer):
    """Of a single beam, which transformers calls greedy and does not score."""
    with torch.no_grad():
        rows = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
    return sum(rows[len(prompt) - 1 + i, token].item() for i, token in enumerate(answer))


if __name__ == "__main__":
    main()
