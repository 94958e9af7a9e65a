"""The offline API: ``LLM(...).generate(prompts, SamplingParams(...))``, shaped as vLLM's, so that its tutorials run."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import fields, replace
from itertools import count
from pathlib import Path
from typing import Any

from tqdm import tqdm

from appliance.adapters import read_names
from appliance.config import EngineConfig
from appliance.core.messages import Pooling, Submit
from appliance.core.params import BeamSearchParams, PoolingParams, RequestError, SamplingParams, check_flags
from appliance.hub import resolve, with_adapters
from appliance.inputs import (
    Prompt,
    beam_params,
    conversation_list,
    params_list,
    prompt_list,
    rank_list,
    read_prompt,
    template_arguments,
)
from appliance.lora import Loaded, LoRARequest, lora_list
from appliance.memory.early import check_options
from appliance.outputs import BeamSearchOutput, EmbeddingRequestOutput, Job, RequestOutput
from appliance.pooling import embedding_params, read_pooler
from appliance.runtime.engine import Engine
from appliance.text.defaults import model_defaults
from appliance.text.output import OutputStream
from appliance.text.prepare import prepare, with_thinking
from appliance.text.reasoning import tags_of
from appliance.text.template import explicit_template
from appliance.text.tokenizer import Tokenizer
from appliance.text.tools.choice import tool_choice
from quant.errors import InputError

StrPath = str | os.PathLike[str]
LoraRequests = LoRARequest | Sequence[LoRARequest | None] | None

log = logging.getLogger("appliance.llm")

_PROCESSES: set[int] = set()  # in which an engine was loaded: this one, or one of which it is a fork

# vLLM arguments that change nothing here, with the values under which that is true.
HARMLESS: dict[str, Sequence[object]] = {
    "tokenizer_mode": ("auto",),
    "trust_remote_code": (False, True),  # repository code is never run; models that need it are refused by architecture
    "tensor_parallel_size": (1,),
    "pipeline_parallel_size": (1,),
    "tokenizer_revision": (None,),
    "disable_log_stats": (False, True),
    "enable_chunked_prefill": (True, None),
    "load_format": ("auto", "safetensors"),
    "task": ("auto", "generate", None),
    "convert": ("auto", "none", "embed"),
    "disable_custom_all_reduce": (False, True),
    "limit_mm_per_prompt": (None, {}),
    "hf_overrides": (None, {}),
    "compilation_config": (None, {}),
    "max_seq_len_to_capture": range(1 << 31),
}


class LLM:
    """A model in this process. Its memory is free again when nothing refers to it any more (``del llm``).

    Arguments are those of EngineConfig (``appliance/config.py``), ``chat_template``, ``generation_config``: where defaults of
    sampling come from, "auto" (the model's generation_config.json), "vllm" (none) or a directory, and ``max_logprobs``: the most
    that a request may ask for a token, -1 for no limit (then long prompts with large vocabularies take gigabytes). Paths may be
    Path objects. Raises InputError where the model, the memory or an argument does not do, and TypeError for an argument that
    does not exist.

    Threads may share it: their calls take turns. A fork of its process may not use it, nor make another.
    """

    def __init__(
        self,
        model: StrPath,
        *,
        chat_template: StrPath | None = None,
        generation_config: StrPath = "auto",
        max_logprobs: int = 20,
        **options: Any,
    ) -> None:
        _refuse_fork("no LLM can be made here")
        config = _engine_config(model, options)
        if type(max_logprobs) is not int or max_logprobs < -1:
            raise InputError(f"max_logprobs is {max_logprobs!r:.80}: a whole number is needed, -1 for no limit")
        self._max_logprobs = max_logprobs
        template, defaults = _text(chat_template), _text(generation_config)
        with _in_python():
            check_options(config)
            model_defaults(None, defaults)  # like the template below: before a model is looked for, and perhaps fetched
            if template is not None:
                explicit_template(template)
            directory = resolve(str(config.model), config.revision)
            source = resolve(config.tokenizer, config.revision, weights=False) if config.tokenizer else directory
            self._config = with_adapters(replace(config, model=str(directory), tokenizer=str(source)))
            self._tokenizer = None if config.skip_tokenizer_init else Tokenizer.load(source, template)
            self._pooler = read_pooler(Path(directory), self._config.runner)
            self._defaults = SamplingParams(**model_defaults(Path(directory), defaults))
            with _load_bar() as progress:
                _PROCESSES.add(os.getpid())
                self._engine = Engine.load(self._config, progress)
        self._adapters = Loaded(self._engine.adapters, read_names(config.lora_modules), self._engine.info.max_loras)
        self._ids = count()
        self._turn = threading.Lock()
        self._empty, self._clean = deepcopy(self._engine.scheduler), True  # books without a request; whether the engine has none

    def get_default_sampling_params(self) -> SamplingParams:
        """What is used where none are given."""
        return self._defaults.clone()

    def get_tokenizer(self) -> Tokenizer:
        if self._tokenizer is None:
            raise InputError("there is no tokenizer: this LLM was made with skip_tokenizer_init=True")
        return self._tokenizer

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        priority: Sequence[int] | None = None,
        lora_request: LoraRequests = None,
    ) -> list[RequestOutput]:
        """Answer prompts (text, token ids, ``{"prompt": ...}``, ``{"prompt_token_ids": ...}``) together, in their order.

        ``priority``: one a prompt, lower goes first (scheduling_policy="priority"). A prompt with a ``cache_salt`` shares cached
        prefixes only with those that have the same. ``lora_request``: an adapter for all prompts, or one (or None) a prompt.
        """
        many = prompt_list(prompts)
        params = params_list(sampling_params, len(many), self._defaults, self._max_logprobs)
        ranks = rank_list(priority, len(many))
        if any(ranks) and not self._engine.info.priorities:
            hint = 'requests are served in order of arrival: make the LLM with scheduling_policy="priority"'
            raise RequestError(f"priority is {next(filter(None, ranks))!r:.80}, but {hint}", param="priority")
        loras = lora_list(lora_request, len(many))
        jobs = [self._job(*one, lora=lora) for *one, lora in zip(many, params, ranks, loras, strict=True)]
        self._answer(jobs, use_tqdm, loras)
        return [job.output() for job in jobs]

    def beam_search(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: BeamSearchParams,
        *,
        use_tqdm: bool = False,
        lora_request: LoraRequests = None,
    ) -> list[BeamSearchOutput]:
        """The ``params.beam_width`` best answers to each prompt, as beam search finds them."""
        sampling = replace(beam_params(params).sampling(), logprobs=2 * params.beam_width)
        many = prompt_list(prompts)
        loras = lora_list(lora_request, len(many))
        jobs = [self._job(prompt, sampling, lora=lora) for prompt, lora in zip(many, loras, strict=True)]
        self._answer(jobs, use_tqdm, loras)
        return [job.beams() for job in jobs]

    def embed(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        pooling_params: PoolingParams | None = None,
        use_tqdm: bool = True,
        lora_request: LoraRequests = None,
    ) -> list[EmbeddingRequestOutput]:
        """The embeddings of prompts, in their order: float32, as many numbers as the model's hidden states have.

        Of a model that was made for that, or with runner="pooling". Raises InputError where one cannot be computed.
        """
        if self._pooler is None:
            raise InputError('this model generates text: make the LLM with runner="pooling" for its hidden states as embeddings')
        many = prompt_list(prompts)
        loras, asked = lora_list(lora_request, len(many)), pooling_params or PoolingParams()
        normalize = self._pooler.normalize if asked.normalize is None else asked.normalize
        pooling, params = Pooling(asked.dimensions, normalize), embedding_params()
        jobs = [self._job(prompt, params, pooling=pooling, lora=lora) for prompt, lora in zip(many, loras, strict=True)]
        self._answer(jobs, use_tqdm, loras)
        return [job.embedding() for job in jobs]

    def reset_prefix_cache(self) -> bool:
        """Prompts that come from now on find nothing of what was computed before."""
        with self._alone():
            self._engine.reset_prefix_cache()
        return True

    def _answer(self, jobs: list[Job], use_tqdm: bool, loras: Sequence[LoRARequest | None] = ()) -> None:
        with self._alone():
            self._adapters.bring(loras)
            try:
                for job in jobs:
                    self._engine.submit(job.submit)
            except InputError:  # one is refused, so none is answered
                for job in jobs:
                    self._engine.abort(job.submit.request_id)
                raise
            self._run({job.submit.request_id: job for job in jobs}, use_tqdm)
        if errors := [error for job in jobs for error in job.errors.values()]:
            log.warning("%d answers of %d prompts ended by an error; the first: %s", len(errors), len(jobs), errors[0])

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """While this thread has the engine. After any other exception than a refusal, as of ctrl-C, it is emptied."""
        _refuse_fork("this LLM cannot be used here")
        with self._turn:
            if not self._clean:  # the last one was interrupted once more, while it cleared up
                self._engine.clear(deepcopy(self._empty))
            self._clean = False
            try:
                yield
            except BaseException as error:
                if not isinstance(error, InputError) or self._engine.has_work:
                    self._engine.clear(deepcopy(self._empty))
                self._clean = True
                raise
            self._clean = True

    def chat(
        self,
        messages: Iterable[Mapping[str, Any]] | Iterable[Sequence[Mapping[str, Any]]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: list[dict[str, Any]] | None = None,
        chat_template: StrPath | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        lora_request: LoraRequests = None,
    ) -> list[RequestOutput]:
        """Answer one conversation, or several, written with the model's own chat template, or with this one (Jinja, or its file).

        ``tools``: what the model is told that it may call, as OpenAI has them. What it says is in ``text`` as it said it.
        """
        tokenizer, template = self.get_tokenizer(), _text(chat_template)
        conversations, more = conversation_list(messages), template_arguments(chat_template_kwargs)
        check_flags(add_generation_prompt=add_generation_prompt, continue_final_message=continue_final_message)
        if template is None and not tokenizer.has_chat_template:
            where = self._config.tokenizer
            raise InputError(f"{where} has no chat template: give one as chat_template (Jinja, or its file), or use generate()")
        with _in_python():
            chat = tokenizer.chat if template is None else tokenizer.with_template(template)
            texts = [
                chat(
                    conversation,
                    add_generation_prompt=add_generation_prompt,
                    continue_final_message=continue_final_message,
                    tools=list(tool_choice(tools, None).tools) or None,
                    **more,
                )
                for conversation in conversations
            ]
        prompts = [{"prompt": t, "prompt_token_ids": tokenizer.encode(t, add_special_tokens=False)} for t in texts]
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm, lora_request=lora_request)

    def _job(
        self,
        prompt: Prompt,
        params: SamplingParams,
        priority: int = 0,
        *,
        pooling: Pooling | None = None,
        lora: LoRARequest | None = None,
    ) -> Job:
        if pooling is None and self._pooler is not None:
            raise InputError('this model makes embeddings: use embed(), or make the LLM with runner="generate"')
        text, ids, salt = read_prompt(prompt)
        if ids is None:
            ids = self.get_tokenizer().encode(text or "")
        params = prepare(params, self._tokenizer)
        tags = None if self._tokenizer is None else tags_of(self._tokenizer.chat_templates)
        params = with_thinking(params, self._tokenizer, tags, ids)
        limit = self._engine.info.max_model_len
        if pooling is None and params.max_tokens is not None and len(ids) < limit < len(ids) + params.max_tokens:
            params = replace(params, max_tokens=None)  # to the end of the context, and no further
        name, now = str(next(self._ids)), time.monotonic()
        adapter = "" if lora is None else lora.lora_name
        submit = Submit(name, tuple(ids), params, now, cache_salt=salt, priority=priority, pooling=pooling, adapter=adapter)
        return Job(text, submit, self._tokenizer, [OutputStream(self._tokenizer, params, ids) for _ in range(params.width)])

    def _run(self, jobs: dict[str, Job], use_tqdm: bool) -> None:
        with tqdm(total=len(jobs), desc="Processed prompts", disable=not use_tqdm, unit="prompt") as bar:
            tokens, begun = 0, time.perf_counter()
            while self._engine.has_work:
                for event in self._engine.step():
                    tokens += len(event.token_ids)
                    job = jobs.get(event.request_id)
                    if job is None:
                        continue
                    if job.take(event):
                        self._engine.abort(event.request_id, event.index, "stop")
                    if event.finish_reason and job.finished:
                        bar.set_postfix_str(f"{tokens / (time.perf_counter() - begun):.1f} tok/s", refresh=False)
                        bar.update()


def _refuse_fork(what: str) -> None:
    """Raises RuntimeError in a fork of a process that had an engine: torch's threads and the engine's are not there."""
    if _PROCESSES and os.getpid() not in _PROCESSES:
        where = f"process {next(iter(_PROCESSES))}, in which a model was loaded, without its threads"
        raise RuntimeError(f"{what}: process {os.getpid()} is a fork of {where}. Start processes by 'spawn'")


def _text(path: Any) -> Any:
    """A path as text, whatever else as it is."""
    return os.fspath(path) if isinstance(path, os.PathLike) else path


def _engine_config(model: StrPath, options: dict[str, Any]) -> EngineConfig:
    known = {f.name for f in fields(EngineConfig)} - {"model"}
    if not isinstance(model, str | os.PathLike):
        raise InputError(f"model is {model!r:.80}: a directory with a Hugging Face checkpoint, or a name on the hub, is needed")
    for name in ("seed", "enable_prefix_caching"):
        if options.get(name, 0) is None:  # vLLM's way to leave it out
            del options[name]
    for name in [n for n in options if n not in known]:
        value = options.pop(name)
        if name not in HARMLESS:
            raise TypeError(f"LLM() has no argument {name!r}; it has {', '.join(sorted(known))}")
        if value not in HARMLESS[name]:
            raise InputError(f"{name}={value!r} is not supported: leave it out")
    if isinstance(options.get("speculative_config"), dict):
        options["speculative_config"] = json.dumps(options["speculative_config"])
    if "tokenizer" in options:
        options["tokenizer"] = _text(options["tokenizer"])
    return EngineConfig(model=_text(model), **options)


@contextlib.contextmanager
def _in_python() -> Iterator[None]:
    """Errors name arguments as they are written in Python, not on a command line."""
    try:
        yield
    except InputError as error:
        error.args = tuple(re.sub(r"--([a-z][a-z-]*[a-z])", _argument, str(one)) for one in error.args)
        raise


def _argument(flag: re.Match[str]) -> str:
    name = flag[1].replace("-", "_")
    ours = name in {"chat_template", "generation_config", *(f.name for f in fields(EngineConfig))}
    return name if ours else flag[0]


@contextlib.contextmanager
def _load_bar() -> Iterator[Any]:
    with tqdm(unit="B", unit_scale=True, unit_divisor=1024, desc="Loading weights", leave=False) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield progress
