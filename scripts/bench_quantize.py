"""What quantizing takes: processor seconds of a layer and the peak of memory, for models of known shapes with random weights.

    .venv/bin/python scripts/bench_quantize.py [--shapes llama-3.2-1b llama-2-7b qwen2.5-7b] [--methods awq gptq ...] [--layers 2]
        [--samples 128] [--length 512] [--threads N] [--first-only] [--folder DIR] [--json FILE]

The models are made in --folder (once) with the first --layers layers alone: what is in memory at a time does not depend on how
many there are. Each job is a process of its own. With fewer --samples, what grows with them is told as for 128 x 512 tokens: the
seconds in proportion, and the hidden states in memory; the wall-clock seconds are as measured. docs/benchmarks/quantizing.md
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

USUAL = 128, 512  # samples and tokens of each that `appliance quantize` takes by itself
METHODS: dict[str, dict[str, Any]] = {
    "rtn": {"method": "rtn"},
    "awq": {"method": "awq"},
    "gptq": {"method": "gptq"},
    "gptq --act-order": {"method": "gptq", "act_order": True},
    "awq --kv-scales": {"method": "awq", "kv_scales": True},
}
LLAMA, QWEN = {"architectures": ["LlamaForCausalLM"]}, {"architectures": ["Qwen2ForCausalLM"]}


def shape(kind: dict[str, Any], hidden: int, inner: int, heads: int, kv_heads: int, vocab: int, **more: Any) -> dict[str, Any]:
    return {
        **kind, "hidden_size": hidden, "intermediate_size": inner, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
        "vocab_size": vocab, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
        "hidden_act": "silu", **more,
    }  # fmt: skip


SHAPES = {  # config.json, and how many layers the whole model has
    "llama-3.2-1b": (shape(LLAMA, 2048, 8192, 32, 8, 128256, tie_word_embeddings=True, torch_dtype="bfloat16"), 16),
    "llama-2-7b": (shape(LLAMA, 4096, 11008, 32, 32, 32000, torch_dtype="float16"), 32),
    "qwen2.5-7b": (shape(QWEN, 3584, 18944, 28, 4, 152064, torch_dtype="bfloat16"), 28),
}


def make(folder: Path, name: str, layers: int) -> Path:
    """A checkpoint of this shape, a file for each layer; what is there already is taken."""
    import torch
    from safetensors.torch import save_file

    from models.spec import ModelSpec

    target = folder / f"{name}-{layers}-layers"
    if (target / "config.json").exists():
        return target
    target.mkdir(parents=True, exist_ok=True)
    config = {**SHAPES[name][0], "num_hidden_layers": layers}
    spec, dtype = ModelSpec.from_config(config), getattr(torch, config["torch_dtype"])
    torch.manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {f"{module.name}.weight": (module.N, module.K) for module in spec.modules()}
    shapes |= {f"{module.name}.bias": (module.N,) for module in spec.modules() if module.bias}
    shapes |= {key: (size,) for key, size in spec.small_tensors()}
    files: dict[str, list[str]] = {}
    for key in shapes:
        files.setdefault(key.split(".")[2] if key.startswith("model.layers.") else "ends", []).append(key)
    weight_map: dict[str, str] = {}
    for part, keys in files.items():
        tensors = {key: torch.ones(shapes[key]) if "norm" in key else torch.randn(shapes[key]) * 0.02 for key in keys}
        save_file({key: tensor.to(dtype) for key, tensor in tensors.items()}, target / f"model-{part}.safetensors")
        weight_map |= dict.fromkeys(keys, f"model-{part}.safetensors")
    (target / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (target / "config.json").write_text(json.dumps(config))
    return target


def work(
    model: Path, output: Path, method: str, samples: int, length: int, threads: int | None, first_only: bool
) -> dict[str, float]:
    """One job in this process: seconds of the first layer's parts, and the peak of resident memory in bytes."""
    import torch

    from appliance.memory.devices import cpu_threads
    from appliance.quantize.job import FIRST, SEARCH, Job
    from appliance.quantize.options import Options

    torch.set_num_threads(cpu_threads(threads))
    options = Options(**METHODS[method], calibration_samples=samples, calibration_length=length).checked()
    config = json.loads((model / "config.json").read_text())
    ids = torch.randint(config["vocab_size"], (samples, length), generator=torch.Generator().manual_seed(0))
    begins = (0.0, FIRST, FIRST + SEARCH, 1.0)
    marks: dict[float, tuple[float, float]] = {}  # when each part of the first layer was begun

    def tell(done: float) -> None:
        for begin in begins:
            if done >= begin - 1e-9:
                marks.setdefault(begin, (time.process_time(), time.perf_counter()))
        if first_only and done >= 1:
            raise InterruptedError

    with torch.inference_mode(), suppress(InterruptedError):
        Job(model, output, options, ids if options.calibrated else None).run(tell)
    (look, find, again), wall = (
        [marks[after][0] - marks[before][0] for before, after in pairwise(begins)], marks[1.0][1] - marks[0.0][1]
    )  # fmt: skip
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    state = 2 * config["hidden_size"] * length if options.calibrated else 0
    return {
        "look_s": look, "find_s": find, "again_s": again, "layer_wall_s": wall, "peak_bytes": peak, "state_bytes": state,
    }  # fmt: skip


def measured(model: Path, method: str, args: argparse.Namespace) -> dict[str, float]:
    """The same in a process of its own."""
    output = args.folder / "quantized"
    for left in (output, output.with_name("quantized.partial")):
        shutil.rmtree(left, ignore_errors=True)
    job = json.dumps([str(model), str(output), method, args.samples, args.length, args.threads, args.first_only])
    done = subprocess.run([sys.executable, __file__, "--job", job], capture_output=True, text=True, check=False)
    shutil.rmtree(output, ignore_errors=True)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def line(name: str, method: str, found: dict[str, float], args: argparse.Namespace) -> str:
    """Of the table: what grows with the samples as it is for ``USUAL`` tokens."""
    more = USUAL[0] * USUAL[1] / (args.samples * args.length)
    look, again = found["look_s"] * more, found["again_s"] * more
    layer = look + found["find_s"] + again
    peak = found["peak_bytes"] + found["state_bytes"] * args.samples * (more - 1)
    hours, wall = SHAPES[name][1] * layer / 3600, found["layer_wall_s"]
    numbers = (look, found["find_s"], again, layer, hours, peak / 1e9, wall)
    return " | ".join([f"| {name}", method, *(f"{number:.{2 if number < 10 else 0}f}" for number in numbers)]) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--methods", nargs="+", default=[name for name in METHODS if "kv" not in name], choices=list(METHODS))
    parser.add_argument("--layers", type=int, default=2, help="at least 2: of the first, nothing is left out")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--threads", type=int, help="of the processor; with 1, its seconds count among others, too")
    parser.add_argument("--first-only", action="store_true", help="stop behind a layer: embedding and head are left out, too")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/models"))
    parser.add_argument("--json", metavar="FILE", type=Path)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        model, output, *rest = json.loads(args.job)
        print(json.dumps(work(Path(model), Path(output), *rest)))
        return
    rows = []
    print("| shape | method | look | quantize | second look | a layer | whole model, CPU h | peak memory, GB | wall s |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name in args.shapes:
        model = make(args.folder, name, args.layers)
        for method in args.methods:
            found = measured(model, method, args)
            rows.append({"shape": name, "method": method, "samples": args.samples, "length": args.length, **found})
            print(line(name, method, found, args), flush=True)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
