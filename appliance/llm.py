"""The offline API: ``LLM(...).generate(prompts, SamplingParams(...))``, shaped as vLLM's, so that its tutorials run."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, replace
from itertools import count
from typing import Any

from tqdm import tqdm

from appliance.config import EngineConfig
from appliance.core.messages import Submit
from appliance.core.params import BeamSearchParams, RequestError, SamplingParams
from appliance.hub import resolve
from appliance.outputs import BeamSearchOutput, Job, RequestOutput
from appliance.runtime.engine import Engine
from appliance.text.output import OutputStream
from appliance.text.prepare import prepare
from appliance.text.tokenizer import Tokenizer
from appliance.text.tools.choice import tool_choice
from quant.errors import InputError

Prompt = str | Sequence[int] | Mapping[str, Any]

# vLLM arguments that change nothing here, with the values under which that is true.
HARMLESS: dict[str, tuple[object, ...]] = {
    "tokenizer_mode": ("auto",),
    "trust_remote_code": (False, True),  # repository code is never run; models that need it are refused by architecture
    "tensor_parallel_size": (1,),
    "pipeline_parallel_size": (1,),
    "tokenizer_revision": (None,),
    "disable_log_stats": (False, True),
    "enable_chunked_prefill": (True, None),
    "load_format": ("auto", "safetensors"),
}


class LLM:
    """A model in this process.

    Arguments are those of EngineConfig (``appliance/config.py``) and ``chat_template``. Raises InputError where the model, the
    memory or an argument does not do, and TypeError for an argument that does not exist.
    """

    def __init__(self, model: str, *, chat_template: str | None = None, **options: Any) -> None:
        config = _engine_config(model, options)
        directory = resolve(model, config.revision)
        source = resolve(config.tokenizer, config.revision) if config.tokenizer else directory
        self._config = replace(config, model=str(directory), tokenizer=str(source))
        self._tokenizer = None if config.skip_tokenizer_init else Tokenizer.load(source, chat_template)
        with _load_bar() as progress:
            self._engine = Engine.load(self._config, progress)
        self._ids = count()

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
    ) -> list[RequestOutput]:
        """Answer prompts (text, token ids, ``{"prompt": ...}``, ``{"prompt_token_ids": ...}``) together, in their order.

        ``priority``: one a prompt, lower goes first (scheduling_policy="priority"). A prompt with a ``cache_salt`` shares cached
        prefixes only with those that have the same.
        """
        many = _prompt_list(prompts)
        params = _params_list(sampling_params, len(many))
        ranks = [0] * len(many) if priority is None else list(priority)
        if len(ranks) != len(many):
            raise InputError(f"{len(ranks)} priorities for {len(many)} prompts: give one for each")
        jobs = [self._job(*one) for one in zip(many, params, ranks, strict=True)]
        self._answer(jobs, use_tqdm)
        return [job.output() for job in jobs]

    def beam_search(
        self, prompts: Prompt | Sequence[Prompt], params: BeamSearchParams, *, use_tqdm: bool = False
    ) -> list[BeamSearchOutput]:
        """The ``params.beam_width`` best answers to each prompt, as beam search finds them."""
        sampling = replace(params.sampling(), logprobs=2 * params.beam_width)
        jobs = [self._job(prompt, sampling) for prompt in _prompt_list(prompts)]
        self._answer(jobs, use_tqdm)
        return [job.beams() for job in jobs]

    def reset_prefix_cache(self) -> bool:
        """Prompts that come from now on find nothing of what was computed before."""
        self._engine.reset_prefix_cache()
        return True

    def _answer(self, jobs: list[Job], use_tqdm: bool) -> None:
        submitted: list[str] = []
        try:
            for job in jobs:
                self._engine.submit(job.submit)
                submitted.append(job.submit.request_id)
            self._run({job.submit.request_id: job for job in jobs}, use_tqdm)
        finally:  # also after ctrl-C or a refused prompt: nothing stays behind in the engine
            for request_id in submitted:
                self._engine.abort(request_id)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]] | Sequence[Sequence[Mapping[str, Any]]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: list[dict[str, Any]] | None = None,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation, or several, written with the model's own chat template, or with this one (Jinja, or its file).

        ``tools``: what the model is told that it may call, as OpenAI has them. What it says is in ``text`` as it said it.
        """
        tokenizer, more = self.get_tokenizer(), dict(chat_template_kwargs or {})
        chat = tokenizer.chat if chat_template is None else tokenizer.with_template(chat_template)
        taken = sorted({"add_generation_prompt", "continue_final_message", "tools"} & set(more))
        if taken:
            raise InputError(f"chat_template_kwargs holds {taken[0]!r}: give it as an argument of chat()")
        several = bool(messages) and not isinstance(messages[0], Mapping)
        conversations: Sequence[Any] = messages if several else [messages]
        texts = [
            chat(
                list(conversation),
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                tools=list(tool_choice(tools, None).tools) or None,
                **more,
            )
            for conversation in conversations
        ]
        prompts = [{"prompt": t, "prompt_token_ids": tokenizer.encode(t, add_special_tokens=False)} for t in texts]
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm)

    def _job(self, prompt: Prompt, params: SamplingParams, priority: int = 0) -> Job:
        text, ids = self._tokens(prompt)
        if self._tokenizer is None and params.stop:
            raise RequestError("stop strings need a tokenizer: use stop_token_ids", param="stop")
        params = prepare(params, self._tokenizer)
        salt = prompt.get("cache_salt") if isinstance(prompt, Mapping) else None
        if salt is not None and (not isinstance(salt, str) or not salt):
            raise RequestError(f"cache_salt must be text that is not empty, got {salt!r:.80}", param="cache_salt")
        submit = Submit(str(next(self._ids)), tuple(ids), params, time.monotonic(), cache_salt=salt or "", priority=priority)
        return Job(text, submit, self._tokenizer, [OutputStream(self._tokenizer, params, ids) for _ in range(params.width)])

    def _tokens(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        if isinstance(prompt, Mapping):
            text, ids = prompt.get("prompt"), prompt.get("prompt_token_ids")
            if ids is not None:
                return text, list(ids)
            if text is None:
                raise InputError(f"a prompt needs 'prompt' or 'prompt_token_ids', found {sorted(prompt)}")
            return text, self.get_tokenizer().encode(text)
        if isinstance(prompt, str):
            return prompt, self.get_tokenizer().encode(prompt)
        return None, list(prompt)

    def _run(self, jobs: dict[str, Job], use_tqdm: bool) -> None:
        with tqdm(total=len(jobs), desc="Processed prompts", disable=not use_tqdm, unit="prompt") as bar:
            tokens, begun = 0, time.perf_counter()
            while self._engine.has_work:
                for event in self._engine.step():
                    tokens += len(event.token_ids)
                    job = jobs[event.request_id]
                    if job.take(event):
                        self._engine.abort(event.request_id, event.index, "stop")
                    if event.finish_reason and job.finished:
                        bar.set_postfix_str(f"{tokens / (time.perf_counter() - begun):.1f} tok/s", refresh=False)
                        bar.update()


def _engine_config(model: str, options: dict[str, Any]) -> EngineConfig:
    known = {f.name for f in fields(EngineConfig)} - {"model"}
    for name in [n for n in options if n not in known]:
        value = options.pop(name)
        if name not in HARMLESS:
            raise TypeError(f"LLM() has no argument {name!r}; it has {', '.join(sorted(known))}")
        if value not in HARMLESS[name]:
            raise InputError(f"{name}={value!r} is not supported: leave it out")
    return EngineConfig(model=model, **options)


def _prompt_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str | Mapping) or (prompts and isinstance(prompts[0], int)):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]


def _params_list(params: SamplingParams | Sequence[SamplingParams] | None, number: int) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * number
    if len(params) != number:
        raise InputError(f"{len(params)} sampling_params for {number} prompts: give one for all, or one for each")
    return list(params)


@contextlib.contextmanager
def _load_bar() -> Iterator[Any]:
    with tqdm(unit="B", unit_scale=True, unit_divisor=1024, desc="Loading weights", leave=False) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield progress
