"""/v1/chat/completions, as vLLM 0.21 ``entrypoints/openai/chat_completion/serving.py`` with the Hermes tool parser.

:class:`ChatRun` gives the whole answer or its chunks as objects, because /v1/messages is this route in other clothes.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any

from aiohttp import web

from disagg_sim import openai_json as shapes
from disagg_sim.api_error import ApiError, InvalidBody, Refused
from disagg_sim.exchange import Exchange
from disagg_sim.frontend import Choice, Delta, beam_search, collect, generate, make_requests
from disagg_sim.prefix_cache import BLOCK
from disagg_sim.request import EngineDeadError
from disagg_sim.sampling_rules import check_fields, check_prompt, fit_prompt, format_guide, sampling_of
from disagg_sim.template import render_chat, without_billing
from disagg_sim.tool_choice import ToolChoice, ToolStream, message_of
from disagg_sim.vocabulary import encode


class ChatRun:
    """One checked conversation.

    Raises:
        ApiError: on construction, as vLLM refuses it.
        EngineDeadError: on construction, when the engine is dead.
    """

    def __init__(self, exchange: Exchange, body: Mapping[str, Any]) -> None:
        self.exchange = exchange
        self.body = body
        _check(body)
        self.tools = ToolChoice.of(body)
        exchange.check_model(body)
        if exchange.loop.death is not None:
            raise EngineDeadError
        config = exchange.config
        if self.tools.mode and not config.enable_auto_tool_choice:
            raise Refused('"auto" tool choice requires --enable-auto-tool-choice and --tool-call-parser to be set')
        if body.get("chat_template") is not None:
            raise Refused("Chat template is passed with request, but --trust-request-chat-template is not set.")
        prompt = render_chat(
            list(map(without_billing, body["messages"])) if config.rules.chat_billing else body["messages"],
            tools=body.get("tools"),
            template_kwargs=body.get("chat_template_kwargs"),
            documents=body.get("documents"),
            add_generation_prompt=body.get("add_generation_prompt", True),
            continue_final_message=bool(body.get("continue_final_message")),
        )
        requested: int | None = body.get("max_completion_tokens")
        requested = body.get("max_tokens") if requested is None else requested
        self.prompt_ids = fit_prompt(encode(prompt), body, requested, config.max_model_len)
        available = config.max_model_len - len(self.prompt_ids)
        self.top: int | None = body.get("top_logprobs", 0) if body.get("logprobs") else None
        prompt_logprobs = body.get("prompt_logprobs")
        if prompt_logprobs is None and body.get("echo"):
            prompt_logprobs = body.get("top_logprobs", 0)
        self.sampling = sampling_of(
            body,
            max_tokens=available if requested is None else min(requested, available),
            logprobs=self.top,
            prompt_logprobs=prompt_logprobs,
            guide=self.tools.guide or format_guide(body),
        )
        self.id = f"chatcmpl-{exchange.request_id or body.get('request_id') or uuid.uuid4().hex}"
        self.created = int(time.time())
        self.model = config.models[0]
        self.fingerprint = shapes.fingerprint(config.vllm_version)
        self.requests = make_requests(self.id, self.prompt_ids, self.sampling, randomize=config.randomize_request_ids)

    def _usage(self, completion: int, cached: int | None = None) -> dict[str, Any]:
        length, config = len(self.prompt_ids), self.exchange.config
        shown = None if cached is None else config.shown_hits(cached)
        if shown is None or not config.rules.created_tokens:
            return shapes.usage(length, completion, shown)
        # What was computed here of the blocks that the prefix cache holds (v1/metrics/stats.py, PrefillStats.finalize).
        return shapes.usage(length, completion, shown, max(0, length // BLOCK * BLOCK - shown))

    async def full(self) -> dict[str, Any]:
        """The answer in one piece."""
        check_prompt(self.prompt_ids, self.exchange.config.max_model_len)
        if self.sampling.beam_search:
            found = await beam_search(self.exchange.loop, self.id, self.prompt_ids, self.sampling)
        else:
            found = await collect(self.exchange.loop, self.requests)
        return {
            "id": self.id,
            "object": "chat.completion",
            "created": self.created,
            "prompt_routed_experts": None,
            "model": self.model,
            "choices": [self._choice(index, choice) for index, choice in enumerate(found)],
            "service_tier": None,
            "system_fingerprint": self.fingerprint,
            "usage": self._usage(sum(len(choice.ids) for choice in found), found[0].request.cached_tokens),
            "prompt_logprobs": shapes.prompt_logprobs(found[0].request.prompt_logprobs),
            "prompt_token_ids": self.prompt_ids if self.body.get("return_token_ids") else None,
            "prompt_text": None,
            "kv_transfer_params": found[0].request.kv_transfer,
        }

    def _choice(self, index: int, choice: Choice) -> dict[str, Any]:
        message, called = message_of(self.tools, choice.text)
        if self.body.get("echo") and self.body["messages"][-1].get("role") == "assistant":
            message["content"] = (self.body["messages"][-1].get("content") or "") + (message["content"] or "")
        reason = choice.finish_reason
        if called and (self.tools.mode == "auto" or (self.tools.mode == "required" and reason == "stop")):
            reason = "tool_calls"
        return {
            "index": index,
            "message": message,
            "logprobs": None if self.top is None else shapes.chat_logprobs(choice.ids, choice.logprobs, self.top),
            "finish_reason": reason,
            "stop_reason": choice.stop_reason,
            "token_ids": choice.ids if self.body.get("return_token_ids") else None,
            "routed_experts": None,
        }

    async def chunks(self) -> AsyncGenerator[tuple[dict[str, Any], int], None]:
        """The answer's chunks, each with the number of generated tokens it carries."""
        options = self.body.get("stream_options") or {}
        include_usage = bool(options.get("include_usage"))
        continuous = include_usage and bool(options.get("continuous_usage_stats"))
        tools = {request: ToolStream(self.tools) for request in self.requests}
        cached: int | None = None
        total = 0
        async with aclosing(generate(self.exchange.loop, self.requests)) as deltas:
            async for delta in deltas:
                if cached is None:
                    cached = delta.choice.request.cached_tokens
                    for index in range(self.sampling.n):
                        opening = {"role": "assistant", "content": ""}
                        chunk = self._chunk(index, opening, None, None, None)
                        if continuous:
                            chunk["usage"] = self._usage(0)
                        yield chunk, 0
                total += 1
                for chunk in self._delta_chunks(delta, tools[delta.choice.request]):
                    if chunk["choices"][0]["finish_reason"] is not None and not include_usage:
                        chunk["system_fingerprint"] = self.fingerprint
                    if continuous:
                        chunk["usage"] = self._usage(len(delta.choice.ids))
                    yield chunk, 1
        if include_usage:
            final = {**self._head(), "choices": [], "usage": self._usage(total, cached or 0)}
            yield shapes.without_none({**final, "system_fingerprint": self.fingerprint}), 0

    def _delta_chunks(self, delta: Delta, tools: ToolStream) -> list[dict[str, Any]]:
        choice = delta.choice
        ended = choice.finish_reason is not None
        message = tools.feed(delta.text, final=ended)
        if message is None:
            if not ended:
                return []
            message = {}
        reason = "tool_calls" if ended and tools.called and self.tools.mode != "named" else choice.finish_reason
        logprobs = None
        if self.top is not None:
            logprobs = shapes.chat_logprobs([delta.token.id], [delta.token.logprobs], self.top)
        ids = [delta.token.id] if self.body.get("return_token_ids") else None
        chunk = self._chunk(choice.request.index, message, logprobs, reason, ids)
        if ended:
            chunk["choices"][0]["stop_reason"] = choice.stop_reason
        return [chunk]

    def _head(self) -> dict[str, Any]:
        return {"id": self.id, "object": "chat.completion.chunk", "created": self.created, "model": self.model}

    def _chunk(
        self, index: int, delta: dict[str, Any], logprobs: Any, reason: str | None, ids: list[int] | None
    ) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason, "token_ids": ids}
        return {**self._head(), "choices": [choice]}


