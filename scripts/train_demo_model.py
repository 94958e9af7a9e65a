"""Train the demo model that ships in the package, from text that this script makes itself; quantize it, and judge what it cost.

The last part of the training runs with the weights rounded to 4 bits, on the very grid to which `appliance quantize --method rtn`
rounds: the shipped weights are the trained ones. WORK keeps the unquantized model (WORK/trained), texts, and what was made of it.
    python scripts/train_demo_model.py --output appliance/demo
    python scripts/train_demo_model.py --compare                    WORK/trained by rtn, AWQ and GPTQ, in 4 and in 3 bits
    python scripts/train_demo_model.py --evaluate appliance/demo
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from demo_model.checkpoint import save
from demo_model.model import GRID, Linear, Llama, Shape
from demo_model.questions import held_out_sample
from demo_model.tokens import Batches, held_out_text, save_tokenizer, train_tokenizer, training_text
from tqdm import tqdm

from appliance import cli
from appliance.config import EngineConfig
from appliance.eval.questions import ask, read_questions

ROUNDED_FROM = 0.7  # the share of the steps after which weights are rounded
GOOD = 0.9  # of the held-out questions: a model with fewer right answers should not ship
LENGTH = "128"  # tokens of a piece of text, as in training
TRAINED, TEXT, CALIBRATION, QUESTIONS = "trained", "heldout.txt", "calibration.txt", "heldout.jsonl"
COMPARED = [(method, bits) for bits in (GRID.bits, 3) for method in ("rtn", "awq", "gptq")]
SHIPPED = COMPARED[0]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("appliance/demo"))
    parser.add_argument("--work", type=Path, default=Path("build/demo-model"))
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--rows", type=int, default=48)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--vocab", type=int, default=640)
    parser.add_argument("--held-out", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--compare", action="store_true", help="only quantize WORK/trained by each method, and judge the results")
    parser.add_argument("--evaluate", type=Path, metavar="DIR", help="only ask this checkpoint the held-out questions")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.evaluate:
        command("eval", args.evaluate, "--questions", args.evaluate / QUESTIONS, "--dtype", "float32", "--no-speed")
        return good(args.evaluate)
    if args.compare:
        judge(args.work, [quantize(args.work, method, bits) for method, bits in COMPARED])
        return 0
    (args.work / TRAINED).mkdir(parents=True, exist_ok=True)
    train(args, args.work / TRAINED)
    write_texts(args)
    made = quantize(args.work, *SHIPPED)
    judge(args.work, [made])
    ship(made, args.work / QUESTIONS, args.output)
    return good(args.output)


def train(args: argparse.Namespace, directory: Path) -> None:
    """Train, and write the unquantized model with its tokenizer."""
    torch.manual_seed(args.seed)
    tokenizer = train_tokenizer(args.vocab)
    model = Llama(Shape(vocab=tokenizer.get_vocab_size()))
    save_tokenizer(tokenizer, directory, model.shape.max_len)
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
    save(model, directory)


def rate_at(done: float) -> float:
    """Warm-up over 3 % of the steps, then a cosine down to 2 %."""
    return done / 0.03 if done < 0.03 else 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (done - 0.03) / 0.97))


def write_texts(args: argparse.Namespace) -> None:
    """Held-out questions, alone and as text, and text to calibrate with."""
    sample = held_out_sample(args.held_out, args.seed)
    lines = [json.dumps({"category": q.category, "question": q.text, "answer": q.answer}) for q in sample]
    (args.work / QUESTIONS).write_text("\n".join(lines) + "\n")
    (args.work / TEXT).write_text(held_out_text(sample))
    (args.work / CALIBRATION).write_text(training_text(args.seed + 1, 2000))


def quantize(work: Path, method: str, bits: int) -> Path:
    """WORK/trained by one method, on the grid it was trained for but for the bits."""
    output = work / f"{method}-{bits}"
    for old in (output, output.with_name(f"{output.name}.partial")):  # of another training
        shutil.rmtree(old, ignore_errors=True)
    text = [] if method == "rtn" else ["--calibration", work / CALIBRATION, "--calibration-length", LENGTH]
    grid = ["--bits", bits, "--group-size", GRID.group_size, "--no-sym"]
    command("quantize", work / TRAINED, "--output", output, "--method", method, *grid, *text)
    return output


def judge(work: Path, models: Sequence[Path]) -> None:
    """The table of ``models`` beside the one that they were made from.

    Its perplexity counts questions, too, which nobody taught the model to predict: divergence and exact match tell more.
    """
    text = ["--text", work / TEXT, "--length", LENGTH, "--base", work / TRAINED]
    command("eval", work / TRAINED, *models, *text, "--questions", work / QUESTIONS, "--dtype", "float32", "--no-speed")


def command(*words: object) -> None:
    """Run an ``appliance`` command. Raises SystemExit where it fails."""
    argv = [str(word) for word in words]
    argv += ["--threads", str(torch.get_num_threads())]
    print("$ appliance", *argv, flush=True)
    if code := cli.run(argv):
        raise SystemExit(code)


def ship(made: Path, questions: Path, output: Path) -> None:
    """Put a checkpoint where the package has it."""
    output.mkdir(parents=True, exist_ok=True)
    for old in [*output.glob("*.safetensors"), *output.glob("*.safetensors.index.json")]:
        old.unlink()
    for path in (*made.iterdir(), questions):
        shutil.copyfile(path, output / path.name)


def good(directory: Path) -> int:
    """The exit code: 0 for a model that answers enough of its held-out questions."""
    answers = ask(
        EngineConfig(model=str(directory), dtype="float32", threads=torch.get_num_threads()),
        read_questions(str(directory / QUESTIONS)),
        64,
    )
    print(f"{directory}: {answers.right} of {answers.of} held-out questions answered exactly ({answers.share:.1%})")
    return 0 if answers.share >= GOOD else 1


if __name__ == "__main__":
    sys.exit(main())
