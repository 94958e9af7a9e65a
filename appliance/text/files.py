"""Reads what a model's directory says of its tokenizer, as transformers 5 reads it, without importing transformers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing

from quant.errors import CheckpointError, InputError
from quant.headers import has_tokenizer, read_json

_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_END = "<|endoftext|>"

# What a tokenizer class takes for the special tokens that its configuration leaves out.
_DEFAULTS: dict[str, dict[str, str]] = {
    "LlamaTokenizer": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    "Qwen2Tokenizer": {"eos_token": _END, "unk_token": _END, "pad_token": _END},
    "GPT2Tokenizer": {"bos_token": _END, "eos_token": _END, "unk_token": _END},
}

_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")

# How Qwen2 cuts text into words before merging (its tokenizer.json says the same).
_QWEN2_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@dataclass(frozen=True)
class TokenizerFiles:
    """A tokenizer as its directory describes it."""

    backend: tokenizers.Tokenizer
    named: dict[str, str]  # bos_token, eos_token, ... as far as there are any
    templates: dict[str, str]  # chat templates by name, "default" being the usual one


def read_tokenizer(directory: Path) -> TokenizerFiles:
    """Read tokenizer.json, or vocab.json with merges.txt, or tokenizer.model, and the configuration beside it.

    Raises InputError when none of them is there, and CheckpointError naming the file that is damaged.
    """
    if not directory.is_dir():
        raise InputError(f"{directory}: there is no such directory to read the tokenizer from")
    config = _config(directory)
    kind = _class(directory, config)
    named = {key: _content(config[key]) for key in _NAMED if config.get(key)}
    merges_only = False
    if (directory / "tokenizer.json").is_file():
        backend = _from_json(directory, config, kind)
    elif kind in ("Qwen2Tokenizer", "GPT2Tokenizer") and _is_file(directory, "vocab.json", "merges.txt"):
        backend, merges_only = _from_merges(directory, config, kind), True
    elif _is_file(directory, "vocab.json", "merges.txt") or _is_file(directory, "tokenizer.model"):
        backend, named = _from_transformers(directory)
    else:
        raise _none(directory)
    backend.no_truncation()  # some published files carry the limit of the day they were made: never cut a prompt silently
    backend.no_padding()
    backend.encode_special_tokens = bool(config.get("split_special_tokens", False))
    _add_tokens(backend, directory, config, named)
    for key, token in _DEFAULTS.get(kind, {}).items():
        if key not in config and backend.token_to_id(token) is not None:
            named.setdefault(key, token)
    if merges_only:
        _add_ends(backend, config, named)
    return TokenizerFiles(backend, named, _templates(directory, config))


def check_tokenizer(directory: Path) -> None:
    """Raises InputError where ``directory`` has no tokenizer. Reads nothing."""
    if not has_tokenizer(directory):
        raise _none(directory)


def _none(directory: Path) -> InputError:
    tekken = "tekken.json, which Mistral's own tools read, is none of these. " if (directory / "tekken.json").is_file() else ""
    return InputError(
        f"{directory}: no tokenizer found (none of tokenizer.json, vocab.json with merges.txt, tokenizer.model). {tekken}"
        "Name a directory that has one with --tokenizer, or work on token ids alone with --skip-tokenizer-init"
    )


def _is_file(directory: Path, *names: str) -> bool:
    return all((directory / name).is_file() for name in names)


def _config(directory: Path) -> dict[str, Any]:
    """tokenizer_config.json; special_tokens_map.json speaks where the former is of the old kind that lists no added tokens."""
    path, old = directory / "tokenizer_config.json", directory / "special_tokens_map.json"
    config = read_json(path) if path.is_file() else {}
    if "added_tokens_decoder" not in config and old.is_file():
        config.update(read_json(old))
    return config


def _class(directory: Path, config: dict[str, Any]) -> str:
    """The tokenizer class that decides. The model's type overrules a declared LlamaTokenizer, as in transformers."""
    path = directory / "config.json"
    model = read_json(path) if path.is_file() else {}
    declared = config.get("tokenizer_class") or model.get("tokenizer_class") or ""
    kind, model_type = str(declared).removesuffix("Fast"), model.get("model_type", "")
    if model_type in ("qwen2", "qwen3") and kind in ("", "LlamaTokenizer"):
        return "Qwen2Tokenizer"
    return "" if kind == "LlamaTokenizer" and model_type not in ("", "llama") else kind


def _content(token: Any) -> str:
    if isinstance(token, dict) and "content" not in token:
        raise CheckpointError(f"tokenizer_config.json: a special token without 'content': {token!r:.80}")
    return str(token["content"]) if isinstance(token, dict) else str(token)


def _from_json(directory: Path, config: dict[str, Any], kind: str) -> tokenizers.Tokenizer:
    path = directory / "tokenizer.json"
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise CheckpointError(f"{path}: not a readable tokenizer ({error}); fetch the file again") from error
    if kind == "LlamaTokenizer" and isinstance(backend.model, models.BPE) and "ByteLevel" not in str(backend.pre_tokenizer):
        _as_llama(backend, config)
    return backend


