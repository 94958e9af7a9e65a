"""``appliance plan``: where the memory would go, on this machine or on cards that are not here, and what that is enough for."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from dataclasses import dataclass, replace
from json import dumps
from pathlib import Path

from appliance.config import EngineConfig
from appliance.hub import demo_model, headers_of, on_this_machine, resolve, with_adapters
from appliance.memory.answers import Answers
from appliance.memory.cards import find_cards
from appliance.memory.devices import MIB, DeviceInfo, this_device
from appliance.memory.early import check_options
from appliance.memory.plan import PlanError
from appliance.memory.planner import command_line
from appliance.memory.proofs import device_kind
from appliance.memory.settings import parse_length
from appliance.memory.sizes import parse_size
from appliance.memory.study import Study, smallest
from appliance.memory.text import held_by, size_text
from appliance.runtime.check_process import check_apart
from quant.errors import InputError
from quant.headers import has_tokenizer


@dataclass(frozen=True, kw_only=True)
class Asked:
    """The options of the command that are no options of the engine."""

    json: bool = False
    gpu: tuple[str, ...] = ()
    memory: str | None = None
    sequences: int | None = None
    context: str | None = None
    svg: Path | None = None
    check: bool = False


def plan_command(engine: EngineConfig, asked: Asked) -> int:
    """Print the plan and the answers. 0: fits; 1: does not fit, or not what was asked for. Raises InputError for bad input."""
    if asked.check:
        return checked(engine, asked)
    check_options(engine, chosen_devices(engine, asked)[0])
    _context(asked.context)
    engine = with_adapters(engine, weights=False)
    with headers_of(engine.model, engine.revision) if engine.model is not None else nullcontext(demo_model()) as directory:
        code = plan_of(directory, replace(engine, model=engine.model if engine.model is not None else str(directory)), asked)
    if code == 0 and not asked.json:
        _note_tokenizer(engine)
    return code


def _note_tokenizer(engine: EngineConfig) -> None:
    """Say what the server will miss in a directory on this machine. (What is on the hub is not looked at.)"""
    if engine.skip_tokenizer_init:
        return
    try:
        directory = on_this_machine(engine.tokenizer or engine.model or str(demo_model()))
    except InputError as error:
        print(f"appliance: note: --tokenizer: {error}", file=sys.stderr)
        return
    if directory is not None and not has_tokenizer(directory):
        needs = "`appliance serve` needs --tokenizer DIRECTORY, or --skip-tokenizer-init"
        print(f"appliance: note: {directory} has no tokenizer: {needs}", file=sys.stderr)


def plan_of(directory: Path, engine: EngineConfig, asked: Asked) -> int:
    """The same for a directory with config.json and headers; ``engine.model`` is what it is called."""
    devices = chosen_devices(engine, asked)
    weakest = min(devices, key=lambda device: device.capability or 0)
    distinct = list(dict.fromkeys(devices))
    elsewhere = asked.gpu or asked.memory is not None  # then this machine's memory is not the card's host's
    host = None if elsewhere or weakest.kind == "cpu" else this_device("cpu")
    studies = [Study.read(directory, engine, one, host=host, ranks=len(devices), weakest=weakest) for one in distinct]
    context = _context(asked.context)
    try:
        answers = Answers.of(smallest(studies), devices, asked.sequences, context)
    except PlanError as error:
        why, study = _why(error, studies[0], asked.sequences, context)
        return refused(why, engine, asked, study, devices[0])
    if asked.svg is not None:
        draw(asked.svg, answers)
    print(dumps(answers.to_dict(), indent=2) if asked.json else answers.text())
    return 0 if answers.fits else 1


def _why(error: PlanError, study: Study, sequences: int | None, context: int | None) -> tuple[PlanError, Study]:
    """The refusal of a model that does not fit, and with which settings that was found out.

    By what makes so many sequences of that context fit, where anything does; else by what makes the model fit at all.
    """
    if sequences is None and context is None:
        return error, study
    asking = study.asking(sequences, context)
    more = asking.refusal()
    if more is None:  # without --max-num-seqs or --max-model-len it would fit
        return error, study
    if more.remedies or asking.larger(1):
        return more, asking
    crowd = asking.crowd
    what = "" if crowd is None else f". Nothing makes {crowd.sequences} sequences of {crowd.tokens} tokens fit at once"
    return PlanError(f"{error}{what}", error.remedies), study


def chosen_devices(engine: EngineConfig, asked: Asked) -> list[DeviceInfo]:
    """The cards of --gpu; else a device with --memory; else this machine's. Raises InputError."""
    size = None if asked.memory is None else parse_size("--memory", asked.memory)
    if asked.gpu:
        if engine.device == "cpu":
            raise InputError("--gpu plans for a card, and --device cpu for none: leave out one of the two")
        cards = [card.device() for card in find_cards(list(asked.gpu))]
        if size is None:
            return cards
        return [replace(card, total=size, available=max(0, size - (card.total - card.available))) for card in cards]
    kind = device_kind(engine.device)
    if size is None:
        return [this_device(kind)]
    name = f"a {'machine' if kind == 'cpu' else 'card'} with {size_text(size)}"
    return [DeviceInfo(kind, name, size, size)]


