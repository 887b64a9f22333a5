"""What each field of a generation request becomes on the two legs. The reasons, field by field: docs/request-fields.md.

Principle: prefill gets the client's body with as few changes as possible, so that it refuses whatever decode would
refuse, before any KV exists; but it must generate exactly one token per choice from exactly decode's prompt.
Fields that are not named here pass untouched.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Body = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Route:
    """One generation route.

    Attributes:
        path: the same on the proxy and on the instances.
        limits: fields that bound the number of generated tokens; prefill gets 1 in each.
    """

    path: str
    limits: tuple[str, ...]


COMPLETIONS = Route("/v1/completions", ("max_tokens",))
CHAT = Route("/v1/chat/completions", ("max_tokens", "max_completion_tokens"))
MESSAGES = Route("/v1/messages", ("max_tokens",))
ROUTES = (COMPLETIONS, CHAT, MESSAGES)

STRIPPED = ("kv_transfer_params", "request_id")
"""Never reach an instance: they steer the KV transfer, and they are the proxy's."""

REMOVED_ON_PREFILL = ("min_tokens", "stream_options")
"""Valid only together with what prefill must not have: more than one token, a stream."""


def _is_set(value: Any) -> bool:
    return value is not None and value is not False


@dataclass(frozen=True, slots=True)
class Refusal:
    """A field that is refused with 400 when ``applies`` to the body."""

    field: str
    applies: Callable[[Body], bool]
    message: str


REFUSALS: tuple[Refusal, ...] = (
    Refusal(
        "prompt_logprobs",
        lambda body: _is_set(body.get("prompt_logprobs")),
        "prompt_logprobs cannot be served by separate prefill and decode instances: decode does not compute the "
        "prompt. Leave the field out, or ask an undivided vLLM.",
    ),
    Refusal(
        "echo",
        lambda body: _is_set(body.get("echo")) and _is_set(body.get("logprobs")),
        "echo together with logprobs asks for logprobs of the prompt, which separate prefill and decode instances "
        "cannot give. Leave out one of the two.",
    ),
    Refusal(
        "prompt_embeds",
        lambda body: _is_set(body.get("prompt_embeds")),
        "prompt_embeds cannot be handed from prefill to decode: the KV connector needs token ids. Send text or "
        "token ids as prompt.",
    ),
    Refusal(
        "use_beam_search",
        lambda body: _is_set(body.get("use_beam_search")),
        "Beam search cannot be served by separate prefill and decode instances: it makes requests of its own inside "
        "the engine, whose ids carry no KV addresses. Leave the field out and use n with a temperature.",
    ),
    Refusal(
        "truncate_prompt_tokens",
        lambda body: isinstance(body.get("truncate_prompt_tokens"), int) and body["truncate_prompt_tokens"] < 0,
        "A negative truncate_prompt_tokens makes the prompt depend on max_tokens, which prefill and decode get "
        "different values of. Give the number of tokens to keep.",
    ),
)

PREFILL_VALUES: Mapping[str, Any] = {"stream": False}
