"""The life of a client's connection: refusals, timeouts, limits and shutdown. ``client_connection`` reads its requests.

1. **A refusal is the last response.** Earlier requests are answered first, in order. The proxy then half-closes the
   connection and discards what still arrives for 2 s (lingering close, RFC 9112, 9.6): closing at once would reset the
   connection, and the client could lose the response. Nothing after the refusal is read as a request. So it is with
   every last response that precedes the end of its request (``closing_cycle``).
2. **Timeouts**: a head has HEADER_TIMEOUT from the opening of the connection, or from its own first byte; the rest of a
   body that was answered early has BODY_TIMEOUT (Quart applies it to bodies it reads); an idle connection has the
   keep-alive time; a client that reads nothing of its response has SEND_TIMEOUT, at most twice. Each connection has one
   timer, which is restarted only when it fires or must fire earlier.
3. **Idle connections are closed without lingering**, because there is no response to lose. A request that crosses the
   close on the wire sees a reset, and is safe to repeat (RFC 9112, 9.5).
4. **Connections** above half of the process's file descriptor limit get 503; the other half is for the instances.
5. **Shutdown**: from its beginning, a request that is not received completely gets 503 on kept and new connections, and
   ends its connection (rule 1).
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any, cast

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from disagg_proxy.config import Config
from disagg_proxy.errors import BodyTimeout, HeadTimeout, ProxyError, Unavailable, answer_of, shutting_down
from disagg_proxy.http1.head_writer import header_lines, status_line
from disagg_proxy.http1.headers import Headers, request_id_headers, request_id_of
from disagg_proxy.runtime.write_coalescing import WriteCoalescer
from disagg_proxy.server.asgi.exchange_scope import ENDLESS
from disagg_proxy.server.asgi.request import scope_request_id
from disagg_proxy.server.closing_cycle import ClosingCycle
from disagg_proxy.server.fast_path import FastPathRequest
from disagg_proxy.services import Services

log = logging.getLogger(__name__)

_LINGER = 2.0
"""Seconds for which data is discarded after a refusal."""
_NEVER = float("inf")

NOTHING, HEAD, BODY = range(3)
"""The part of a message that has been received incompletely."""


class ConnectionLifecycle(HttpToolsProtocol):
    """Refusals, timeouts and shutdown of one connection; ``client_connection.ClientConnection`` reads its requests."""

    limits: Config
    services: Services
    max_connections = 0
    cycle: RequestResponseCycle | FastPathRequest  # type: ignore[assignment]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._part = NOTHING
        self._current: RequestResponseCycle | FastPathRequest | None = None  # the exchange that is answered now
        self._refusal: ProxyError | None = None
        self._refused_id: Headers = []  # the request id of what is refused
        self._discarding = False  # there is a refusal: nothing more is read
        self._lingering = False  # the last response has been sent
        self._timer: asyncio.TimerHandle | None = None
        self._deadline = 0.0
        self._overdue = False  # the deadline had passed at the previous check
        self._unsent: float = _NEVER  # size of the write buffer at the previous check; infinite without a check

    # -- called by the transport and by exchanges

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        # WriteCoalescer has every method of a transport that is used here and in uvicorn.
        super().connection_made(cast(asyncio.Transport, WriteCoalescer(transport, self.services.write_batch)))
        self._set_timer(self.limits.header_timeout)
        if 0 < self.max_connections < len(self.connections):
            self._refuse(Unavailable("Too many clients are connected.", retry_after=3))

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        # uvicorn notifies only the newest request, which may still be waiting in the pipeline.
        if self._current is not None and not self._current.response_complete:
            _notify_disconnect(self._current)
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        if isinstance(self._current, FastPathRequest):
            self._current.pause()
        self._unsent = self.transport.get_write_buffer_size()
        self._set_timer(self.limits.send_timeout)

    def resume_writing(self) -> None:
        self._unsent = _NEVER
        super().resume_writing()
        if isinstance(self._current, FastPathRequest):
            self._current.resume()

    def on_response_complete(self) -> None:
        if isinstance(self._current, ClosingCycle) and not self.transport.is_closing():
            self.server_state.total_requests += 1
            self._linger()
            return
        if self.pipeline:
            self._current = self.pipeline[-1][0]
            super().on_response_complete()
            return
        # What uvicorn does, without starting a timer for each request.
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            return
        self.flow.resume_reading()
        if self._discarding and not self._lingering:
            self._send_refusal()
        else:
            limits = self.limits
            self._set_timer((self.timeout_keep_alive, limits.header_timeout, limits.body_timeout)[self._part])

    def _answering(self) -> bool:
        return self._current is not None and not self._current.response_complete

    # -- refusals

    def _refuse(self, error: ProxyError) -> None:
        """Read nothing more, and send ``error`` after the responses to earlier requests."""
        self._discarding = True
        self._refusal = error
        self._refused_id = self._id_of_incomplete()
        request_id = self._refused_id[0][1].decode()
        log.debug("Refused a client's data: %s", error.message, extra={"request_id": request_id})
        if self._part != BODY:
            if not self._answering():
                self._send_refusal()
        elif self.pipeline:
            self.pipeline.popleft()
        elif self.cycle.response_started:
            self.transport.close()
        else:
            _notify_disconnect(self.cycle)
            self._send_refusal()
        self._part = NOTHING

    def _id_of_incomplete(self) -> Headers:
        """The request id of the message that has been received incompletely: a new one where its head names none."""
        if self._part == NOTHING:
            return request_id_headers(request_id_of([]), b"")
        if self._part == HEAD:
            return request_id_headers(request_id_of(self.headers), self.url)
        if isinstance(self.cycle, FastPathRequest):
            return self.cycle.request_id_headers
        return request_id_headers(scope_request_id(self.cycle.scope), self.url)

    def _send_refusal(self) -> None:
        """Send the refusal as the last response."""
        assert self._refusal is not None
        status, headers, body = answer_of(self._refusal)
        framing = [(b"content-length", b"%d" % len(body)), (b"connection", b"close")]
        self.transport.write(status_line(status) + header_lines(headers + self._refused_id + framing) + b"\r\n" + body)
        self._linger()

    def _linger(self) -> None:
        """Half-close, and discard what still arrives, so that the client can read the last response."""
        self._discarding = self._lingering = True
        self._part = NOTHING
        self.transport.write_eof()
        self.flow.resume_reading()
        self._set_timer(_LINGER)

    # -- shutdown

    def begin_shutdown(self) -> None:
        """Refuse a request that is incomplete; otherwise close the connection after the running response."""
        if self._discarding:
            return
        if self._part:
            self._refuse(shutting_down())
        elif self.cycle is not None and self.flow.write_paused and _is_endless(self.cycle):
            # The client reads nothing, and the shutdown would wait for it.
            self.transport.abort()
        elif self.cycle is not None:
            close_after(self.cycle)

    def shutdown(self) -> None:
        # A refused client keeps its time to read the response.
        if not self._discarding:
            super().shutdown()

    def abort_if_blocked(self) -> None:
        """Close the connection now if its client does not read."""
        if self.flow.write_paused:
            self.transport.abort()

    # -- timeouts

    def _set_timer(self, seconds: float) -> None:
        """Check the connection in ``seconds``, and not before."""
        self._deadline = self.loop.time() + seconds
        self._overdue = False
        if self._timer is None:
            self._timer = self.loop.call_at(self._deadline, self._check_timeouts)
        elif self._timer.when() > self._deadline:
            self._timer.cancel()
            self._timer = self.loop.call_at(self._deadline, self._check_timeouts)

    def _check_timeouts(self) -> None:
        self._timer = None
        left = self._deadline - self.loop.time()
        if left > 0.001:
            self._set_timer(left)
        elif not self._overdue:
            # Decide after one more poll of the sockets. After a slow event loop iteration a timer can fire before data
            # is read that arrived in time, and closing with unread data would reset the connection.
            self._overdue = True
            self._timer = self.loop.call_at(self._deadline, self._check_timeouts)
        elif self._lingering or self._is_blocked():
            self.transport.abort()
        elif self._part == BODY and isinstance(self.cycle, FastPathRequest):
            self._refuse(BodyTimeout("The request body did not arrive in time (BODY_TIMEOUT)."))
        elif self._unsent != _NEVER or self._answering():
            self._set_timer(self.limits.send_timeout)
        elif self._part == HEAD:
            self._refuse(HeadTimeout("The request's headers did not arrive in time (HEADER_TIMEOUT)."))
        else:
            self.transport.close()
            self._set_timer(self.limits.send_timeout)

    def _is_blocked(self) -> bool:
        """Whether the client has read nothing since the previous check, although there was data to read."""
        unsent = self.transport.get_write_buffer_size()
        before = self._unsent
        # The buffer's size shows progress only while nothing is added to it.
        unchanged = self.transport.is_closing() or self.flow.write_paused or not self._answering()
        self._unsent = unsent if unsent and unchanged else _NEVER
        return unchanged and 0 < before <= unsent


def _notify_disconnect(cycle: RequestResponseCycle | FastPathRequest) -> None:
    """End an exchange whose client has left, or will not get its response."""
    if isinstance(cycle, FastPathRequest):
        cycle.on_disconnect()
        return
    cycle.disconnected = True
    cycle.waiting_for_100_continue = False
    cycle.message_event.set()


def _is_endless(cycle: RequestResponseCycle | FastPathRequest) -> bool:
    """Whether its response has no end of its own, such as the live page's feed."""
    return isinstance(cycle, RequestResponseCycle) and ENDLESS in cycle.scope


def close_after(cycle: RequestResponseCycle | FastPathRequest) -> None:
    """Close the connection after this response, and announce it if its head has not been sent."""
    cycle.keep_alive = False
    # uvicorn announces it only in newer versions.
    cycle.default_headers = [*cycle.default_headers, (b"connection", b"close")]
