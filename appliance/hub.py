"""From what the user calls a model to a directory on this machine. A directory is taken as it is, without any network call."""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from appliance.adapters import read_names
from appliance.config import EngineConfig
from models.spec import ModelSpec
from quant.errors import ADAPTER, MERGE, InputError
from quant.scheme import QuantScheme, load_configs

# What a checkpoint needs, from the top folder of a repository: no code, no second copy of the weights in another format.
SMALL = ["*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken"]
WANTED = [*SMALL, "*.safetensors"]
UNWANTED = ["*/*", "consolidated*.safetensors"]
PLANNED = [
    "config.json",
    "quantize_config.json",
    "quant_config.json",
    "hf_quant_config.json",
    "*.safetensors.index.json",
]  # what a plan reads, beside headers

REPO = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?", re.ASCII)
ADDRESS = re.compile(r"(?:https?://)?(?:huggingface\.co|hf\.co)/([\w.-]{1,96}/[\w.-]{1,96}?)(?:/tree/main)?/?", re.ASCII)


def demo_model() -> Path:
    """The model that comes with the package."""
    directory = Path(__file__).parent / "demo"
    if not (directory / "config.json").is_file():
        raise InputError("no model given, and this installation has no demo model: name a directory or a model on the hub")
    return directory


def called(model: str) -> str:
    """What the user calls it; of the address of its page on the hub, as https://huggingface.co/organisation/model, the name."""
    address = ADDRESS.fullmatch(model)
    return address[1] if address and not os.path.isdir(model) else model


def resolve(model: str, revision: str | None = None, *, weights: bool = True) -> Path:
    """The directory of ``model``: a path, or a repository on the hub, which is downloaded (and resumed) into the hub's cache.

    Without ``weights`` only its small files: a tokenizer's, for one. With them, its config.json comes first, and an architecture
    or a quantization that is not supported is refused before the rest. HF_HUB_OFFLINE, HF_ENDPOINT, HF_TOKEN and HF_HOME are
    respected. Raises InputError that says what to do.
    """
    if (here := on_this_machine(model)) is not None:
        return here
    model = called(model)
    directory = _download(model, revision, SMALL)
    if not weights:
        return directory
    if (directory / "config.json").is_file():
        config, beside = load_configs(directory)
        ModelSpec.from_config(config)
        QuantScheme.from_config(config, beside)
        directory = _download(model, revision, WANTED)
    _check_files(model, {path.name for path in directory.iterdir()})
    return directory


def with_adapters(engine: EngineConfig, *, weights: bool = True) -> EngineConfig:
    """The same options with directories for ``lora_modules``, each a path or a repository on the hub, as PEFT writes them.

    Without ``weights`` what of them a plan reads. Raises InputError as resolve() does.
    """
    wanted = [ADAPTER, *(["adapter_model.safetensors"] if weights else [])]
    modules = []
    for name, path in read_names(engine.lora_modules).items():
        here = on_this_machine(str(path))
        found = _download(called(str(path)), None, wanted) if here is None else here.absolute()
        modules.append(f"{name}={found}")
    return replace(engine, lora_modules=tuple(modules))


@contextmanager
def headers_of(model: str, revision: str | None = None) -> Iterator[Path]:
    """For planning: a directory that says what ``model`` is. Its own where it is on this machine; else one for a while, with the
    small files and the headers of the others from the hub (a few hundred KB of each), and holes instead of weights.

    Raises InputError as resolve() does.
    """
    if (here := on_this_machine(model)) is not None:
        yield here
        return
    model = called(model)
    if (cached := _cached(model, revision)) is not None:
        yield cached
        return
    with TemporaryDirectory(prefix="appliance-plan-") as folder:
        try:
            _fetch_headers(model, revision, Path(folder))
        except InputError:
            raise
        except Exception as error:  # as in _download
            raise InputError(_explain(model, revision, error)) from error
        yield Path(folder)


def _cached(repo: str, revision: str | None) -> Path | None:
    """Where all of it is in the hub's cache, if it is. Raises InputError where it is not, and the hub may not be asked."""
    from huggingface_hub import constants, errors, snapshot_download

    if constants.is_offline_mode():
        return resolve(repo, revision)
    try:
        here = snapshot_download(repo, revision=revision, allow_patterns=WANTED, ignore_patterns=UNWANTED, local_files_only=True)
    except errors.LocalEntryNotFoundError:
        return None
    names = {path.name for path in Path(here).glob("*.safetensors")}
    indexes = [json.loads(path.read_text()) for path in Path(here).glob("*.safetensors.index.json")]
    return Path(here) if names and all(names >= set(index["weight_map"].values()) for index in indexes) else None


