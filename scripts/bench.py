"""Measure the engine on one checkpoint: prefill, decode by number of sequences, long contexts, start-up, memory.

    scripts/bench --model DIR                          this machine's best kernels
    scripts/bench --model DIR --compare --isa avx2     beside torch's operators and lesser instruction sets, and other engines:
        --llama-python PATH --gguf FILE...             a Python with llama-cpp-python, and the same model as GGUF
        --vllm-python PATH                             a Python with vLLM's CPU build
    scripts/bench --model DIR --soak 30                half an hour of mixed load: memory must not grow, answers must not change

Every engine runs in a process of its own, one after another, answers the same random prompts and is timed the same way: by the
times at which tokens arrive. Prefill is the prompt's length by the time to the first token; decode is the tokens by the time
while all sequences decode. Figures are medians of --repeat runs; long contexts are run once.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import psutil
from bench_compare import Target, Work, derive, make_cases, run_target, usage, wait_for_quiet
from bench_peaks import build, limits, read_limit
from bench_report import markdown, roofline
from bench_soak import soak

from appliance.config import EngineConfig
from appliance.hub import demo_model, resolve
from appliance.memory.devices import cpu_threads
from kernels.cpu import backend
from models.spec import ModelSpec
from quant.errors import InputError
from quant.headers import read_json

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    args = parse()
    try:
        config = EngineConfig(
            model=str(resolve(args.model) if args.model else demo_model()),
            device=args.device,
            dtype=args.dtype,
            quantization=args.quantization,
            threads=args.threads,
            max_model_len=args.max_model_len,
            kv_cache_memory_bytes=args.kv_cache_memory_bytes,
        )
        report = {**heading(Path(str(config.model)).name), **(soaked(args, config) if args.soak else compared(args, config))}
    except InputError as error:
        print(f"scripts/bench: {error}", file=sys.stderr)
        return 2
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    if args.soak:
        print(json.dumps({key: value for key, value in report.items() if key != "samples"}, indent=1))
        return 0 if not report["failures"] else 1
    print(markdown(report))
    if args.markdown:
        args.markdown.write_text(markdown(report))
    if args.svg:
        args.svg.write_text(roofline(report))
    return 1 if any("error" in target for target in report["targets"]) else 0


def parse() -> argparse.Namespace:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="scripts/bench", description=__doc__, formatter_class=layout)
    parser.add_argument("--model", help="a directory or a name on the hub; the embedded demo model when left out")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--quantization", help="int8 or int4 rounds an unquantized checkpoint while it is loaded")
    parser.add_argument("--threads", type=int, help="for every engine; default: the physical cores")
    parser.add_argument("--max-model-len", type=int, help="default: what the cases need")
    parser.add_argument("--kv-cache-memory-bytes", type=int, default=2 * 1024**3)
    parser.add_argument("--prefill", type=int, default=512, metavar="TOKENS")
    parser.add_argument("--sequences", type=int, nargs="*", default=[1, 4, 8, 16, 32])
    parser.add_argument("--context", type=int, nargs="*", default=[], metavar="TOKENS", help="also prompts of these lengths")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compare", action="store_true", help="also torch's operators, --isa and the other engines")
    parser.add_argument("--isa", nargs="*", default=[], help="instruction sets to force with --compare (see APPLIANCE_CPU_ISA)")
    parser.add_argument("--llama-python", metavar="PATH")
    parser.add_argument("--gguf", nargs="*", default=[], metavar="FILE")
    parser.add_argument("--vllm-python", metavar="PATH")
    parser.add_argument("--soak", type=float, metavar="MINUTES")
    parser.add_argument("--probe-every", type=float, default=20.0, metavar="SECONDS", help="of --soak")
    parser.add_argument("--json", type=Path, help="write the report here")
    parser.add_argument("--markdown", type=Path, help="write the tables here")
    parser.add_argument("--svg", type=Path, help="draw the roofline here")
    args = parser.parse_args()
    if bool(args.llama_python) != bool(args.gguf):
        parser.error("--llama-python and --gguf go together")
    if not args.compare and (args.isa or args.gguf or args.vllm_python):
        parser.error("--isa, --llama-python and --vllm-python need --compare")
    if args.max_model_len is None and not args.soak:
        args.max_model_len = max([args.prefill + 1, 161, *(n + 33 for n in args.context)])
    elif args.max_model_len is None:
        args.max_model_len = "auto"
    return args


def compared(args: argparse.Namespace, config: EngineConfig) -> dict[str, Any]:
    """One engine after another, limits before, between and after: other programs can only lower them, so the highest count."""
    spec = ModelSpec.from_config(read_json(Path(str(config.model)) / "config.json"))
    threads = cpu_threads(args.threads)
    engines, found, read = targets(args, config, threads), [], partial(read_limit, build(), threads)
    highest = quiet_limits(threads)
    cases = make_cases(args.prefill, args.sequences, args.context, args.repeat)
    for target in engines:
        with tempfile.TemporaryDirectory() as folder:
            log = Path(folder) / "log"
            result = run_target(target, cases, vocab=spec.vocab, seed=args.seed, log=log, read_limit=read)
            if "error" in result:
                print(log.read_text(errors="replace")[-3000:], file=sys.stderr)
        found.append(result)
        highest = higher(highest, quiet_limits(threads))
    for result in found:
        derive(result, Work.of(spec), highest["memory_read_gb_s"])
    return {"limits": highest, "targets": found}


def quiet_limits(threads: int) -> dict[str, Any]:
    wait_for_quiet(lambda: usage(time.process_time()))
    return limits(threads)


def higher(one: Any, other: Any) -> Any:
    """The larger of all numbers of two records of the same form."""
    if isinstance(one, dict):
        return {key: higher(value, other[key]) for key, value in one.items()}
    return one if isinstance(one, str) else max(one, other)


def targets(args: argparse.Namespace, config: EngineConfig, threads: int) -> list[Target]:
    """Ours as it would run here; with --compare also the others that were asked for."""
    isas = list(dict.fromkeys([backend.name(), *(["torch", *args.isa] if args.compare else [])]))
    unknown = [isa for isa in isas if isa not in backend.available()]
    if unknown:
        raise InputError(f"--isa {' '.join(unknown)} cannot run here; what can: {', '.join(backend.available())}")
    job = {"kind": "appliance", "config": asdict(config)}
    found = [Target(f"appliance {isa}", job, env={"APPLIANCE_CPU_ISA": isa}) for isa in isas]
    for path in args.gguf:
        job = {"kind": "llama", "gguf": str(Path(path).resolve()), "threads": threads}
        found.append(Target(f"llama.cpp {Path(path).stem}", job, python=args.llama_python))
    if args.vllm_python:
        job = {"kind": "vllm", "model": str(Path(str(config.model)).resolve()), "max_model_len": args.max_model_len}
        env = {
            "VLLM_TARGET_DEVICE": "cpu",
            "VLLM_CPU_KVCACHE_SPACE": str(max(1, args.kv_cache_memory_bytes // 1024**3)),
            "VLLM_CPU_OMP_THREADS_BIND": f"0-{threads - 1}",
            "HF_HUB_OFFLINE": "1",
        }
        found.append(Target("vLLM", job, python=args.vllm_python, env=env))
    return found


def soaked(args: argparse.Namespace, config: EngineConfig) -> dict[str, Any]:
    logging.basicConfig(level=logging.WARNING)
    return soak(config, seconds=60 * args.soak, probe_every=args.probe_every, seed=args.seed)


def heading(model: str) -> dict[str, Any]:
    return {
        "model": model,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "machine": machine(),
        "load_average": round(os.getloadavg()[0], 2),
        "commit": commit(),
        "command": " ".join(["scripts/bench", *(without_folders(word) for word in sys.argv[1:])]),
    }


def without_folders(word: str) -> str:
    """What is a path here means nothing elsewhere: its last part says enough; an interpreter is named by its environment's."""
    if "/" not in word:
        return word
    path = Path(word)
    return str(Path(path.parents[1].name) / "bin" / path.name) if path.parent.name == "bin" else path.name


def machine() -> str:
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    field = {k.strip(): v.strip() for k, _, v in (line.partition(":") for line in info.splitlines())}
    known = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8")
    flags = [f for f in known if f in field.get("flags", "").split()]
    name = field.get("model name", platform.processor() or platform.machine())
    memory = psutil.virtual_memory().total / 1024**3
    return f"{name}, {psutil.cpu_count(logical=False)} cores, {memory:.0f} GiB, {' '.join(flags)}"


def commit() -> str:
    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()

    return git("rev-parse", "--short=12", "HEAD") + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")


if __name__ == "__main__":
    sys.exit(main())
