"""/v1/messages and /v1/messages/count_tokens, as vLLM 0.21 - 0.33 ``entrypoints/anthropic``: the chat route translated.

:mod:`disagg_sim.vllm_rules` says where the versions differ: the thinking budget, and the usage.
"""

from __future__ import annotations

import json
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any

from aiohttp import web

from disagg_sim.api_error import ApiError, InvalidBody
from disagg_sim.chat_api import ChatRun
from disagg_sim.exchange import Exchange
from disagg_sim.request import EngineDeadError
from disagg_sim.sampling_rules import check_prompt
from disagg_sim.template import BILLING_HEADER
from disagg_sim.vllm_rules import VllmRules

_LEAST_BUDGET = 1024

_STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


def to_chat(body: Mapping[str, Any], rules: VllmRules, *, counting: bool = False) -> dict[str, Any]:
    """The chat request that an Anthropic request means.

    Raises:
        InvalidBody: for a body that is no Anthropic request.
    """
    messages: list[dict[str, Any]] = []
    system = body.get("system")
    if isinstance(system, str) and system:
        messages.append({"role": "system", "content": system})
    elif system:
        texts = (block.get("text") or "" for block in system if block.get("type") == "text")
        text = "".join(text for text in texts if not text.startswith(BILLING_HEADER))
        messages.append({"role": "system", "content": text})
    for message in _messages(body):
        messages.extend(_convert(message))
    chat: dict[str, Any] = {"model": body.get("model"), "messages": messages}
    if body.get("chat_template_kwargs") is not None:
        chat["chat_template_kwargs"] = body["chat_template_kwargs"]
    if not counting:
        limit = body.get("max_tokens")
        if type(limit) is not int or limit <= 0:
            raise InvalidBody("[{'loc': ('body', 'max_tokens'), 'msg': 'max_tokens must be positive'}]", param=None)
        chat["max_tokens"] = chat["max_completion_tokens"] = limit
        for ours, theirs in (("stop", "stop_sequences"), ("temperature",) * 2, ("top_p",) * 2, ("top_k",) * 2):
            chat[ours] = body.get(theirs)
        if body.get("stream"):
            chat["stream"] = True
            chat["stream_options"] = {"include_usage": True, "continuous_usage_stats": True}
    if body.get("kv_transfer_params") is not None:
        chat["kv_transfer_params"] = body["kv_transfer_params"]
    if rules.reads_thinking:
        _thinking(body, chat, counting=counting)
    _tools(body, chat)
    return chat


def _thinking(body: Mapping[str, Any], chat: dict[str, Any], *, counting: bool) -> None:
    thinking = body.get("thinking")
    if thinking is None:
        return
    kind = thinking.get("type") if isinstance(thinking, dict) else None
    if kind == "disabled":
        chat["chat_template_kwargs"] = {"enable_thinking": False, **(body.get("chat_template_kwargs") or {})}
    elif kind == "enabled":
        budget = thinking.get("budget_tokens")
        if type(budget) is not int or budget < _LEAST_BUDGET:
            raise InvalidBody("[{'loc': ('body', 'thinking'), 'msg': 'Input should be greater than or equal to 1024'}]")
        of_prefill = (body.get("kv_transfer_params") or {}).get("do_remote_decode")
        if not counting and not of_prefill and budget >= body["max_tokens"]:
            message = "Value error, thinking.budget_tokens must be less than max_tokens"
            raise InvalidBody(f"[{{'loc': ('body',), 'msg': '{message}'}}]")
    elif kind != "adaptive":
        raise InvalidBody("[{'loc': ('body', 'thinking'), 'msg': 'Input should be valid'}]")