def _fetch_headers(repo: str, revision: str | None, folder: Path) -> None:
    """config.json and its like, and of every file of weights a header that is true and a hole that takes no disk."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    api = HfApi()
    commit = api.model_info(repo, revision=revision).sha
    there = api.list_repo_files(repo, revision=commit)
    _check_files(repo, there)
    snapshot_download(repo, revision=commit, allow_patterns=PLANNED, ignore_patterns=UNWANTED, local_dir=folder)
    names = list(filter(_is_weights, there))
    with ThreadPoolExecutor(8) as pool:
        found = pool.map(lambda name: api.parse_safetensors_file_metadata(repo, name, revision=commit), names)
        for name, file in zip(names, found, strict=True):
            _write_hollow(folder / name, {tensor: asdict(info) for tensor, info in file.tensors.items()})


def _check_files(repo: str, names: Collection[str]) -> None:
    """Raises InputError where these, of its top folder, are no checkpoint."""
    if "config.json" not in names and ADAPTER in names:
        raise InputError(f"{repo}: {MERGE}")
    missing = "config.json" if "config.json" not in names else "" if any(map(_is_weights, names)) else ".safetensors file"
    if missing:
        raise InputError(f"{repo} has no {missing}: only Hugging Face checkpoints in safetensors files can be served")


def _is_weights(name: str) -> bool:
    return "/" not in name and name.endswith(".safetensors") and not name.startswith("consolidated")


def _write_hollow(path: Path, header: dict[str, dict[str, Any]]) -> None:
    tensors = {name: {key: one[key] for key in ("dtype", "shape", "data_offsets")} for name, one in header.items()}
    text = json.dumps(tensors).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + max((one["data_offsets"][1] for one in header.values()), default=0))


def on_this_machine(model: str) -> Path | None:
    """The directory that ``model`` is; None for a name on the hub. Raises InputError for what is neither."""
    model = called(model)
    path = Path(os.path.expanduser(model))
    if model and os.path.isdir(path):  # pathlib's raises where a name is too long, or its directory is somebody else's
        return path
    if model == "demo":
        return demo_model()
    if path.suffix.lower() == ".gguf":
        raise InputError(f"{model}: GGUF is not supported: take the AWQ, GPTQ or original safetensors version of the model")
    if os.path.isfile(path):
        raise InputError(f"{model} is a file: name the directory of a Hugging Face checkpoint (the one with config.json)")
    if _looks_like_a_path(model, path):
        raise InputError(f"no such directory: {model}")
    if not REPO.fullmatch(model):
        raise InputError(f"{model!r} is neither a directory nor a name on the hub (those look like organisation/model)")
    return None


def _looks_like_a_path(model: str, path: Path) -> bool:
    """Whether it is written like a path, or its first folders exist here."""
    written_so = model.startswith((".", "/", "~")) or model.count("/") > 1 or "\\" in model
    return written_so or (path.parent != Path() and os.path.exists(path.parent))


def _download(repo: str, revision: str | None, wanted: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=wanted, ignore_patterns=UNWANTED))
    except Exception as error:  # the hub's library raises its own, its HTTP library's and the system's errors
        raise InputError(_explain(repo, revision, error)) from error


def _explain(repo: str, revision: str | None, error: BaseException) -> str:
    """One line: what went wrong with the download, and what to do."""
    from huggingface_hub import constants, errors

    causes = [error]
    while cause := causes[-1].__cause__ or causes[-1].__context__:
        causes.append(cause)
    where, neither = constants.ENDPOINT, f"there is no directory {repo} here, and"
    if isinstance(error, errors.GatedRepoError):
        return f"{repo} is gated: accept its terms at {where}/{repo} and set HF_TOKEN to a token of that account"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"{neither} no model of that name on {where}: check the name; a private model needs HF_TOKEN"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repo} has no revision {revision!r}: check --revision"
    if any(isinstance(one, OSError) and one.errno == errno.ENOSPC for one in causes):
        return f"{repo}: the disk is full; make room in {constants.HF_HUB_CACHE}, or set HF_HOME to a folder on a larger disk"
    if constants.is_offline_mode():
        return f"{neither} it is not complete in {constants.HF_HUB_CACHE}; HF_HUB_OFFLINE is set: unset it to download the model"
    if isinstance(error, errors.SafetensorsParsingError):
        return f"{repo} is damaged on {where}: {error}"
    response = getattr(causes[-1], "response", None) or getattr(error, "response", None)
    if response is not None:
        return f"{repo}: {where} answered with HTTP status {response.status_code}; try again later (a download is resumed)"
    detail = str(causes[-1]).strip().split("\n")[0] or type(causes[-1]).__name__
    return (
        f"{neither} it could not be downloaded from {where}: {detail}; check the connection and try again (a download is resumed)"
    )