async def chat_completions(exchange: Exchange) -> web.StreamResponse:
    """The route."""
    body = exchange.json()
    run = ChatRun(exchange, body)
    if not body.get("stream"):
        return await exchange.reply_json(await run.full())
    stream = await exchange.open_stream()
    try:
        check_prompt(run.prompt_ids, exchange.config.max_model_len)
        async with aclosing(run.chunks()) as chunks:
            async for chunk, tokens in chunks:
                await stream.data(chunk, tokens=tokens)
    except (ApiError, EngineDeadError) as error:
        await stream.data(shapes.stream_error(error))
    return await stream.done()


def _check(body: Mapping[str, Any]) -> None:
    check_fields(body)
    messages = body.get("messages")
    if not isinstance(messages, list) or not all(map(_is_message, messages)):
        raise InvalidBody("[{'loc': ('body', 'messages'), 'msg': 'Input should be a valid list'}]", param="messages")
    if not isinstance(body.get("logprobs") or False, bool):
        raise InvalidBody("[{'loc': ('body', 'logprobs'), 'msg': 'Input should be a valid boolean'}]", param="logprobs")
    top = body.get("top_logprobs")
    if top is not None and top < -1:
        raise InvalidBody("`top_logprobs` must be a positive value or -1.", param="top_logprobs")
    if top and not body.get("logprobs"):
        raise InvalidBody("when using `top_logprobs`, `logprobs` must be set to true.", param="top_logprobs")
    if body.get("continue_final_message") and body.get("add_generation_prompt"):
        raise InvalidBody("Cannot set both `continue_final_message` and `add_generation_prompt` to True.")
    if body.get("stream") and body.get("use_beam_search"):
        raise Refused("Streaming is not currently supported with beam search")


def _is_message(value: Any) -> bool:
    if not isinstance(value, dict) or not isinstance(value.get("role"), str):
        return False
    content = value.get("content")
    if isinstance(content, list):
        return all(isinstance(part, dict) for part in content)
    return content is None or isinstance(content, str)
