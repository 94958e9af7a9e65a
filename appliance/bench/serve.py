"""The whole of a run: find the server, warm up, load, tell."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

from tqdm import tqdm

from appliance.bench.arrivals import arrivals
from appliance.bench.http import Broken, Target
from appliance.bench.load import Asker, Run, headers, pairs, run
from appliance.bench.outcome import Outcome, refused
from appliance.bench.picture import picture
from appliance.bench.report import report
from appliance.bench.results import details, limits, percentiles, shown, summary
from appliance.bench.samples import Sample, Writer, load
from appliance.config import BenchConfig
from appliance.version import __version__
from quant.errors import InputError

PROBE = """\
Once upon a time there was a small town by the sea, where people told each other stories of ships, storms and far countries.
In 1984 the old lighthouse was sold (for 3,500 crowns!) to a painter who loved its light; "It is yours", they said to her.
def area(width, height): return width * height  # all numbers are metres
"""  # tokens are taken from it: of any vocabulary, all of these are valid


def serve(config: BenchConfig) -> int:
    """0: all requests were answered to their end; 1: some were not; 130: ended by ctrl-C. Raises InputError."""
    percentiles(config), shown(config), limits(config), pairs("--metadata", config.metadata, "=")  # before anything is sent
    if config.max_concurrency is not None and config.max_concurrency < 1:
        raise InputError(f"--max-concurrency is at least 1, got {config.max_concurrency}")
    if config.num_warmups < 0 or config.request_timeout <= 0:
        raise InputError("--num-warmups is at least 0, and --request-timeout above 0")
    url = config.base_url or f"http://{f'[{config.host}]' if ':' in config.host else config.host}:{config.port}"
    target = Target(url, headers(config), ca_certs=config.ssl_ca_certs, insecure=config.insecure)
    found, facts = asyncio.run(_measure(config, target))
    results = {**facts, **summary(found, config)}
    report(results, config)
    _write(results, found, config)
    return 130 if found.cut else 1 if results["failed"] else 0


async def _measure(config: BenchConfig, target: Target) -> tuple[Run, dict[str, Any]]:
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGINT, stop.set)
    try:
        model, context = await _model(config, target, stop)
        asker = Asker(target, config, model)
        ids = None if asker.chat or config.dataset_name in ("sharegpt", "custom", "text") else await _known_tokens(target, model)
        samples = load(config, Writer(ids, config.seed))
        times = arrivals(samples, config)
        asker.body(samples[0])  # what cannot be asked is told before anything is
        _warn_of_long(samples, context, answers=not asker.embeds)
        await _warm_up(asker, samples[0], stop)
        with tqdm(total=len(samples), unit="req", leave=False, disable=True if config.disable_tqdm else None) as bar:
            found = await run(asker, samples, times, stop, bar.update)
    finally:
        target.close()
    return found, {
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "version": __version__,
        "backend": config.backend,
        "url": target.url + asker.path,
        "model_id": model,
        "dataset_name": config.dataset_name,
        "num_prompts": len(samples),
        "request_rate": config.request_rate if config.request_rate != float("inf") else "inf",
        "burstiness": config.burstiness,
        "max_concurrency": config.max_concurrency,
        "offered_rate": (len(times) - 1) / times[-1] if times[-1] > 0 else None,
        "prompts_are_token_ids": isinstance(samples[0].prompt, list) and isinstance(samples[0].prompt[0], int),
        "seed": config.seed,
        **pairs("--metadata", config.metadata, "="),
    }


async def _model(config: BenchConfig, target: Target, stop: asyncio.Event) -> tuple[str, int | None]:
    """The model's name and, where the server tells, the length of its context. Raises InputError where no server is ready."""
    deadline = time.monotonic() + config.ready_check_timeout_sec
    hint = "start one, or name it with --base-url or --host and --port"
    while True:
        try:
            async with asyncio.timeout(30):
                answer, health = [await target.send(target.request(path)) for path in ("/v1/models", "/health")]
            if answer.status < 500 and health.status != 503:  # not every server has the latter
                break
            trouble, hint = f"it is not ready (status {max(answer.status, health.status)})", "--ready-check-timeout-sec 600 waits"
        except (Broken, TimeoutError) as error:
            trouble = str(error) or "timed out"
            if trouble.startswith("tls: "):
                hint = "trust it with --ssl-ca-certs FILE, or --insecure"
        if time.monotonic() >= deadline or stop.is_set():
            raise InputError(f"no server answers at {target.url}: {trouble}; {hint}")
        await asyncio.sleep(0.2)
    name = config.served_model_name or config.model
    if answer.status in (401, 403):
        raise InputError(f"{target.url} answers {answer.status}: give it a key with --api-key, or OPENAI_API_KEY")
    try:
        models = json.loads(answer.body)["data"]
        chosen = next((m for m in models if m.get("id") == name), models[0])
    except (ValueError, KeyError, IndexError, TypeError):
        if name is None:
            said = f": {refused(answer.status, answer.body)[1]}" if answer.status == 400 else ""
            told = f"{target.url}/v1/models (status {answer.status}) names no model{said}; give one with --model"
            raise InputError(told) from None
        return name, None
    length = chosen.get("max_model_len") if isinstance(chosen, dict) else None
    return name or chosen["id"], length if isinstance(length, int) else None


