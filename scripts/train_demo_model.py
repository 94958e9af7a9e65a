"""Train the demo model that ships in the package, from text that this script makes itself, and write it as an AWQ checkpoint.

The last part of the training runs with the weights rounded to 4 bits, so that the shipped weights are the trained ones.
    python scripts/train_demo_model.py --output appliance/demo
    python scripts/train_demo_model.py --evaluate appliance/demo
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections import Counter
from pathlib import Path

import torch
from demo_model.export import export
from demo_model.model import Linear, Llama, Shape
from demo_model.questions import held_out_sample
from demo_model.tokens import Batches, save_tokenizer, train_tokenizer
from tqdm import tqdm

ROUNDED_FROM = 0.7  # the share of the steps after which weights are rounded


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("appliance/demo"))
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--rows", type=int, default=48)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--vocab", type=int, default=640)
    parser.add_argument("--held-out", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--evaluate", type=Path, metavar="DIR", help="only evaluate this checkpoint")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.evaluate:
        return evaluate(args.evaluate)
    args.output.mkdir(parents=True, exist_ok=True)
    train(args)
    sample = held_out_sample(args.held_out, args.seed)
    lines = [json.dumps({"category": q.category, "question": q.text, "answer": q.answer}) for q in sample]
    (args.output / "heldout.jsonl").write_text("\n".join(lines) + "\n")
    return evaluate(args.output)


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    tokenizer = train_tokenizer(args.vocab)
    model = Llama(Shape(vocab=tokenizer.get_vocab_size()))
    save_tokenizer(tokenizer, args.output, model.shape.max_len)
    batches = Batches(tokenizer, args.seed, args.rows, args.length)
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.rate, betas=(0.9, 0.98))
    count = sum(p.numel() for p in model.parameters())
    bar = tqdm(range(args.steps), desc=f"{count / 1e6:.2f} M parameters", mininterval=5)
    smooth, begun = 0.0, time.perf_counter()
    for step in bar:
        Linear.rounded = step >= ROUNDED_FROM * args.steps
        for group in optimizer.param_groups:
            group["lr"] = args.rate * rate_at(step / args.steps)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model.loss(*batches.next())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        smooth = loss.item() if step == 0 else 0.98 * smooth + 0.02 * loss.item()
        bar.set_postfix_str(f"loss {smooth:.4f}", refresh=False)
    print(f"trained in {(time.perf_counter() - begun) / 60:.1f} minutes, loss {smooth:.4f}")
    export(model, args.output)


def rate_at(done: float) -> float:
    """Warm-up over 3 % of the steps, then a cosine down to 2 %."""
    return done / 0.03 if done < 0.03 else 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (done - 0.03) / 0.97))


def evaluate(directory: Path) -> int:
    """Exact match on the held-out questions, greedy, through the engine that will serve it."""
    from appliance import LLM, SamplingParams

    items = [json.loads(line) for line in (directory / "heldout.jsonl").read_text().splitlines()]
    llm = LLM(model=str(directory), dtype="float32")
    conversations = [[{"role": "user", "content": item["question"]}] for item in items]
    outputs = llm.chat(conversations, SamplingParams(temperature=0.0, max_tokens=64))
    right, total = Counter[str](), Counter[str]()
    for item, output in zip(items, outputs, strict=True):
        answer = output.outputs[0].text
        total[item["category"]] += 1
        right[item["category"]] += answer == item["answer"]
        if answer != item["answer"]:
            print(f"  {item['question']!r} -> {answer!r}, not {item['answer']!r}")
    for category in total:
        print(f"{category:12} {right[category]:4} of {total[category]:4}")
    share = sum(right.values()) / len(items)
    print(f"exact match {share:.1%} of {len(items)} held-out questions")
    return 0 if share >= 0.9 else 1


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    sys.exit(main())
