"""Responses to the client from an engine's response: its 4xx and 501 are passed on, 429 and 503 mean that it is busy,
other errors are the instance's failure."""

from __future__ import annotations

import logging
from typing import NamedTuple

from disagg_proxy.cluster.instance import Instance
from disagg_proxy.downstream.response_stream import ResponseStream
from disagg_proxy.errors import BadRequest, EngineBusy, EngineFailed, ProxyError, answer_of, retry_headers
from disagg_proxy.http1.headers import (
    ForwardedHeaders,
    ResponseHeaders,
    forwarded_response_headers,
    is_stream,
    value_of,
)
from disagg_proxy.openai.fields import MESSAGES, Route
from disagg_proxy.openai.prefill_answer import (
    Verdict,
    blames_client,
    blames_engine,
    error_message,
    prompt_tokens,
    read_prefill,
)
from disagg_proxy.openai.prepare import Prepared
from disagg_proxy.request_id import RequestId, hide
from disagg_proxy.telemetry.request_record import RequestRecord
from disagg_proxy.upstream import CompleteResponse

log = logging.getLogger(__name__)

BUSY_STATUSES = (429, 503)
"""Statuses of an API server that rejects a request before its engine has it, because it has too many. They say nothing
against its health."""

_BUSY_RETRY_AFTER = 2
"""Seconds for Retry-After where a busy instance names none."""


class ClientResponse(NamedTuple):
    """A response for the client. The body is complete, or a stream that is still arriving."""

    status: int
    headers: ForwardedHeaders
    body: bytes | ResponseStream


def forwarded(answer: CompleteResponse, request_id: RequestId) -> ClientResponse:
    """An instance's complete response as a response for the client."""
    headers = forwarded_response_headers(answer.headers, request_id)
    if more := retry_headers(answer.status):
        headers = ForwardedHeaders([*headers, *more])
    return ClientResponse(answer.status, headers, hide(request_id, answer.body))


def _from_error(error: ProxyError) -> ClientResponse:
    """An error of the proxy as a response for the client."""
    status, headers, body = answer_of(error)
    return ClientResponse(status, ForwardedHeaders(headers), body)


def over_context(
    route: Route, prepared: Prepared, decode: Instance, prefilled: CompleteResponse
) -> ClientResponse | None:
    """A 400 for a /v1/messages request whose prompt and token limit together exceed decode's context, else None.

    Decode would refuse it too, but vLLM 0.17 - 0.23 does so with a 500 on this route, which does not tell whether its
    engine has taken the KV.
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
    return _from_error(error)


def refusal(
    answer: CompleteResponse, leg: str, record: RequestRecord, request_id: RequestId, own_key: bool
) -> ClientResponse:
    """The response for the client to an engine's 4xx or 501, or to a 500 that should have been a 400.

    Args:
        leg: the leg's name for messages, such as "prefill".
        own_key: whether the proxy sent its own key (ENGINE_API_KEY), so that a 401 is not the client's mistake.

    Raises:
        EngineBusy: for 429 and 503.
        EngineFailed: for any other status.
    """
    if answer.status in BUSY_STATUSES:
        raise engine_busy(answer, leg)
    own_key_refused = answer.status in (401, 403) and own_key
    if answer.status == 500 and blames_client(answer.body):
        error = BadRequest(error_message(hide(request_id, answer.body)))
        return _from_error(error)
    if (400 <= answer.status < 500 or answer.status == 501) and not own_key_refused:
        return forwarded(answer, request_id)
    log.warning(
        "The %s leg was answered with status %d: %.300r", leg, answer.status, answer.body,
        extra={"request_id": record.request_id},
    )  # fmt: skip
    if own_key_refused:
        not_accepted = EngineFailed(f"The {leg} instance does not accept this proxy's ENGINE_API_KEY.")
        not_accepted.retry = False
        raise not_accepted
    detail = hide(request_id, error_message(answer.body).encode("utf-8", "replace")).decode()[:500]
    failure = EngineFailed(f"The {leg} instance failed with status {answer.status}{detail and ': ' + detail}")
    failure.retry_after = _retry_after(answer)
    if answer.status == 500:
        # vLLM answers some malformed requests so, on /v1/messages nearly all of them.
        clients_fault = False if record.route == MESSAGES.path else None
        failure.retry = True if blames_engine(answer.body) else clients_fault
    raise failure


def engine_busy(answer: CompleteResponse, leg: str) -> EngineBusy:
    """The error for an answer with one of :data:`BUSY_STATUSES`."""
    wait = _retry_after(answer) or _BUSY_RETRY_AFTER
    return EngineBusy(f"The {leg} instance is busy (status {answer.status}).", retry_after=wait)


def _retry_after(answer: CompleteResponse) -> int | None:
    """The seconds of its Retry-After, None without that."""
    wait = value_of(answer.headers, b"retry-after")
    return int(wait) if wait.isdigit() else None


def prefill_refusal(route: Route, answer: CompleteResponse, choices: int, request_id: str) -> CompleteResponse | None:
    """Prefill's refusal of a request, None if the prefill succeeded.

    Args:
        choices: the number of choices that the request asks for (``n``).
        request_id: the X-Request-Id of the response, for log lines.

    Raises:
        EngineFailed: a 200 without a completion.
    """
    if answer.status != 200:
        return answer
    read = read_prefill(route, answer.body, is_stream(answer.headers), choices)
    if read.verdict is Verdict.DONE:
        return None
    if read.verdict is Verdict.UNKNOWN:
        log.warning("Prefill answered 200 without a completion: %.300r", answer.body, extra={"request_id": request_id})
        raise EngineFailed("The prefill instance answered 200, but with no completion in it.")
    return CompleteResponse(read.status, ResponseHeaders(), read.body)
