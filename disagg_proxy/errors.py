"""Every way a request can end without an answer: one typed tree, one JSON shape.

Each error has its HTTP status, OpenAI's ``type`` and ``code``, seconds for ``Retry-After`` where waiting helps, and
whether the same request may succeed later (``X-Should-Retry``). :func:`answer_of` is the only place that builds an
error response. Messages say what the reader can change.
"""

from __future__ import annotations

import json


class ProxyError(Exception):
    """Base class: a failure that the client gets as OpenAI-style JSON.

    Args:
        message: one sentence for the log of the client.
        param: the request field at fault, if one is.
        retry_after: seconds after which the same request may succeed.

    Attributes:
        retry: whether the same request may succeed later, sent as X-Should-Retry; None where that is not known. The
            clients of OpenAI and Anthropic obey it (openai 3.57 and anthropic 2.14, ``_base_client.py``,
            ``_should_retry``); without it they repeat 408, 409, 429 and every 5xx.
    """

    status = 500
    type = "server_error"
    code: str | None = "internal_error"
    retry: bool | None = None

    def __init__(self, message: str, *, param: str | None = None, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after = retry_after

    def headers(self) -> dict[str, str]:
        """Response headers that belong to this error."""
        found = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        if self.retry is not None:
            found[_RETRY_HEADER] = "true" if self.retry else "false"
        return found

    def body(self) -> bytes:
        """The OpenAI error object, with Anthropic's outer ``type`` so that both clients can read it."""
        return error_body(self.message, self.type, self.param, self.code)


def error_body(message: str, kind: str, param: str | None, code: str | None) -> bytes:
    """Encode one error the way OpenAI's and Anthropic's clients both understand."""
    error = {"message": message, "type": kind, "param": param, "code": code}
    return json.dumps({"type": "error", "error": error}, ensure_ascii=False).encode("utf-8", "replace")


class ClientError(ProxyError):
    """The request itself must change. Never retried, never counted against an instance."""

    retry: bool | None = False
    status = 400
    type = "invalid_request_error"
    code = "invalid_request"


class BadRequest(ClientError):
    """The body or a field of it cannot be served."""


class UnsupportedField(ClientError):
    """A field that vLLM accepts but that would harm a prefill or decode instance, or come back wrong."""

    code = "unsupported_parameter"


class WrongKey(ClientError):
    """The API key is missing or differs from the configured one."""

    status = 401
    type = "authentication_error"
    code = "invalid_api_key"

    def headers(self) -> dict[str, str]:
        return {**super().headers(), "WWW-Authenticate": "Bearer"}


class NotPermitted(ClientError):
    """The API key is valid, but does not open this path."""

    status = 403
    type = "permission_error"
    code = "permission_denied"


class RateLimited(ClientError):
    """The API key has reached one of its limits per minute.

    Args:
        kind: the limit, ``requests`` or ``tokens``: OpenAI's ``type`` of this error; Anthropic's is rate_limit_error.
    """

    status = 429
    code = "rate_limit_exceeded"
    retry = True

    def __init__(self, message: str, kind: str, anthropic: bool, retry_after: int) -> None:
        super().__init__(message, retry_after=max(1, retry_after))
        self.kind = kind
        self.type = "rate_limit_error" if anthropic else kind


class NotFound(ClientError):
    """No such path."""

    status = 404
    type = "not_found_error"
    code = "not_found"


class UnknownModel(NotFound):
    """No instance serves the requested model."""

    code = "model_not_found"

    def __init__(self, model: str, known: list[str]) -> None:
        self.model = model
        there = ", ".join(known) or "none yet"
        super().__init__(f"The model {model!r} does not exist here. Models that exist: {there}.", param="model")


class UnknownInstance(NotFound):
    """An operator named an instance that the proxy does not know."""

    code = "instance_not_found"

    def __init__(self, address: str, known: list[str]) -> None:
        there = ", ".join(known) or "none yet"
        super().__init__(f"There is no instance {address!r}. Instances that are known: {there}.", param="instance")


class MethodNotAllowed(ClientError):
    """The path exists, but not for this HTTP method; Allow lists the methods that it has (RFC 9110, 15.5.6)."""

    status = 405
    code = "method_not_allowed"

    def __init__(self, allowed: list[str]) -> None:
        self.allowed = ", ".join(sorted(allowed))
        super().__init__(f"This path does not take that HTTP method, only {self.allowed}.")

    def headers(self) -> dict[str, str]:
        return {**super().headers(), "Allow": self.allowed}


class BodyTimeout(ClientError):
    """The client took too long to send its body."""

    retry = None
    status = 408
    code = "request_timeout"


class BodyTooLarge(ClientError):
    """The body is longer than the configured maximum."""

    status = 413
    code = "request_too_large"


class UnsupportedEncoding(ClientError):
    """The body is compressed, which vLLM does not read; Accept-Encoding says what is read (RFC 9110, 12.5.3)."""

    status = 415
    code = "unsupported_media_type"

    def headers(self) -> dict[str, str]:
        return {**super().headers(), "Accept-Encoding": "identity"}


class HeadTooLarge(ClientError):
    """The request line and the headers exceed a limit."""

    status = 431
    code = "headers_too_large"


class HeadTimeout(ClientError):
    """The client took too long to send its request line and headers."""

    retry = None
    status = 408
    code = "request_timeout"


class UnsupportedVersion(ClientError):
    """Not HTTP/1.0 or HTTP/1.1."""

    status = 505
    code = "http_version_not_supported"


class NotServed(ClientError):
    """A vLLM route that cannot run on a prefill/decode pair."""

    status = 501
    type = "not_implemented_error"
    code = "not_implemented"


class Unavailable(ProxyError):
    """Nothing can serve the request now, but something may soon."""

    retry: bool | None = True
    status = 503
    type = "service_unavailable_error"
    code = "service_unavailable"


def shutting_down() -> Unavailable:
    """The error of requests that arrive, or still wait, while the proxy shuts down."""
    return Unavailable("The proxy is shutting down.", retry_after=5)


class NoPair(Unavailable):
    """No ready prefill and decode that serve the model together.

    ``drained`` is True when there would be a pair but for an operator's drain, which ends.
    """

    code = "no_pair"

    def __init__(self, missing: list[str], *, drained: bool = False) -> None:
        super().__init__("No prefill/decode pair can serve this: " + "; ".join(missing) + ".", retry_after=3)
        self.drained = drained


class Overloaded(Unavailable):
    """The queue is full, or a request has waited in it for too long."""

    status = 429
    type = "rate_limit_error"
    code = "overloaded"

    def __init__(self, message: str) -> None:
        super().__init__(message, retry_after=2)


class EngineError(ProxyError):
    """An instance failed to process its leg. Another one may succeed, or the same one when it is back."""

    retry: bool | None = True
    status = 502
    type = "upstream_error"
    code = "engine_error"


class EngineUnreachable(EngineError):
    """No connection to an instance. ``refused``: no process listens there; otherwise the connection timed out."""

    code = "engine_unreachable"

    def __init__(self, message: str, *, refused: bool = True) -> None:
        super().__init__(message)
        self.refused = refused


class EngineDisconnected(EngineError):
    """An instance closed the connection before it answered.

    ``unsent`` is True when the request cannot have been received, so that sending it again is safe even for decode.
    ``reused`` is True when it happened on a kept connection that an earlier request had used.
    """

    code = "engine_disconnected"

    def __init__(self, message: str, *, unsent: bool, reused: bool) -> None:
        super().__init__(message)
        self.unsent = unsent
        self.reused = reused


class EngineFailed(EngineError):
    """An instance answered with a server error, or with an invalid response."""

    code = "engine_failed"


class EngineBusy(EngineError):
    """An instance rejects requests because its queue is full (vLLM 0.33: ``--max-num-queued-reqs``)."""

    status = 503
    type = "service_unavailable_error"
    code = "engine_busy"


class EngineDeadline(ProxyError):
    """An instance did not answer within its deadline."""

    status = 504
    type = "timeout_error"
    code = "engine_deadline"


class EngineFrozen(EngineDeadline):
    """An instance is stalled, although it answers /health. Further requests go to others."""

    retry: bool | None = True
    code = "engine_frozen"


class StreamCut(Exception):
    """Decode failed after its answer had begun: the client's connection is closed without the terminating chunk.

    Not a :class:`ProxyError`, since the status has been sent.

    Attributes:
        error: the failure of decode, which STREAM_ERROR_EVENT sends before the cut.
    """

    def __init__(self, error: ProxyError) -> None:
        super().__init__(error.message)
        self.error = error


_RETRY_HEADER = "X-Should-Retry"


def retry_headers(status: int) -> list[tuple[bytes, bytes]]:
    """Headers to add to an instance's own answer with ``status``: 501 is the request's fault although it is a 5xx."""
    return [(_RETRY_HEADER.lower().encode(), b"false")] if status == NotServed.status else []


def answer_of(error: ProxyError) -> tuple[int, list[tuple[bytes, bytes]], bytes]:
    """Status, lower-case headers and body of an error response, without its request id."""
    headers = {"content-type": "application/json", **error.headers()}
    return error.status, [(name.lower().encode(), value.encode()) for name, value in headers.items()], error.body()
