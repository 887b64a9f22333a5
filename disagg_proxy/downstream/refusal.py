"""The client's answer when an instance did not answer 200: its 4xx passes, anything else is the instance's failure."""

from __future__ import annotations

import logging
from typing import NamedTuple

from disagg_proxy.cluster.instance import Instance
from disagg_proxy.downstream.response_stream import ResponseStream
from disagg_proxy.errors import BadRequest, EngineFailed, ProxyError, answer_of
from disagg_proxy.http1.headers import (
    ForwardedHeaders,
    ResponseHeaders,
    forwarded_response_headers,
    is_stream,
    value_of,
)
from disagg_proxy.openai.fields import MESSAGES, Route
from disagg_proxy.openai.prefill_answer import Verdict, error_message, is_over_context, prompt_tokens, read_prefill
from disagg_proxy.openai.prepare import Prepared
from disagg_proxy.openai.request_id_rewriter import hide
from disagg_proxy.request_id import RequestId
from disagg_proxy.upstream import CompleteResponse

log = logging.getLogger(__name__)


class Refusal(NamedTuple):
    """What the client gets: status, headers, and a body that is whole or still coming."""

    status: int
    headers: ForwardedHeaders
    body: bytes | ResponseStream


def whole(answer: CompleteResponse, request_id: RequestId) -> Refusal:
    """An instance's whole answer for the client."""
    return Refusal(answer.status, forwarded_response_headers(answer.headers, request_id), hide(request_id, answer.body))


def _worded(error: ProxyError) -> Refusal:
    """An error in the proxy's own words as the client's answer."""
    status, headers, body = answer_of(error)
    return Refusal(status, ForwardedHeaders(headers), body)


def over_context(route: Route, prepared: Prepared, decode: Instance, prefilled: CompleteResponse) -> Refusal | None:
    """The refusal of a /v1/messages request whose prompt and limit together exceed decode's context, else None.

    Decode would refuse it too, but vLLM 0.17 - 0.23 does so with a 500 on this route, after which nobody can tell
    whether its engine has taken the KV.
    """
    if route is not MESSAGES:
        return None
    model = prepared.model or decode.default_model
    longest = decode.models.get(model or "", {}).get("max_model_len")
    tokens = prompt_tokens(prefilled.body)
    if type(longest) is not int or tokens + prepared.limit <= longest:
        return None
    error = BadRequest(
        f"This model's maximum context length is {longest} tokens, but the prompt has {tokens} and max_tokens asks "
        f"for {prepared.limit}.",
        param="max_tokens",
    )
    return _worded(error)


def refusal(answer: CompleteResponse, leg: str, request_id: RequestId, own_key: bool) -> Refusal:
    """The engine's own 4xx, for the client, and what should have been one.

    Args:
        own_key: whether the proxy's own key went to the instance, so that a 401 is not the client's doing.

    Raises:
        EngineFailed: any other status.
    """
    own_key_refused = answer.status in (401, 403) and own_key
    if answer.status == 500 and is_over_context(answer.body):
        # On /v1/messages vLLM 0.17 - 0.23 calls this mistake of the client's an internal error.
        error = BadRequest(error_message(hide(request_id, answer.body)))
        return _worded(error)
    if 400 <= answer.status < 500 and not own_key_refused:
        return whole(answer, request_id)
    log.warning("The %s leg of %s got %d: %.300r", leg, request_id.public, answer.status, answer.body)
    if own_key_refused:
        raise EngineFailed(f"The {leg} instance does not accept this proxy's ENGINE_API_KEY.")
    said = hide(request_id, error_message(answer.body).encode("utf-8", "replace")).decode()[:500]
    failure = EngineFailed(f"The {leg} instance failed with status {answer.status}{said and ': ' + said}")
    if (wait := value_of(answer.headers, b"retry-after")).isdigit():
        failure.retry_after = int(wait)
    raise failure


def prefill_refusal(route: Route, answer: CompleteResponse, choices: int) -> CompleteResponse | None:
    """The part of prefill's answer that refuses, None when prefill did its work.

    Raises:
        EngineFailed: a 200 that is no answer.
    """
    if answer.status != 200:
        return answer
    read = read_prefill(route, answer.body, is_stream(answer.headers), choices)
    if read.verdict is Verdict.DONE:
        return None
    if read.verdict is Verdict.UNKNOWN:
        log.warning("Prefill's 200 is no answer: %.300r", answer.body)
        raise EngineFailed("The prefill instance answered 200, but with no completion in it.")
    return CompleteResponse(read.status, ResponseHeaders(), read.body)
