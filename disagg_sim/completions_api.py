"""/v1/completions, as vLLM 0.21 ``entrypoints/openai/completion/serving.py``."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping
from contextlib import aclosing
from typing import Any

from aiohttp import web

from disagg_sim import openai_json as shapes
from disagg_sim.api_error import ApiError, InvalidBody, Refused
from disagg_sim.exchange import Exchange
from disagg_sim.frontend import Choice, Delta, beam_search, collect, generate, make_requests
from disagg_sim.request import EngineDeadError, LogprobEntry, Sampling
from disagg_sim.sampling_rules import check_fields, check_prompt, fit_prompt, format_guide, sampling_of
from disagg_sim.vocabulary import decode, encode


class _Run:
    """One checked request."""

    def __init__(self, exchange: Exchange, body: Mapping[str, Any]) -> None:
        self.exchange = exchange
        self.body = body
        _check(body)
        exchange.check_model(body)
        if exchange.loop.death is not None:
            raise EngineDeadError
        if body.get("suffix") is not None:
            raise Refused("suffix is not currently supported")
        config = exchange.config
        self.max_tokens: int | None = body.get("max_tokens", 16)
        if self.max_tokens is None and config.rules.null_max_tokens_is_default:
            self.max_tokens = 16
        self.prompts = [
            fit_prompt(ids, body, self.max_tokens, config.max_model_len) for ids in _prompts(body["prompt"])
        ]
        self.echo = bool(body.get("echo"))
        self.top: int | None = body.get("logprobs")
        self.id = f"cmpl-{exchange.request_id or body.get('request_id') or uuid.uuid4().hex}"
        self.created = int(time.time())
        self.model = config.models[0]
        self.fingerprint = shapes.fingerprint(config.vllm_version)
        self.samplings = [self._sampling(ids) for ids in self.prompts]
        self.n = self.samplings[0].n
        self.requests = [
            request
            for index, (ids, sampling) in enumerate(zip(self.prompts, self.samplings, strict=True))
            for request in make_requests(
                f"{self.id}-{index}", ids, sampling, prompt_index=index, randomize=config.randomize_request_ids
            )
        ]

    def _sampling(self, ids: list[int]) -> Sampling:
        available = self.exchange.config.max_model_len - len(ids)
        prompt_logprobs = self.body.get("prompt_logprobs")
        if prompt_logprobs is None and self.echo:
            prompt_logprobs = self.top
        only_echo = self.echo and self.max_tokens == 0
        return sampling_of(
            self.body,
            max_tokens=1 if only_echo else available if self.max_tokens is None else min(self.max_tokens, available),
            logprobs=self.top,
            prompt_logprobs=prompt_logprobs,
            guide=format_guide(self.body),
        )

    def check_prompts(self) -> None:
        for ids in self.prompts:
            check_prompt(ids, self.exchange.config.max_model_len)

    async def choices(self) -> list[Choice]:
        if not self.samplings[0].beam_search:
            return await collect(self.exchange.loop, self.requests)
        found: list[Choice] = []
        for ids, sampling in zip(self.prompts, self.samplings, strict=True):
            found += await beam_search(self.exchange.loop, self.id, ids, sampling)
        return found

    def usage(self, completion: int, cached: int) -> dict[str, Any]:
        return shapes.usage(sum(map(len, self.prompts)), completion, self.exchange.config.shown_hits(cached))

    def shown(
        self, prompt_ids: list[int], text: str, ids: list[int], entries: list[LogprobEntry | None], choice: Choice
    ) -> tuple[str, list[int], list[LogprobEntry | None]]:
        """Text, ids and log probabilities with the prompt in front, where echo asks for it."""
        if not self.echo:
            return text, ids, entries
        prompt = decode(prompt_ids)
        head = choice.request.prompt_logprobs or [None] * len(prompt_ids)
        if self.max_tokens == 0:
            return prompt, prompt_ids, head
        return prompt + text, prompt_ids + ids, head + entries


async def completions(exchange: Exchange) -> web.StreamResponse:
    """The route."""
    body = exchange.json()
    run = _Run(exchange, body)
    if body.get("stream"):
        return await _stream(run)
    run.check_prompts()
    found = await run.choices()
    return await exchange.reply_json(_full(run, found))


def _full(run: _Run, found: list[Choice]) -> dict[str, Any]:
    choices = []
    for index, choice in enumerate(found):
        prompt_ids = choice.request.prompt_ids
        text, ids, entries = run.shown(prompt_ids, choice.text, choice.ids, choice.logprobs, choice)
        keep_ids = bool(run.body.get("return_token_ids"))
        choices.append(
            {
                "index": index,
                "text": text,
                "logprobs": None if run.top is None else shapes.completion_logprobs(ids, entries, run.top),
                "finish_reason": choice.finish_reason,
                "stop_reason": choice.stop_reason,
                "token_ids": choice.ids if keep_ids else None,
                "prompt_logprobs": shapes.prompt_logprobs(choice.request.prompt_logprobs),
                "prompt_token_ids": prompt_ids if keep_ids else None,
                "routed_experts": None,
            }
        )
    return {
        "id": run.id,
        "object": "text_completion",
        "created": run.created,
        "prompt_routed_experts": None,
        "model": run.model,
        "choices": choices,
        "service_tier": None,
        "system_fingerprint": run.fingerprint,
        "usage": run.usage(sum(len(choice.ids) for choice in found), found[-1].request.cached_tokens),
        "kv_transfer_params": found[0].request.kv_transfer,
    }


async def _stream(run: _Run) -> web.StreamResponse:
    options = run.body.get("stream_options") or {}
    include_usage = bool(options.get("include_usage"))
    continuous = include_usage and bool(options.get("continuous_usage_stats"))
    counts: dict[Choice, int] = {}
    cached: int | None = None
    stream = await run.exchange.open_stream()
    try:
        run.check_prompts()
        async with aclosing(generate(run.exchange.loop, run.requests)) as deltas:
            async for delta in deltas:
                first = delta.choice not in counts
                counts[delta.choice] = counts.get(delta.choice, 0) + 1
                cached = delta.choice.request.cached_tokens if cached is None else cached
                chunk = _chunk(run, delta, first)
                if delta.choice.finish_reason is not None and not include_usage:
                    chunk["system_fingerprint"] = run.fingerprint
                if continuous:
                    chunk["usage"] = shapes.usage(len(delta.choice.request.prompt_ids), counts[delta.choice])
                await stream.data(chunk, tokens=1)
        if include_usage:
            last = {**_head(run), "choices": [], "usage": run.usage(sum(counts.values()), cached or 0)}
            await stream.data(shapes.without_none({**last, "system_fingerprint": run.fingerprint}))
    except (ApiError, EngineDeadError) as error:
        await stream.data(shapes.stream_error(error))
    return await stream.done()


def _head(run: _Run) -> dict[str, Any]:
    return {"id": run.id, "object": "text_completion", "created": run.created, "model": run.model}


def _chunk(run: _Run, delta: Delta, first: bool) -> dict[str, Any]:
    choice = delta.choice
    text, ids, entries = delta.text, [delta.token.id], [delta.token.logprobs]
    offset = len(choice.text) - len(delta.text)
    if first:
        text, ids, entries = run.shown(choice.request.prompt_ids, text, ids, entries, choice)
        offset = 0
    keep_ids = bool(run.body.get("return_token_ids"))
    return {
        **_head(run),
        "choices": [
            {
                "index": choice.request.index + choice.request.prompt_index * run.n,
                "text": text,
                "logprobs": None if run.top is None else shapes.completion_logprobs(ids, entries, run.top, offset),
                "finish_reason": choice.finish_reason,
                "stop_reason": choice.stop_reason,
                "prompt_token_ids": choice.request.prompt_ids if keep_ids and first else None,
                "token_ids": [delta.token.id] if keep_ids else None,
            }
        ],
    }


def _check(body: Mapping[str, Any]) -> None:
    check_fields(body)
    logprobs = body.get("logprobs")
    if logprobs is not None and (isinstance(logprobs, bool) or not isinstance(logprobs, int)):
        raise InvalidBody("[{'loc': ('body', 'logprobs'), 'msg': 'Input should be a valid integer'}]", param="logprobs")
    if logprobs is not None and logprobs < 0:
        raise InvalidBody("`logprobs` must be a positive value.", param="logprobs")
    prompt = body.get("prompt")
    if prompt is None or prompt == "":
        raise InvalidBody("Either prompt or prompt_embeds must be provided and non-empty.", param="prompt")
    if not _is_prompt(prompt):
        raise InvalidBody("[{'loc': ('body', 'prompt'), 'msg': 'Input should be a valid prompt'}]", param="prompt")
    if body.get("stream") and body.get("use_beam_search"):
        raise Refused("Streaming is not currently supported with beam search")


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and all(type(number) is int and number >= 0 for number in value)


def _is_prompt(value: Any) -> bool:
    if isinstance(value, str) or _is_ids(value):
        return True
    return isinstance(value, list) and (
        all(isinstance(text, str) for text in value) or all(_is_ids(ids) for ids in value)
    )


def _prompts(prompt: Any) -> list[list[int]]:
    if isinstance(prompt, str):
        return [encode(prompt)]
    if not prompt or isinstance(prompt[0], int):
        return [prompt]
    return [encode(entry) if isinstance(entry, str) else entry for entry in prompt]
