"""/v1/responses, as far as its life in a prefill/decode pair goes (vLLM 0.21 - 0.33 ``openai/responses``).

The engine's id is the body's ``request_id`` with ``_0`` behind it; X-Request-Id plays no part. So with
P2pNcclConnector, unless that field carries addresses, the request kills the engine that gets it. Other connectors find
their ``kv_transfer_params`` in the body, as on the other routes. Nothing is stored, as vLLM does by default.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping
from contextlib import aclosing
from typing import Any

from aiohttp import web

from disagg_sim.api_error import ApiError, InvalidBody, Refused
from disagg_sim.config import SimConfig
from disagg_sim.exchange import Exchange, StreamCutError
from disagg_sim.frontend import collect, generate, make_requests
from disagg_sim.kv_wire import reset
from disagg_sim.prefix_cache import BLOCK
from disagg_sim.request import EngineDeadError, EngineRequest
from disagg_sim.sampling_rules import check_fields, check_prompt, fit_prompt, sampling_of
from disagg_sim.template import render_chat
from disagg_sim.vocabulary import encode


async def responses(exchange: Exchange) -> web.StreamResponse:
    """The route."""
    body = exchange.json()
    check_fields(body)
    _check(body)
    prompt = render_chat(_messages(body), tools=body.get("tools") or None)
    exchange.check_model(body)
    if exchange.loop.death is not None:
        raise EngineDeadError
    if (previous := body.get("previous_response_id")) is not None:
        raise Refused(f"Response with id '{previous}' not found.", param="response_id", status=404)
    config = exchange.config
    limit = body.get("max_output_tokens")
    cut = {} if body.get("truncation", "disabled") == "disabled" else {"truncate_prompt_tokens": -1}
    ids = fit_prompt(encode(prompt), cut, limit, config.max_model_len)
    available = config.max_model_len - len(ids)
    rules = {key: body.get(key) for key in ("temperature", "top_p", "stop", "ignore_eos")}
    if config.rules.responses_transfer_kv:
        rules["kv_transfer_params"] = body.get("kv_transfer_params")
    sampling = sampling_of(
        rules | {"min_tokens": 0},
        max_tokens=available if limit is None else min(limit, available),
        logprobs=None,
        prompt_logprobs=None,
        guide=None,
    )
    response_id = body.get("request_id") or f"resp_{uuid.uuid4().hex}"
    requests = make_requests(f"{response_id}_0", ids, sampling, randomize=config.randomize_request_ids)
    head = _head(body, response_id, config.models[0], sampling.max_tokens)
    if not body.get("stream"):
        check_prompt(ids, config.max_model_len)
        (choice,) = await collect(exchange.loop, requests)
        usage = _usage(config, choice.request, len(choice.ids))
        answer = _finished(head, choice.text, choice.finish_reason, usage)
        return await exchange.reply_json({**answer, "kv_transfer_params": choice.request.kv_transfer})

    stream = await exchange.open_stream()
    item = {"id": f"msg_{uuid.uuid4().hex}", "type": "message", "role": "assistant", "status": "in_progress"}
    place: dict[str, Any] = {"item_id": item["id"], "output_index": 0, "content_index": 0}
    number = 0

    async def send(kind: str, tokens: int = 0, **fields: Any) -> None:
        nonlocal number
        await stream.data({"type": kind, "sequence_number": number, **fields}, event=kind, tokens=tokens)
        number += 1

    started = {**head, "status": "in_progress", "output": [], "usage": None}
    try:
        check_prompt(ids, config.max_model_len)
        await send("response.created", response=started)
        await send("response.in_progress", response=started)
        text, count, reason = "", 0, None
        async with aclosing(generate(exchange.loop, requests)) as deltas:
            async for delta in deltas:
                if not count:
                    await send("response.output_item.added", output_index=0, item={**item, "content": []})
                    await send("response.content_part.added", **place, part=_part(""))
                text, count, reason = text + delta.text, count + 1, delta.choice.finish_reason
                await send("response.output_text.delta", 1, **place, delta=delta.text, logprobs=[])
        await send("response.output_text.done", **place, text=text, logprobs=[])
        await send("response.content_part.done", **place, part=_part(text))
        done = {**item, "status": "completed", "content": [_part(text)]}
        await send("response.output_item.done", output_index=0, item=done)
        finished = _finished(head, text, reason, _usage(config, requests[0], count))
        cut_off = config.rules.responses_incomplete and reason == "length"
        await send(f"response.{'incomplete' if cut_off else 'completed'}", response=finished)
    except (ApiError, EngineDeadError):
        # The error is no event of this API, so it ends the handler in mid-stream.
        if exchange.raw.transport is not None:
            reset(exchange.raw.transport)
        raise StreamCutError from None
    return await stream.end()


def _check(body: Mapping[str, Any]) -> None:
    """The rules of vLLM's request model that concern the fields of a leg."""
    for name, kind in (("max_output_tokens", int), ("background", bool), ("store", bool)):
        value = body.get(name)
        if value is not None and (not isinstance(value, kind) or (kind is int and isinstance(value, bool))):
            raise InvalidBody(f"[{{'loc': ('body', '{name}'), 'msg': 'Input should be a valid {kind.__name__}'}}]")
    if body.get("background") and not body.get("store", True):
        raise InvalidBody("background can only be used when `store` is true", param="background")
    if body.get("prompt") is not None:
        raise InvalidBody("prompt template is not supported", param="prompt")


