"""The client's side of one request: delivers one response or one error, and ends the request if the client leaves."""

from __future__ import annotations

from typing import Protocol

from disagg_proxy.cluster.choice import Way
from disagg_proxy.downstream.refusal import ClientResponse
from disagg_proxy.downstream.response_stream import ResponseStream
from disagg_proxy.errors import ProxyError
from disagg_proxy.http1.headers import Headers
from disagg_proxy.request_id import new_own_id
from disagg_proxy.runtime.background import Background
from disagg_proxy.runtime.inline_coroutine import InlineCoroutine
from disagg_proxy.telemetry.request_record import RequestRecord


class Downstream(Protocol):
    """Writes to the client's connection. One of the two methods is called, at most once."""

    def respond(self, outcome: ClientResponse) -> None:
        """Send a response. A :class:`ResponseStream` as its body must be piped or iterated."""

    def refuse(self, error: ProxyError) -> None:
        """Send an error response."""


class Reply:
    """Delivers the outcome of one request, and ends the request when its client leaves.

    The server creates it, passes it to the coordinator, and must call :meth:`leave` when the client's HTTP exchange
    has ended in any way.

    Args:
        client_id: the client's own X-Request-Id, None without one.
        own_id: the proxy's id of the request; empty for a new one.

    Attributes:
        own_id: 32 hexadecimal digits, with which the id in the response body begins.
        request_id: the X-Request-Id of the response: the client's own, or else the proxy's.
        open: the client still waits for a response or an error.
        gone: the client's exchange has ended.
        abortable: whether the request ends when the client leaves before the first byte of its response. An attempt
            clears it while an abort would leave KV on an engine.
        record: the request's record; None until its body is complete.
        headers: headers for the response, whatever it will be, besides those of the outcome; None for none.
    """

    __slots__ = (
        "_background", "_downstream", "_stream", "_work", "abortable", "gone", "headers", "open", "own_id", "record",
        "request_id",
    )  # fmt: skip

    def __init__(self, downstream: Downstream, client_id: str | None = None, own_id: str = "") -> None:
        self.own_id: str = own_id or new_own_id()
        self.request_id: str = client_id or self.own_id
        self._downstream: Downstream | None = downstream
        self._background: Background | None = None
        self._stream: ResponseStream | None = None
        self._work: InlineCoroutine | None = None
        self.abortable = True
        self.gone = False
        self.open = True
        self.record: RequestRecord | None = None
        self.headers: Headers | None = None

    def begin(self, record: RequestRecord, work: InlineCoroutine, background: Background) -> None:
        """Attach ``work``, which serves the request. The caller starts it."""
        self.record, self._work, self._background = record, work, background

    @property
    def served_by(self) -> str:
        """The engines of the last attempt as the value of X-Served-By; empty before there was one."""
        record = self.record
        if record is None or record.decode is None:
            return ""
        if record.way == Way.PREFILL_ALONE.value:
            return f"prefill={record.decode}"
        decode = f"decode={record.decode}"
        return decode if record.prefill is None else f"prefill={record.prefill}, {decode}"

    def send(self, outcome: ClientResponse) -> bool:
        """Deliver a response. Returns False, and closes a streamed body, if the client no longer waits."""
        downstream = self._take()
        body = outcome.body
        if downstream is None:
            if not isinstance(body, bytes):
                body.close()
            return False
        if self.record is not None:
            self.record.status = outcome.status
        if not isinstance(body, bytes):
            self._stream = body
        downstream.respond(outcome)
        return True

    def fail(self, error: ProxyError) -> None:
        """Deliver an error, if the client still waits."""
        downstream = self._take()
        if downstream is not None:
            if self.record is not None:
                self.record.fail(error)
            downstream.refuse(error)

    def _take(self) -> Downstream | None:
        downstream, self._downstream = self._downstream, None
        self.open = False
        return downstream

    def allow_abort(self) -> None:
        """Make the request abortable, and end it if its client has left."""
        self.abortable = True
        if self.gone and self._work is not None:
            work, self._work = self._work, None
            work.cancel()

    def leave(self) -> None:
        """The client's HTTP exchange has ended, completed or not. Further calls have no effect."""
        if self.gone:
            return
        self.gone = True
        waited = self._take() is not None
        work, background, record = self._work, self._background, self.record
        self._work = None
        if work is not None and background is not None:
            background.detach(work)
            if self._stream is not None:
                self._stream.close()
            elif waited and self.abortable:
                work.cancel()
            elif waited:
                self._work = work
        if record is not None:
            record.end()