async def _known_tokens(target: Target, model: str) -> list[int] | None:
    """Ids that are tokens of the model for certain: the server has made them of a text. None where it does not tell."""
    for form in ({"model": model, "prompt": PROBE, "add_special_tokens": False}, {"content": PROBE}):  # vLLM's, and llama.cpp's
        try:
            answer = await target.json("/tokenize", form)
        except Broken:
            return None
        tokens = answer.get("tokens") if isinstance(answer, dict) else None
        if isinstance(tokens, list) and tokens and all(isinstance(t, int) for t in tokens):
            return sorted(set(tokens))
    return None


def _warn_of_long(samples: Sequence[Sample], context: int | None, *, answers: bool) -> None:
    if context is None:
        return
    long = sum((s.prompt_tokens or 0) + (s.output_tokens or 0 if answers else 0) > context for s in samples)
    if long:
        hint = "shorten them with --random-input-len, or a trace's with --scale-lengths"
        _say(f"{long} of {len(samples)} requests are longer than the server's context of {context} tokens; {hint}")


async def _warm_up(asker: Asker, sample: Sample, stop: asyncio.Event) -> None:
    """Raises InputError where no warm-up works: so would nothing else."""
    if not asker.config.num_warmups:
        return
    found = await run(asker, [sample] * asker.config.num_warmups, [0.0] * asker.config.num_warmups, stop, lambda: None)
    failed: list[Outcome] = [one for one in found.outcomes if not one.ok]
    if failed and not found.cut:
        raise InputError(f"{len(failed)} of {len(found.outcomes)} warm-ups failed: {failed[0].error}: {failed[0].detail}")


def _write(results: dict[str, Any], found: Run, config: BenchConfig) -> None:
    """The files that are asked for. Raises InputError where one cannot be written."""
    options = {k: v for k, v in asdict(config).items() if k != "api_key" and v is not None and v != float("inf")}
    options["header"] = list(pairs("--header", config.header, "="))  # their values may be secrets
    whole = {**results, "options": options, **(details(found) if config.save_detailed else {})}
    text = json.dumps(whole, indent=None if config.append_result else 1, allow_nan=False) + "\n"
    try:
        if config.json is not None:
            Path(config.json).write_text(text)
        if config.svg is not None:
            Path(config.svg).write_text(picture(results, found, config))
        if config.save_result or config.append_result:
            path = Path(config.result_dir or ".") / (config.result_filename or _name(results, config))
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a" if config.append_result else "w") as file:
                file.write(text)
            _say(f"results are in {path}")
    except OSError as error:
        raise InputError(f"cannot write {error.filename}: {error.strerror}") from None


def _name(results: dict[str, Any], config: BenchConfig) -> str:
    model = re.sub(r"[^\w.-]", "_", results["model_id"].rstrip("/").rpartition("/")[2])
    many = f"-concurrency{config.max_concurrency}" if config.max_concurrency else ""
    when = datetime.now().strftime("%Y%m%d-%H%M%S")
    return f"{config.label or config.backend}-{config.request_rate}qps{many}-{model}-{when}.json"


def _say(text: str) -> None:
    print(f"appliance: note: {text}", file=sys.stderr)