def _as_llama(backend: tokenizers.Tokenizer, config: dict[str, Any]) -> None:
    """Put a space before the text only, not after every special token (before that fix files say "prepend" everywhere).

    transformers 5 does the same to every BPE file of this class, unless ``legacy`` is set.
    """
    spaced = config.get("add_prefix_space") is not False
    scheme = "never" if not spaced else "always" if config.get("legacy", False) else "first"
    backend.model.unk_token = None  # bytes stand in for unknown characters
    backend.normalizer = None
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    steps: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(steps + [decoders.Strip(" ", 1, 0)] * spaced)


def _from_merges(directory: Path, config: dict[str, Any], kind: str) -> tokenizers.Tokenizer:
    """Byte-level BPE of the two families that publish vocab.json and merges.txt alone."""
    spaced = bool(config.get("add_prefix_space", False))
    try:
        model = models.BPE.from_file(str(directory / "vocab.json"), str(directory / "merges.txt"))
    except Exception as error:  # the library raises nothing narrower
        files = f"{directory / 'vocab.json'} and merges.txt"
        raise CheckpointError(f"{files}: not a readable vocabulary ({error}); fetch the files again") from error
    backend = tokenizers.Tokenizer(model)
    backend.decoder = decoders.ByteLevel()
    if kind == "Qwen2Tokenizer":
        words = pre_tokenizers.Split(Regex(_QWEN2_WORDS), behavior="isolated")
        backend.normalizer = normalizers.NFC()
        backend.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(spaced, use_regex=False)])
    else:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=spaced)
    return backend


def _from_transformers(directory: Path) -> tuple[tokenizers.Tokenizer, dict[str, str]]:
    """Let transformers convert the rarer kinds; it takes seconds to import."""
    try:
        from transformers import AutoTokenizer

        loaded = AutoTokenizer.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)
        return loaded.backend_tokenizer, dict(loaded.special_tokens_map)
    except Exception as error:  # anything can go wrong in there; the user needs to hear which directory it was
        line = str(error).strip().split("\n")[0]
        raise InputError(
            f"{directory}: transformers cannot read this tokenizer ({type(error).__name__}: {line}). "
            "Name a directory that has a tokenizer.json with --tokenizer, or use --skip-tokenizer-init"
        ) from error


def _add_tokens(backend: tokenizers.Tokenizer, directory: Path, config: dict[str, Any], named: dict[str, str]) -> None:
    """Tokens that the configuration declares and the vocabulary file does not, in the order of their ids."""
    known = backend.get_added_tokens_decoder().values()
    exact, contents = {repr(token) for token in known}, {token.content for token in known}
    try:
        declared = sorted((int(i), token) for i, token in (config.get("added_tokens_decoder") or {}).items())
        tokens = [
            AddedToken(token["content"], **{name: token[name] for name in _FLAGS if name in token}) for _, token in declared
        ]
        extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
        others = [*named.values(), *map(_content, extra.values() if isinstance(extra, dict) else extra)]
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{directory / 'tokenizer_config.json'}: cannot understand its special tokens ({error})") from error
    new = [token for token in tokens if repr(token) not in exact]
    contents.update(token.content for token in new)
    new += [AddedToken(text, special=True, normalized=False) for text in dict.fromkeys(others) if text not in contents]
    backend.add_tokens(new)


def _add_ends(backend: tokenizers.Tokenizer, config: dict[str, Any], named: dict[str, str]) -> None:
    """add_bos_token and add_eos_token count where no tokenizer.json says what an encoded text begins and ends with."""
    bos = named.get("bos_token") if config.get("add_bos_token") else None
    eos = named.get("eos_token") if config.get("add_eos_token") else None
    if bos or eos:
        parts = [*([bos] if bos else []), "$A", *([eos] if eos else [])]
        ends = [(token, backend.token_to_id(token)) for token in (bos, eos) if token]
        backend.post_processor = TemplateProcessing(single=parts, special_tokens=ends)


def _templates(directory: Path, config: dict[str, Any]) -> dict[str, str]:
    """Chat templates by name: those in files, else those in the configuration (one string, or a list of named ones).

    Models that read pictures may have theirs beside the settings of the pictures, in chat_template.json.
    """
    files = {path.stem: path for path in sorted((directory / "additional_chat_templates").glob("*.jinja"))}
    if (directory / "chat_template.jinja").is_file():
        files["default"] = directory / "chat_template.jinja"
    try:
        if files:
            return {name: path.read_text(encoding="utf-8") for name, path in files.items()}
        found, beside = config.get("chat_template"), directory / "chat_template.json"
        if found is None and beside.is_file():
            found = read_json(beside).get("chat_template")
        if isinstance(found, list):
            return {str(entry["name"]): str(entry["template"]) for entry in found}
        if isinstance(found, dict):
            return {str(name): str(text) for name, text in found.items()}
        return {"default": str(found)} if found else {}
    except (UnicodeDecodeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{directory}: cannot understand its chat templates ({json.dumps(str(error))})") from error
