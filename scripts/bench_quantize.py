"""What quantizing takes: processor seconds of a layer and the peak of memory, for models of known shapes with random weights.

    .venv/bin/python scripts/bench_quantize.py [--shapes llama-3.2-1b llama-2-7b qwen2.5-7b] [--methods awq gptq ...] [--layers 2]
        [--samples 128] [--length 512] [--threads N] [--folder /tmp/models] [--json FILE]

The models are made in --folder (once) with the first --layers layers alone: what is in memory at a time does not depend on how
many there are. Each job is a process of its own. The table in docs/benchmarks/quantizing.md; wall-clock needs a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

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


def work(model: Path, output: Path, method: str, samples: int, length: int, threads: int | None) -> dict[str, float]:
    """One job in this process: processor and wall seconds of the first layer and of all, peak of resident memory in bytes."""
    import torch

    from appliance.memory.devices import cpu_threads
    from appliance.quantize.job import Job
    from appliance.quantize.options import Options

    torch.set_num_threads(cpu_threads(threads))
    options = Options(**METHODS[method], samples=samples, length=length).checked()
    vocab = json.loads((model / "config.json").read_text())["vocab_size"]
    ids = torch.randint(vocab, (samples, length), generator=torch.Generator().manual_seed(0)) if options.calibrated else None
    marks: dict[int, tuple[float, float]] = {}  # when each layer was begun

    def tell(done: float) -> None:
        marks.setdefault(int(done), (time.process_time(), time.perf_counter()))

    begun = time.process_time(), time.perf_counter()
    with torch.inference_mode():
        Job(model, output, options, ids).run(tell)
    return {
        "layer_cpu_s": marks[1][0] - marks[0][0],
        "layer_wall_s": marks[1][1] - marks[0][1],
        "cpu_s": time.process_time() - begun[0],
        "wall_s": time.perf_counter() - begun[1],
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def measured(model: Path, method: str, args: argparse.Namespace) -> dict[str, float]:
    """The same in a process of its own."""
    output = args.folder / "quantized"
    for left in (output, output.with_name("quantized.partial")):
        shutil.rmtree(left, ignore_errors=True)
    job = json.dumps([str(model), str(output), method, args.samples, args.length, args.threads])
    done = subprocess.run([sys.executable, __file__, "--job", job], capture_output=True, text=True, check=False)
    shutil.rmtree(output, ignore_errors=True)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--methods", nargs="+", default=[name for name in METHODS if "kv" not in name], choices=list(METHODS))
    parser.add_argument("--layers", type=int, default=2, help="at least 2: of the first, nothing is left out")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--threads", type=int, help="of the processor; with 1, its seconds count among others, too")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/models"))
    parser.add_argument("--json", metavar="FILE", type=Path)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        model, output, *rest = json.loads(args.job)
        print(json.dumps(work(Path(model), Path(output), *rest)))
        return
    rows = []
    print("| shape | method | CPU s a layer | wall s a layer | CPU h, whole model | peak memory, GB |\n|---|---|---|---|---|---|")
    for name in args.shapes:
        model = make(args.folder, name, args.layers)
        for method in args.methods:
            found = measured(model, method, args)
            rows.append({"shape": name, "method": method, **found})
            layers = SHAPES[name][1]
            print(
                f"| {name} | {method} | {found['layer_cpu_s']:.0f} | {found['layer_wall_s']:.0f} "
                f"| {layers * found['layer_cpu_s'] / 3600:.2f} | {found['peak_bytes'] / 1e9:.2f} |",
                flush=True,
            )
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
