"""What lies where in a checkpoint, read from the safetensors headers alone (no torch, never a weight).

A safetensors file is 8 bytes of header length (little endian), a JSON header {name: {dtype, shape, data_offsets}}, and the data.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise, product
from operator import attrgetter
from pathlib import Path
from types import MappingProxyType
from typing import Any

from quant.errors import ADAPTER, MERGE, CheckpointError

INDEX = "model.safetensors.index.json"
TEXT = re.compile(r"^(?:(model\.language_model\.|language_model\.model\.)|language_model\.(?=lm_head\.))")
BESIDE_TEXT = re.compile(r"(model\.)?(vision_tower|multi_modal_projector|visual|audio_tower|embed_vision|embed_audio)\.")
"""How models that read pictures, too, name what is theirs in transformers before 4.52 and since, and the rest."""
BARE = "embed_tokens."
"""So begins a name where a checkpoint is of a model's layers alone, of which no head has to be told apart."""
VISUAL = "visual."  # beside text under plain names: Qwen2-VL and 2.5-VL as they were published
GRANITE = {
    ".shared_mlp.input_linear.": ".mlp.gate_up_proj.",
    ".shared_mlp.output_linear.": ".mlp.down_proj.",
    ".block_sparse_moe.input_linear.weight": ".block_sparse_moe.experts.gate_up_proj",
    ".block_sparse_moe.output_linear.weight": ".block_sparse_moe.experts.down_proj",
    ".block_sparse_moe.router.layer.": ".block_sparse_moe.router.",
}
"""How Granite names a mixture of experts, and what stands beside one; and how these are named here."""
LIQUID = {
    ".feed_forward.w1.": ".mlp.gate_proj.",
    ".feed_forward.w3.": ".mlp.up_proj.",
    ".feed_forward.w2.": ".mlp.down_proj.",
    ".self_attn.out_proj.": ".self_attn.o_proj.",
    "model.embedding_norm.": "model.norm.",
}
"""How Liquid's families name what all others name alike."""
NAMES = GRANITE | LIQUID
STACKED = re.compile(r"(.*\.experts)\.(\w+)_(blocks|scales|bias)")
"""gpt-oss has each kind of tensor of all experts of a layer in one, whose first dimension is the expert."""
DENSE_STACK = re.compile(r"(.*\.experts)\.(gate_up_proj|down_proj)")
"""So have Qwen3.5 and Granite in a float dtype, without biases: outputs by inputs of each expert, and gate before up.

Qwen3-VL was published with inputs by outputs in each; shapes tell.
"""
ONE_EXPERT = re.compile(r"(.*\.experts)\.\d+(\.\w+)")
MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors library
ITEM_SIZE = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file: bytes ``start`` to ``end`` of the file (absolute offsets) hold it, row-major."""

    name: str
    file: Path
    dtype: str  # as safetensors writes it: F16, BF16, F32, I32, I8, U8, F8_E4M3, I64, ...
    shape: tuple[int, ...]
    start: int
    end: int
    pitch: int = 0
    """Not 0: the file has it transposed, among others: its columns stand so many bytes apart, the first at ``start``.

    ``end`` is no place in the file then.
    """

    @property
    def nbytes(self) -> int:
        return self.end - self.start

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def __str__(self) -> str:
        return f"{self.dtype}{list(self.shape)}"


@dataclass(frozen=True)
class CheckpointIndex:
    """Every tensor of a checkpoint directory by name; of a model that reads pictures, too, those of its text part alone.

    What is STACKED, or in a DENSE_STACK, is here expert by expert, by names like those of other mixtures:
    experts.7.down_proj.blocks, experts.7.gate_proj.weight.
    """

    directory: Path
    tensors: Mapping[str, TensorInfo]
    beside_text: int = 0  # tensors that are not among these

    @property
    def total_bytes(self) -> int:
        return sum(info.nbytes for info in self.tensors.values())

    @classmethod
    def open(cls, directory: str | Path) -> CheckpointIndex:
        """Read the headers of ``model.safetensors``, of the shards of an index, or else of every safetensors file there.

        Raises CheckpointError where a file is missing or damaged, or where the files contradict each other.
        """
        directory = Path(directory)
        if not directory.is_dir():
            raise CheckpointError(f"{directory}: no such directory; a model is a directory with config.json and *.safetensors")
        if (directory / ADAPTER).is_file() and not (directory / "config.json").is_file():
            raise CheckpointError(f"{directory}: {MERGE}")
        index = directory / INDEX
        if (directory / "model.safetensors").is_file():
            tensors = _merge([directory / "model.safetensors"])
        elif index.is_file():
            tensors = _indexed(index)
        else:
            tensors = _merge(_all_files(directory))
        text = _text_part(_with_model(tensors))
        named = _unstacked({_known(name): info for name, info in text.items()})
        return cls(directory, MappingProxyType(named), len(tensors) - len(text))


def has_tokenizer(directory: Path) -> bool:
    """Whether one of the files is there that a tokenizer is made from."""
    kinds = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("tokenizer.model",))
    return any(all((directory / name).is_file() for name in names) for names in kinds)


def read_json(path: str | Path) -> dict[str, Any]:
    """The JSON object in a file; CheckpointError says where it is damaged."""
    path = Path(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: the file is missing") from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({error}); fetch the file again") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file. Every byte range is checked against the size of the file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        first = file.read(8)
        if first == b"version " and size < 1024:
            raise CheckpointError(f"{path}: a git-lfs pointer of {size} bytes, not the file itself; run git lfs pull")
        length = int.from_bytes(first, "little") if size >= 8 else 0
        if not 0 < length <= MAX_HEADER:
            raise CheckpointError(f"{path}: not a safetensors file: its header would have {length} bytes, the file has {size}")
        if 8 + length > size:
            raise CheckpointError(f"{path}: truncated: the header ends at byte {8 + length}, the file has {size}; fetch it again")
        text = file.read(length)
    try:
        header = json.loads(text.decode("utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path}: the safetensors header is not valid JSON ({error}); fetch the file again") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: the safetensors header is not a JSON object")
    tensors = {name: _entry(path, name, entry, 8 + length, size) for name, entry in header.items() if name != "__metadata__"}
    for one, other in pairwise(sorted((info for info in tensors.values() if info.nbytes), key=attrgetter("start"))):
        if other.start < one.end:
            raise CheckpointError(f"{path}: damaged safetensors header: {one.name} and {other.name} share bytes")
    return tensors


def _entry(path: Path, name: str, entry: Any, data: int, size: int) -> TensorInfo:
    try:
        dtype, shape = entry["dtype"], tuple(map(int, entry["shape"]))
        begin, end = map(int, entry["data_offsets"])
        if not isinstance(dtype, str):
            raise TypeError
    except (TypeError, KeyError, ValueError, OverflowError):
        raise CheckpointError(f"{path}: damaged safetensors header: the entry of {name} reads {entry!r}") from None
    if not 0 <= begin <= end or (shape and min(shape) < 0):
        raise CheckpointError(f"{path}: damaged safetensors header: {name} has shape {list(shape)} at offsets [{begin}, {end}]")
    if data + end > size:
        raise CheckpointError(f"{path}: truncated: {name} ends at byte {data + end}, the file has {size}; fetch it again")
    if dtype in ITEM_SIZE and end - begin != math.prod(shape) * ITEM_SIZE[dtype]:
        raise CheckpointError(f"{path}: damaged safetensors header: {name} is {dtype}{list(shape)} but spans {end - begin} bytes")
    return TensorInfo(name, path, dtype, shape, data + begin, data + end)


def _with_model(tensors: dict[str, TensorInfo]) -> dict[str, TensorInfo]:
    """By the names that they have in a model with a head, where they are of its layers alone, as of Qwen3-Embedding."""
    if not any(name.startswith(BARE) for name in tensors) or any(name.startswith("model.") for name in tensors):
        return tensors
    return {name if name.startswith("lm_head.") else f"model.{name}": info for name, info in tensors.items()}


def _text_part(tensors: dict[str, TensorInfo]) -> dict[str, TensorInfo]:
    if not any(TEXT.match(name) or name.startswith(VISUAL) for name in tensors):
        return tensors
    kept = {name: info for name, info in tensors.items() if not BESIDE_TEXT.match(name)}
    return {TEXT.sub(lambda found: "model." if found[1] else "", name): info for name, info in kept.items()}


def _known(name: str) -> str:
    for theirs, ours in NAMES.items():
        name = name.replace(theirs, ours)
    return name


def published(name: str) -> Iterator[str]:
    """The names that a module may have, by which it is known here as ``name``: that itself, and others of NAMES."""
    yield name
    for theirs, ours in NAMES.items():
        if (other := f"{name}.".replace(ours, theirs)) != f"{name}.":
            yield other.removesuffix(".")


def _unstacked(tensors: dict[str, TensorInfo]) -> dict[str, TensorInfo]:
    found: dict[str, TensorInfo] = {}
    for name, info in tensors.items():
        experts, parts = _stack(name, info, tensors)
        if not parts:
            found[name] = info
            continue
        count, *shape = info.shape
        size, pitch = info.nbytes // (count * len(parts)), 0
        step = size
        if not STACKED.fullmatch(name) and _inputs_first(experts, tensors):
            shape.reverse()
            pitch = info.nbytes // (count * shape[1])
            step = pitch // len(parts)
        if len(parts) > 1:
            shape[0] //= len(parts)
        for number, (place, part) in product(range(count), enumerate(parts)):
            one, start = f"{experts}.{number}.{part}", info.start + number * len(parts) * size + place * step
            found[one] = replace(info, name=one, shape=tuple(shape), start=start, end=start + size, pitch=pitch)
    return found


def _inputs_first(experts: str, tensors: Mapping[str, TensorInfo]) -> bool:
    """Whether a DENSE_STACK has inputs by outputs of each expert. Where both are as many, nothing tells: they are not."""
    both = [tensors[name].shape[1:] for part in ("gate_up_proj", "down_proj") if (name := f"{experts}.{part}") in tensors]
    if len(both) < 2 or len(both[1]) != 2 or both[1][0] == both[1][1]:
        return False
    return both[0] == (both[1][1], 2 * both[1][0])


def _stack(name: str, info: TensorInfo, tensors: Mapping[str, TensorInfo]) -> tuple[str, list[str]]:
    """(the name of experts, the parts of each that a tensor has one after another); no parts where it is no stack of experts."""
    if not info.numel:
        return name, []
    if stacked := STACKED.fullmatch(name):
        return stacked[1], [f"{stacked[2]}.{stacked[3]}"]
    dense = DENSE_STACK.fullmatch(name)
    if dense is None or len(info.shape) != 3 or f"{name}_bias" in tensors:
        return name, []
    parts = ["gate_proj.weight", "up_proj.weight"] if dense[2] == "gate_up_proj" else ["down_proj.weight"]
    outputs = info.shape[2 if _inputs_first(dense[1], tensors) else 1]
    return dense[1], parts if outputs % len(parts) == 0 else []


def check_stack(tensors: Mapping[str, TensorInfo], name: str) -> None:
    """CheckpointError where a tensor of this name of one expert is missing since there is one of all that is not known here."""
    stack = ONE_EXPERT.match(name)
    found = tensors.get("".join(stack.groups())) if stack else None
    if found is not None:
        raise CheckpointError(
            f"{found.name}: found {found}: such experts in one tensor are known in MXFP4 alone, as gpt-oss is published"
        )


def _merge(files: list[Path]) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    for path in files:
        for name, info in read_header(path).items():
            if name in tensors:
                raise CheckpointError(f"{name} is in two files, {tensors[name].file.name} and {path.name}: remove the stale one")
            tensors[name] = info
    return tensors


def _indexed(index: Path) -> dict[str, TensorInfo]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(f"{index}: the index has no weight_map of tensor names to files")
    files = sorted(set(weight_map.values()))
    missing = [file for file in files if not (index.parent / file).is_file()]
    if missing:
        raise CheckpointError(f"{index}: {len(missing)} of {len(files)} files are missing: {', '.join(missing)}")
    tensors = _merge([index.parent / file for file in files])
    for name, file in weight_map.items():
        if name not in tensors or tensors[name].file.name != file:
            found = f"it is in {tensors[name].file.name}" if name in tensors else "no file has it"
            raise CheckpointError(f"{index}: {name} should be in {file}, but {found}")
    return tensors


def _all_files(directory: Path) -> list[Path]:
    files = sorted(path for path in directory.glob("*.safetensors") if path.is_file())
    if not files:
        raise CheckpointError(f"{directory}: no *.safetensors file{_other_formats(directory)}")
    names = {path.name for path in files}
    for name in sorted(names):
        numbered = re.fullmatch(r"(.*-)(\d+)(-of-)(\d+)(\.safetensors)", name)
        if numbered is None:
            continue
        head, digits, of, total, tail = numbered.groups()
        missing = [n for n in range(1, int(total) + 1) if f"{head}{n:0{len(digits)}d}{of}{total}{tail}" not in names]
        if missing:
            numbers = ", ".join(map(str, missing))
            raise CheckpointError(f"{directory}: of {int(total)} files like {name}, these numbers are missing: {numbers}")
    return files


def _other_formats(directory: Path) -> str:
    unfinished = "The download is not finished: run its command again"
    for pattern, hint in (
        ("*.incomplete", unfinished),
        (".cache/huggingface/download/*.incomplete", unfinished),  # of one into a directory of the user's choice
        ("*.gguf", "GGUF is not supported: take the AWQ, GPTQ or original safetensors version of the model"),
        ("*.bin", "PyTorch pickles are not loaded, since they can run code: convert them to safetensors"),
        ("*.pt", "PyTorch pickles are not loaded, since they can run code: convert them to safetensors"),
        ("*.pth", "PyTorch pickles are not loaded, since they can run code: convert them to safetensors"),
    ):
        found = sorted(path.name for path in directory.glob(pattern))
        if found:
            return f", only {found[0]}. {hint}"
    return "; a model is a directory with config.json and *.safetensors"