def _messages(body: Mapping[str, Any]) -> list[dict[str, Any]]:
    if not body.get("model"):
        raise InvalidBody("[{'loc': ('body', 'model'), 'msg': 'Model is required'}]")
    messages: list[dict[str, Any]] | None = body.get("messages")
    good = isinstance(messages, list) and all(
        isinstance(m, dict) and m.get("role") in ("user", "assistant") and isinstance(m.get("content"), (str, list))
        for m in messages
    )
    if not good or messages is None:
        raise InvalidBody("[{'loc': ('body', 'messages'), 'msg': 'Input should be valid'}]")
    return messages


def _convert(message: Mapping[str, Any]) -> list[dict[str, Any]]:
    content = message["content"]
    if isinstance(content, str):
        return [{"role": message["role"], "content": content}]
    before: list[dict[str, Any]] = []
    parts: list[dict[str, Any]] = []
    calls: list[dict[str, Any]] = []
    for block in content:
        kind = block.get("type")
        if kind == "text" and block.get("text"):
            parts.append({"type": "text", "text": block["text"]})
        elif kind == "image":
            parts.append({"type": "image_url"})
        elif kind == "tool_use":
            function = {"name": block.get("name") or "", "arguments": json.dumps(block.get("input") or {})}
            call_id = block.get("id") or f"call_{int(time.time())}"
            calls.append({"id": call_id, "type": "function", "function": function})
        elif kind == "tool_result":
            inner = block.get("content") or ""
            if isinstance(inner, list):
                inner = "\n".join(part.get("text", "") for part in inner if part.get("type") == "text")
            before.append({"role": "tool", "tool_call_id": block.get("tool_use_id") or "", "content": inner})
    out: dict[str, Any] = {"role": message["role"]}
    if calls:
        out["tool_calls"] = calls
    if parts:
        out["content"] = parts[0]["text"] if len(parts) == 1 and parts[0]["type"] == "text" else parts
    return [*before, out] if parts or calls or message["role"] != "user" else before


def _tools(body: Mapping[str, Any], chat: dict[str, Any]) -> None:
    choice = body.get("tool_choice")
    if choice is not None:
        kind = choice.get("type") if isinstance(choice, dict) else None
        named = {"type": "function", "function": {"name": choice.get("name")}} if kind == "tool" else None
        converted = {"auto": "auto", "any": "required", "none": "none", "tool": named}.get(str(kind))
        if converted is None:
            raise InvalidBody("[{'loc': ('body', 'tool_choice'), 'msg': 'Input should be valid'}]")
        chat["tool_choice"] = converted
    if body.get("tools"):
        chat["tools"] = [
            {
                "type": "function",
                "function": {
                    "name": tool.get("name"),
                    "description": tool.get("description"),
                    "parameters": tool.get("input_schema") or {"type": "object"},
                },
            }
            for tool in body["tools"]
        ]
        chat.setdefault("tool_choice", "auto")


async def messages(exchange: Exchange) -> web.StreamResponse:
    """The route."""
    body = exchange.json()
    rules = exchange.config.rules
    run = ChatRun(exchange, to_chat(body, rules))
    if not body.get("stream"):
        return await exchange.reply_json(_whole(await run.full(), rules))
    stream = await exchange.open_stream()
    try:
        check_prompt(run.prompt_ids, exchange.config.max_model_len)
        async with aclosing(run.chunks()) as chunks, aclosing(_events(chunks, rules)) as events:
            async for event, tokens in events:
                await stream.data(event, event=event["type"], tokens=tokens)
    except (ApiError, EngineDeadError) as error:
        failed = {"type": "error", "error": {"type": "internal_error", "message": str(error)}}
        await stream.data(failed, event="error")
    return await stream.end()


async def count_tokens(exchange: Exchange) -> web.StreamResponse:
    """The route that only counts."""
    run = ChatRun(exchange, {**to_chat(exchange.json(), exchange.config.rules, counting=True), "max_tokens": 1})
    count = len(run.prompt_ids)
    return await exchange.reply_json({"input_tokens": count, "context_management": {"original_input_tokens": count}})


