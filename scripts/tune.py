"""How a card's products are launched best, measured: tables for kernels/configs.

    scripts/tune                              usual shapes (1B to 32B), int4 layers and an int8 head, in bfloat16
    scripts/tune --model DIR                  the shapes of a checkpoint, in its own types (again for more of them)
    scripts/tune --models 8b --dtypes fp16    of one usual size, in float16
    scripts/tune --minutes 8                  stop in time, with what is there; the next call goes on where this one stopped
    scripts/tune --small --device cpu --out /tmp/tables    try the script itself, without a card

For each shape and number of rows: blocks, warps and loads under way first, from the rule's split; then splits of the best three.
Times are medians of CUDA graphs over weights larger than the card's cache, with the kernel that takes up the product: a norm
that adds partial sums, or silu * up. A candidate must give the result of the rule's launch first; what does not fit the card, or
spills registers, is left out. The rule's own launch stays where no other is better by 2 %.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tune_search import Shape, Tuner

ROOT = Path(__file__).resolve().parents[1]
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
MODELS = {  # hidden, q, k and v together, outputs of attention, MLP, vocabulary
    "1b": (2048, 3072, 2048, 8192, 128256),
    "7b": (3584, 4608, 3584, 18944, 152064),
    "8b": (4096, 6144, 4096, 14336, 128256),
    "14b": (5120, 7168, 5120, 13824, 152064),
    "32b": (5120, 7168, 5120, 27648, 152064),
}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/tune", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, action="append", default=[], help="folder of a checkpoint")
    parser.add_argument("--models", default="", help=f"usual sizes: {','.join(MODELS)} (all, where there is no --model)")
    parser.add_argument("--bits", type=int, choices=(4, 8), default=4, help="of the layers of usual sizes")
    parser.add_argument("--dtypes", default="bf16", help="of activations: bf16, fp16, or both (models have their own)")
    parser.add_argument("--rows", default=",".join(map(str, ROWS)))
    parser.add_argument("--half", action="store_true", help="also sums of groups in float16 (GeForce), see docs/gpu.md")
    parser.add_argument("--minutes", type=float, default=60.0, help="begin nothing new after so many")
    parser.add_argument("--again", action="store_true", help="measure what the table has already, too")
    parser.add_argument("--out", type=Path, default=ROOT / "kernels" / "configs", help="folder of the table")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="sizes for the interpreter")
    return parser.parse_args(argv)


def usual(name: str, bits: int, dtype: str) -> Iterator[Shape]:
    hidden, qkv, queries, inner, vocabulary = MODELS[name]
    yield Shape(qkv, hidden, bits, False, dtype)
    yield Shape(hidden, queries, bits, False, dtype)
    yield Shape(2 * inner, hidden, bits, True, dtype)
    yield Shape(hidden, inner, bits, False, dtype)
    yield Shape(vocabulary, hidden, 8, False, dtype)


def of_checkpoint(directory: Path) -> Iterator[Shape]:
    """Those of its products that have tiles, from config.json and the headers of its files."""
    from appliance.memory.modules import layer_weights
    from models.spec import ModelSpec
    from quant.headers import CheckpointIndex
    from quant.scheme import read_scheme

    config, scheme = read_scheme(CheckpointIndex.open(directory))
    spec = ModelSpec.from_config(config)
    dtype = "fp16" if spec.dtype == "float16" else "bf16"
    for one in layer_weights(spec, scheme):
        if one.kind == "int" and one.module.part != "experts":  # whose launches are no tables'
            yield Shape(one.module.N, one.module.K, one.stored.bits, one.gated, dtype)
    yield Shape(spec.vocab, spec.hidden, 8, False, dtype)


def wanted(args: argparse.Namespace) -> list[Shape]:
    """Every shape once."""
    if args.small:
        return [Shape(128, 512, 4, False, "fp16"), Shape(256, 128, 8, True, "fp16")]
    names = args.models.split(",") if args.models else [] if args.model else list(MODELS)
    shapes = [shape for directory in args.model for shape in of_checkpoint(directory)]
    shapes += [shape for name in names for dtype in args.dtypes.split(",") for shape in usual(name, args.bits, dtype)]
    return list(dict.fromkeys(shapes))


def open_table(path: Path, head: dict[str, Any]) -> dict[str, Any]:
    """What the file has, if it was made with the same card and versions; else an empty table."""
    from kernels.configs import read

    if not path.is_file():
        return {**head, "launches": {}}
    read(path)  # complains about what is wrong
    given: dict[str, Any] = json.loads(path.read_text())
    return given if all(given.get(name) == value for name, value in head.items()) else {**head, "launches": {}}


def save(path: Path, table: dict[str, Any]) -> None:
    part = path.with_suffix(".part")
    part.write_text(json.dumps(table, indent=1) + "\n")
    part.replace(path)


def main(argv: list[str] | None = None) -> int:
    args, begun = parse(argv), time.monotonic()
    if args.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
    import torch
    import triton

    from kernels.configs import file_name
    from kernels.triton.ops import this_card

    card = this_card(torch.device(args.device))
    name = card.name or "interpreter"
    head = {"card": name, "capability": card.capability, "multiprocessors": card.multiprocessors}
    head |= {"torch": torch.__version__, "triton": triton.__version__}
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / file_name(name)
    table = open_table(path, head)
    tuner = Tuner(args.device, small=args.small, half=args.half, say=lambda line: print(line, flush=True))
    rows, late = [1, 70] if args.small else [int(m) for m in args.rows.split(",")], begun + 60 * args.minutes
    for shape in wanted(args):
        entries = table["launches"].setdefault(shape.kind, {}).setdefault(f"{shape.outputs}x{shape.inputs}", {})
        missing = [m for m in rows if args.again or str(m) not in entries]
        for m, entry in tuner.shape(shape, missing) if missing and time.monotonic() < late else ():
            entries[m] = entry
            save(path, table)
            if time.monotonic() >= late:
                break
    if time.monotonic() >= late:
        print(f"{args.minutes} minutes are over: call again to go on", flush=True)
    print(path)
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    sys.exit(main())