def _messages(body: Mapping[str, Any]) -> list[dict[str, Any]]:
    given = body.get("input")
    messages: list[dict[str, Any]] = []
    if body.get("instructions"):
        messages.append({"role": "system", "content": body["instructions"]})
    if isinstance(given, str):
        return [*messages, {"role": "user", "content": given}]
    if not isinstance(given, list) or not all(isinstance(item, dict) for item in given):
        raise InvalidBody("[{'loc': ('body', 'input'), 'msg': 'Field required'}]", param="input")
    return messages + [_message(item) for item in given]


def _message(item: Mapping[str, Any]) -> dict[str, Any]:
    if item.get("type") == "function_call_output":
        return {"role": "tool", "content": item.get("output"), "tool_call_id": item.get("call_id")}
    return {"role": item.get("role", "user"), "content": item.get("content")}


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": None}


def _head(body: Mapping[str, Any], response_id: str, model: str, max_tokens: int) -> dict[str, Any]:
    return {
        "id": response_id,
        "created_at": int(time.time()),
        "incomplete_details": None,
        "instructions": body.get("instructions"),
        "metadata": body.get("metadata"),
        "model": model,
        "object": "response",
        "parallel_tool_calls": True,
        "temperature": 1.0 if body.get("temperature") is None else body["temperature"],
        "tool_choice": "auto",
        "tools": body.get("tools") or [],
        "top_p": 1.0 if body.get("top_p") is None else body["top_p"],
        "background": False,
        "max_output_tokens": max_tokens,
        "service_tier": "auto",
        "truncation": "disabled",
    }


def _usage(config: SimConfig, request: EngineRequest, generated: int) -> dict[str, Any]:
    """Always with the cached tokens, whatever --enable-prompt-tokens-details says."""
    prompt, cached = len(request.prompt_ids), request.cached_tokens
    details: dict[str, Any] = {"cached_tokens": cached}
    if config.rules.responses_cache_writes:
        details["cache_write_tokens"] = max(0, prompt // BLOCK * BLOCK - cached)
    return {
        "input_tokens": prompt,
        "input_tokens_details": {**details, "input_tokens_per_turn": [], "cached_tokens_per_turn": []},
        "output_tokens": generated,
        "output_tokens_details": {
            "reasoning_tokens": 0,
            "tool_output_tokens": 0,
            "output_tokens_per_turn": [],
            "tool_output_tokens_per_turn": [],
        },
        "total_tokens": prompt + generated,
    }


def _finished(head: dict[str, Any], text: str, reason: str | None, usage: dict[str, Any]) -> dict[str, Any]:
    message = {
        "id": f"msg_{uuid.uuid4().hex}",
        "type": "message",
        "role": "assistant",
        "status": "completed",
        "content": [_part(text)],
    }
    cut = reason == "length"
    return {
        **head,
        "status": "incomplete" if cut else "completed",
        "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
        "output": [message],
        "usage": usage,
    }