def _whole(chat: dict[str, Any], rules: VllmRules) -> dict[str, Any]:
    choice = chat["choices"][0]
    content: list[dict[str, Any]] = []
    if choice["message"]["content"]:
        content.append({"type": "text", "text": choice["message"]["content"]})
    for call in choice["message"]["tool_calls"]:
        # json.loads fails on arguments that max_tokens cut off, and vLLM answers 500 then.
        arguments = json.loads(call["function"]["arguments"])
        content.append({"type": "tool_use", "id": call["id"], "name": call["function"]["name"], "input": arguments})
    kept = chat["kv_transfer_params"]
    return {
        **({} if kept is None else {"kv_transfer_params": kept}),
        "id": chat["id"],
        "type": "message",
        "role": "assistant",
        "content": content,
        "model": chat["model"],
        "stop_reason": _STOP_REASONS[choice["finish_reason"]],
        "usage": _usage(chat["usage"], rules),
    }


def _usage(chat: Mapping[str, Any], rules: VllmRules) -> dict[str, int]:
    """``_build_anthropic_usage``: the prompt is the sum of three; two of them only with prompt token details."""
    details = (chat.get("prompt_tokens_details") if rules.messages_cache else None) or {}
    read, created = details.get("cached_tokens"), details.get("created_cache_tokens")
    if read is not None and not rules.created_tokens:
        created = 0
    usage = {
        "input_tokens": max(0, chat["prompt_tokens"] - (read or 0) - (created or 0)),
        "output_tokens": chat["completion_tokens"],
        "cache_creation_input_tokens": created,
        "cache_read_input_tokens": read,
    }
    return {name: value for name, value in usage.items() if value is not None}


async def _events(
    chunks: AsyncGenerator[tuple[dict[str, Any], int], None], rules: VllmRules
) -> AsyncGenerator[tuple[dict[str, Any], int], None]:
    block: str | None = None
    index = 0
    first = True
    finish = "stop"
    async for chunk, tokens in chunks:
        usage = chunk.get("usage") or {"prompt_tokens": 0, "completion_tokens": 0}
        if first:
            first = False
            start = {"id": chunk["id"], "type": "message", "role": "assistant", "content": [], "model": chunk["model"]}
            message = {**start, "stop_reason": None, "stop_sequence": None, "usage": _usage(usage, rules)}
            yield {"type": "message_start", "message": message}, tokens
            continue
        if not chunk["choices"]:
            if block is not None:
                yield {"type": "content_block_stop", "index": index}, 0
            ended = {"delta": {"stop_reason": _STOP_REASONS[finish]}, "usage": _usage(usage, rules)}
            yield {"type": "message_delta", **ended}, 0
            continue
        choice = chunk["choices"][0]
        finish = choice["finish_reason"] or finish
        for opening, delta in _blocks(choice["delta"]):
            if opening is not None and (block is None or opening["type"] != block):
                if block is not None:
                    yield {"type": "content_block_stop", "index": index}, 0
                    index += 1
                block = opening["type"]
                yield {"type": "content_block_start", "index": index, "content_block": opening}, 0
            if delta is not None:
                yield {"type": "content_block_delta", "index": index, "delta": delta}, tokens
                tokens = 0
    yield {"type": "message_stop"}, 0


def _blocks(delta: Mapping[str, Any]) -> list[tuple[dict[str, Any] | None, dict[str, Any] | None]]:
    out: list[tuple[dict[str, Any] | None, dict[str, Any] | None]] = []
    if delta.get("content"):
        out.append(({"type": "text", "text": ""}, {"type": "text_delta", "text": delta["content"]}))
    for call in delta.get("tool_calls") or ():
        function = call["function"]
        opening = None
        if "id" in call:
            opening = {"type": "tool_use", "id": call["id"], "name": function["name"], "input": {}}
        piece = {"type": "input_json_delta", "partial_json": function["arguments"]} if function["arguments"] else None
        out.append((opening, piece))
    return out
