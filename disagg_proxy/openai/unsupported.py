"""Requests that the proxy refuses with 400 although vLLM accepts them: they would stop or stall an instance, or return
wrong results.

Field by field, with the places in vLLM's source: docs/request-fields.md. What prefill or decode
refuse themselves is left to them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from disagg_proxy.errors import BadRequest, UnsupportedField
from disagg_proxy.openai.fields import Body, Route, forces_tool

_CHECKED_TOGETHER = frozenset(
    ("use_beam_search", "prompt_embeds", "truncate_prompt_tokens", "chat_template", "chat_template_kwargs")
)
"""Fields of :func:`_engine_requests` and :func:`_prompt_differs`."""

NO_RESPONSES = (
    "vLLM takes the engine's request id of this route from the body, which would stop an engine with P2pNcclConnector; "
    "use /v1/chat/completions, or engines of this project's connector (docs/connector.md)"
)

_STATEFUL = "needs one engine that keeps its state"

_EMBEDDINGS = ("prompt_embeds", "image_embeds", "audio_embeds")


def check(route: Route, body: Body) -> None:
    """Check for what a pair cannot serve.

    Raises:
        BadRequest: vLLM would fail too, but only after the prefill.
        UnsupportedField: only a single engine can serve it.
    """
    _limits(route, body)
    if not _CHECKED_TOGETHER.isdisjoint(body):
        _engine_requests(body)
        _prompt_differs(body)
    messages = body.get("messages")
    if messages is None:
        return
    for part in _content_parts(messages):
        _media(part)
        if route.dialect == "messages" and part.get("type") == "tool_use" and not part.get("id"):
            raise BadRequest("Every tool_use block needs its id.", param="messages")


def check_responses(body: Body) -> None:
    """:func:`check` for /v1/responses.

    Raises:
        UnsupportedField: only a single engine can serve it.
    """
    _one_engine(body)
    _prompt_differs(body)
    for part in _content_parts(body.get("input")):
        _media(part)


def _one_engine(body: Body) -> None:
    """Requests for /v1/responses that depend on what one engine stores, or that become several engine requests.

    A built-in tool makes vLLM send the engine one request for each call, all with the ``kv_transfer_params`` of the
    first (0.33, ``entrypoints/openai/responses/serving.py``, ``_generate_with_builtin_tools``).
    """
    for name in ("background", "previous_response_id"):
        if body.get(name) not in (None, False):
            raise UnsupportedField(f"{name} {_STATEFUL}.", param=name)
    tools = body.get("tools")
    for tool in tools if isinstance(tools, list) else ():
        if not isinstance(tool, dict) or tool.get("type") != "function":
            raise UnsupportedField(f"A built-in tool {_STATEFUL}; functions need none.", param="tools")
    if body.get("truncation", "disabled") != "disabled":
        # As a negative truncate_prompt_tokens (``build_tok_params``); null counts as "auto".
        raise UnsupportedField(
            "truncation depends on max_output_tokens, which is not the same for prefill and decode.", param="truncation"
        )
    given = body.get("input")
    for item in given if isinstance(given, list) else ():
        if isinstance(item, dict) and item.get("type") == "item_reference":
            raise UnsupportedField(f"An item_reference {_STATEFUL}.", param="input")


def _limits(route: Route, body: Body) -> None:
    most = body.get("max_tokens")
    least = body.get("min_tokens")
    if least is None:
        return
    if route.dialect == "chat":
        most = body.get("max_completion_tokens") or most
    if type(least) is int and type(most) is int and least > most:
        raise BadRequest(f"min_tokens ({least}) is above the limit of {most} tokens.", param="min_tokens")


def _engine_requests(body: Body) -> None:
    """Engine requests whose ids would carry no KV addresses, or prompts without token ids."""
    if body.get("use_beam_search") not in (None, False):
        raise UnsupportedField(
            "Beam search cannot run on separate prefill and decode instances: it makes engine requests of its own. "
            "Use n with a temperature.",
            param="use_beam_search",
        )
    if body.get("prompt_embeds") is not None:
        raise UnsupportedField(
            "prompt_embeds cannot be handed from prefill to decode; send text or token ids as prompt.",
            param="prompt_embeds",
        )


def _prompt_differs(body: Body) -> None:
    """Fields that may render a different prompt on decode than on prefill."""
    keep = body.get("truncate_prompt_tokens")
    if keep is not None and (type(keep) is not int or keep < 0):
        raise UnsupportedField(
            "truncate_prompt_tokens must be the number of tokens to keep: a negative one depends on max_tokens, "
            "which is not the same for prefill and decode.",
            param="truncate_prompt_tokens",
        )
    kwargs = body.get("chat_template_kwargs")
    if body.get("chat_template") is not None or (isinstance(kwargs, dict) and "chat_template" in kwargs):
        raise UnsupportedField(
            "A chat template of the request's own is rendered once for prefill and once for decode and may differ; "
            "give it to the instances with --chat-template.",
            param="chat_template",
        )


def wants_prompt_logprobs(route: Route, body: Body) -> bool:
    """Whether the answer contains logprobs of the prompt, which only prefill computes; decode returns garbage."""
    if body.get("prompt_logprobs") is not None:
        return True
    if not body.get("echo"):
        return False
    if route.dialect == "completions":
        return body.get("logprobs") is not None
    return route.dialect == "chat" and body.get("top_logprobs", 0) is not None


def prefill_can_answer(route: Route, body: Body) -> bool:
    """Whether the client requests a single token, so that prefill's answer is the client's."""
    if body.get("stream") or forces_tool(route, body):
        return False
    limits = [body.get("max_tokens"), body.get("max_completion_tokens") if route.dialect == "chat" else None]
    given = [limit for limit in limits if limit is not None]
    return bool(given) and all(type(limit) is int and limit <= 1 for limit in given)


def prompt_logprobs_refused(body: Body) -> UnsupportedField:
    """The 400 for prompt logprobs that prefill alone cannot answer."""
    param = "prompt_logprobs" if body.get("prompt_logprobs") is not None else "echo"
    return UnsupportedField(
        "Logprobs of the prompt (prompt_logprobs, or echo with logprobs) come from prefill alone and can be had with "
        "max_tokens 1 (completions: also 0 with echo), without stream and without a forced tool.",
        param=param,
    )


def _content_parts(messages: Any) -> Iterator[dict[str, Any]]:
    for message in messages if isinstance(messages, list) else ():
        if not isinstance(message, dict):
            continue
        # The second is that of a tool's result on /v1/responses.
        content = message.get("content", message.get("output"))
        for part in content if isinstance(content, list) else ():
            if isinstance(part, dict):
                yield part
                # Anthropic's tool results hold parts of their own.
                inner = part.get("content")
                yield from (p for p in inner if isinstance(p, dict)) if isinstance(inner, list) else ()


def _media(part: dict[str, Any]) -> None:
    """Media must be the same bytes on both legs."""
    kind = part.get("type")
    if kind in _EMBEDDINGS or any(name in part for name in _EMBEDDINGS):
        raise UnsupportedField(f"{kind} cannot be handed from prefill to decode.", param="messages")
    if part.get("uuid") is not None:
        raise UnsupportedField(
            "A uuid lets each instance answer for media from its own cache; send the media without it.",
            param="messages",
        )
    for url in _urls(part):
        if not url.lstrip().lower().startswith("data:"):
            raise UnsupportedField(
                "Media are fetched once by prefill and once by decode and may differ; send them as data: URLs.",
                param="messages",
            )


def _urls(part: dict[str, Any]) -> Iterator[str]:
    for name, value in part.items():
        if name.endswith("_url") and isinstance(value, str):
            yield value
        elif name.endswith("_url") or name == "source":
            url = value.get("url") if isinstance(value, dict) else None
            if isinstance(url, str):
                yield url
