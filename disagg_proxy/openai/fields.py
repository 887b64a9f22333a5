"""How each field of a generation request is sent on the two legs. The reasons, field by field: docs/request-fields.md.

Principle: prefill gets the client's body with as few changes as possible, so that it refuses what decode would refuse
before any KV exists; but it must generate exactly one token per choice from exactly decode's prompt. Fields that are
not named here pass unchanged.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

Body = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Route:
    """One generation route.

    Attributes:
        path: the same on the proxy and on the instances.
        dialect: the API whose request model it has.
    """

    path: str
    dialect: Literal["completions", "chat", "messages", "responses"]


COMPLETIONS = Route("/v1/completions", "completions")
CHAT = Route("/v1/chat/completions", "chat")
MESSAGES = Route("/v1/messages", "messages")
RESPONSES = Route("/v1/responses", "responses")
"""Never for P2pNcclConnector: vLLM takes the engine's request id of this route from the body, not from X-Request-Id."""
ROUTES = (COMPLETIONS, CHAT, MESSAGES)
"""Routes that every pair serves."""
GENERATION = (*ROUTES, RESPONSES)

_RESPONSES_TRANSFER = (0, 19)
"""The first vLLM whose /v1/responses takes ``kv_transfer_params`` (``entrypoints/openai/responses/protocol.py``)."""

_VERSION = re.compile(r"(\d+)\.(\d+)")

_STEERING = ("kv_transfer_params", "ec_transfer_params", "request_id")
"""Fields that control the transfer of KV or encoder caches, or name the engine's request. Clients must not set them."""

_STEERED = frozenset((*_STEERING, "vllm_xargs"))
"""Fields that are, or may contain, one of them."""

_NOT_ON_KV_RELEASE = ("echo", "logprobs", "top_logprobs", "prompt_logprobs")
"""Fields that cost time, or return garbage on decode; the response of a KV release is discarded."""


def strip(body: Body) -> bool:
    """Remove, in place, the fields that must not reach an instance. Returns whether there were any."""
    found = False
    if _STEERED.isdisjoint(body):
        return found
    for holder in (body, body.get("vllm_xargs")):
        if isinstance(holder, dict):
            for name in _STEERING:
                found |= holder.pop(name, holder) is not holder
    return found


def responses_transfer_kv(version: str | None) -> bool:
    """Whether /v1/responses of an engine takes ``kv_transfer_params``. Older ones ignore the field.

    Args:
        version: of vLLM, such as 0.33.0; None or any other text where it is not known.
    """
    found = _VERSION.match(version or "")
    return found is not None and (int(found[1]), int(found[2])) >= _RESPONSES_TRANSFER


def drop_null_limit(route: Route, body: Body) -> bool:
    """Remove, in place, a ``max_tokens`` of null from a body for /v1/completions. Returns whether there was one.

    vLLM 0.24 and newer read it as the default of 16 (``entrypoints/openai/completion/protocol.py``,
    ``normalize_null_max_tokens``). Up to 0.23 an assertion fails after generating; without the field they use the same
    default.
    """
    if route.dialect != "completions" or body.get("max_tokens", 0) is not None:
        return False
    del body["max_tokens"]
    return True


def for_prefill(route: Route, body: Body) -> Body:
    """Prefill's body: compute the prompt and one token per choice."""
    changed = dict(body)
    if _at_least_one(body.get("max_tokens")) or (route.dialect != "messages" and body.get("max_tokens") is None):
        changed["max_tokens"] = 1
    # vLLM up to 0.14 reads `max_completion_tokens or max_tokens`, later versions whichever is not None.
    if route.dialect == "chat" and _at_least_one(body.get("max_completion_tokens")):
        changed["max_completion_tokens"] = 1
    if "min_tokens" in body and not _at_most_one(body["min_tokens"]):
        del changed["min_tokens"]
    if route.dialect == "messages" and _has_thinking_budget(body):
        del changed["thinking"]
    if body.get("stream"):
        # Without a stream both legs refuse stream_options; then prefill must see them, to refuse first.
        changed.pop("stream_options", None)
    changed["stream"] = False
    if forces_tool(route, body):
        # vLLM parses an unstreamed answer, and a tool call that is cut off after one token does not parse.
        changed["stream"] = True
        if route.dialect == "chat":
            changed["stream_options"] = {"include_usage": True}
    return changed


def responses_for_prefill(body: Body) -> Body:
    """Prefill's body for /v1/responses.

    Never streamed: the first events precede the engine's output, and no answer is parsed strictly (vLLM 0.19 and newer,
    ``entrypoints/openai/responses/serving.py``).
    """
    changed = {**body, "stream": False, "store": False}
    changed.pop("background", None)
    if body.get("max_output_tokens") is None or _at_least_one(body["max_output_tokens"]):
        changed["max_output_tokens"] = 1
    return changed


def for_kv_release(prefill_body: Body) -> Body:
    """The body of a KV release: decode generates one token of the same prompt, choices and ids."""
    kept = {name: value for name, value in prefill_body.items() if name not in _NOT_ON_KV_RELEASE}
    # 0 is only valid with echo.
    return {**kept, "max_tokens": 1}


def forces_tool(route: Route, body: Body) -> bool:
    """Whether ``tool_choice`` makes the model call a tool, so that the answer is parsed as a call."""
    choice = body.get("tool_choice")
    if choice is None:
        return False
    if route.dialect == "chat":
        return choice == "required" or isinstance(choice, dict)
    return route.dialect == "messages" and isinstance(choice, dict) and choice.get("type") in ("any", "tool")


def _has_thinking_budget(body: Body) -> bool:
    """Whether ``thinking`` limits the reasoning of /v1/messages to a budget that the client's ``max_tokens`` exceeds.

    vLLM refuses such a budget next to prefill's ``max_tokens`` of 1, unless ``kv_transfer_params`` say
    ``do_remote_decode`` as NixlConnector's do (0.32, ``entrypoints/anthropic/protocol.py``,
    ``validate_thinking_budget``). ``enabled`` only sets a sampling limit. The other types are kept: ``disabled``
    changes the prompt (0.32, ``entrypoints/anthropic/serving.py``, ``_handle_thinking``). A budget that decode refuses
    is kept too, so that prefill refuses it before there is any KV.
    """
    thinking = body.get("thinking")
    if not isinstance(thinking, dict) or thinking.get("type") != "enabled":
        return False
    budget, limit = lax_int(thinking.get("budget_tokens")), lax_int(body.get("max_tokens"))
    return budget is not None and limit is not None and budget < limit


def _at_least_one(limit: Any) -> bool:
    """Whether pydantic's lax ``int`` may read ``limit`` as 1 or more; strings are left to decode."""
    if type(limit) is int:
        return bool(limit >= 1)
    if isinstance(limit, str):
        return True
    return isinstance(limit, (int, float)) and limit >= 1 and (isinstance(limit, int) or limit.is_integer())


def _at_most_one(limit: Any) -> bool:
    return type(limit) is int and limit <= 1


def lax_int(value: Any) -> int | None:
    """What vLLM's request models read in a number field (pydantic 2.14, lax ``int``); None where they refuse it."""
    if isinstance(value, str) and value.isascii():
        whole, point, zeros = value.strip().partition(".")
        if point and (not zeros or zeros.strip("0")):
            return None
        try:
            return int(whole)
        except ValueError:
            return None
    if isinstance(value, float):
        return int(value) if value.is_integer() else None
    return int(value) if isinstance(value, int) else None