def checked(engine: EngineConfig, asked: Asked) -> int:
    """Load the model for real, and print what was planned against what it took. 0: it held; 1: not, or it does not fit."""
    given = {"--gpu": asked.gpu, "--memory": asked.memory, "--sequences": asked.sequences, "--context": asked.context}
    strange = [flag for flag, value in {**given, "--svg": asked.svg}.items() if value]
    if strange:
        raise InputError(f"--check loads the model on this machine, so {strange[0]} means nothing: leave out one of the two")
    check_options(engine)
    directory = resolve(engine.model, engine.revision) if engine.model is not None else demo_model()
    engine = with_adapters(engine)
    try:
        report = check_apart(directory, engine)
    except PlanError as error:
        return refused(error, engine, asked)
    if asked.json:
        print(dumps({"fits": True, **report.to_dict()}, indent=2))
    else:
        verdict = "All of it is as planned." if report.holds else "Not all of it is as planned."
        head = f"Planned against measured, after {report.steps} steps of the largest sizes"
        print(f"{report.plan.table()}\n\n{head}\n{report.table()}\n{verdict}")
    return 0 if report.holds else 1


def _context(text: str | None) -> int | None:
    if text is None:
        return None
    try:
        length = parse_length(text)
    except InputError:
        length = None
    if length is None:
        raise InputError(f"--context is {text!r}: a whole number of at least 2 tokens is needed (32k = 32,000, 32K = 32,768)")
    return length


def draw(path: Path, answers: Answers) -> None:
    """Write the memory map. Raises InputError where that cannot be."""
    from appliance.memory.picture import memory_map

    try:
        path.write_text(memory_map(answers.study.plan, answers.facts()), encoding="utf-8")
    except OSError as error:
        raise InputError(f"--svg {path}: {error.strerror}") from None
    print(f"appliance: note: the memory map is in {path}", file=sys.stderr)


def refused(
    error: PlanError, engine: EngineConfig, asked: Asked, study: Study | None = None, device: DeviceInfo | None = None
) -> int:
    """Say why the model does not fit and what would, each with its effect, and cards on which it does. Returns 1.

    ``study``: with whose settings that was found out.
    """
    larger, beside = ([], {}) if study is None else (study.larger(), study.options)
    if asked.json:
        engine = replace(engine, **beside)  # type: ignore[arg-type]
        remedies = [{**one.to_dict(), "command": command_line(engine, one)} for one in error.remedies]
        cards = [card.name for card in larger]
        found = {"fits": False, "error": str(error), "model": engine.model, "remedies": remedies, "cards_that_fit": cards}
        print(dumps(found, indent=2))
    print(f"appliance: error: {error}", file=sys.stderr)
    if asked.svg is not None:
        older = "; the file there is older" if asked.svg.exists() else ""
        print(f"appliance: note: no memory map is written to {asked.svg}: there is no plan to draw{older}", file=sys.stderr)
    if not asked.json:
        if study is not None and study.flags and error.remedies:
            print(f"  with {study.flags}, and one of these:", file=sys.stderr)
        for one in error.remedies:
            print(f"  {one}: {one.effect}", file=sys.stderr)
        if device is not None and device.holders:
            print(f"  fewer programs on the card: {held_by(device)}", file=sys.stderr)
        if larger:
            names = ", ".join(f"{card.name} ({size_text(card.memory * MIB)})" for card in larger)
            print(f"  another card: the smallest that would do are {names}", file=sys.stderr)
    return 1
