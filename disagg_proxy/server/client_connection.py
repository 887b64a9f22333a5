"""The rules of a client's connection: what of HTTP/1.1 is taken, for how long, and how the rest is refused.

On top of uvicorn's protocol and the parser of httptools (llhttp, strict), which refuses by itself: Content-Length
together with Transfer-Encoding, a second Content-Length, one that is no plain number, malformed chunks, bare CR or LF,
obs-fold, white space before a colon, and control characters.

1. **Refused too**, since another server could read it differently: a Transfer-Encoding other than ``chunked`` once
   in HTTP/1.1, no Host, more than one or a malformed one, a target that is not a path (absolute-form, ``*`` except
   for OPTIONS, a fragment), CONNECT, versions other than 1.0 and 1.1.
2. **One refusal, then the end.** Requests that came before it are answered first, in order. The connection is then
   shut for writing and what still arrives is thrown away for a moment: closing at once would reset the connection,
   and the client could lose the answer. Nothing after the refusal is read as a request.
3. **Upgrade is ignored** (RFC 9110, 7.8). llhttp stops reading at it, so that the body would be taken for the next
   request; the head is parsed once more without it.
4. **Trailers** are dropped. They must not become headers (RFC 9110, 6.5.1), of which the guard has judged already.
5. **Size**: a head has MAX_HEADER_BYTES and 100 headers; the framing of a chunked body, trailers included, has as many
   bytes, and 16 more for every byte of the body; 128 requests may wait in the pipeline of one connection, beyond 8
   of which nothing more is read.
6. **Time**: a head has HEADER_TIMEOUT from the connection's opening, or from its own first byte; the rest of a body
   that was answered early has BODY_TIMEOUT (one that is waited for is timed by Quart); an idle connection has the
   keep-alive time; a client that takes nothing of its answer has SEND_TIMEOUT, at most twice. There is one timer for
   each connection, which is moved only when it fires.
7. **Connections** above half of the process's file limit get 503: the other half is for the instances.
8. **Expect: 100-continue** ends the connection after the answer: a client whose body was refused may either send it
   or go on with the next request.
9. **The end**: once the proxy is stopping, a request that is not here whole gets 503, on kept and on new connections,
   and a refusal ends its connection (rule 2). Only what tells of the proxy itself is still answered.

A generation request whose head passed all that before (``http1/head_cache``), with nothing in front of it, does not
pass the parser again; its body is counted here.
"""

from __future__ import annotations

import asyncio
import logging
import re
import resource
from collections.abc import Callable
from typing import Any, NoReturn, cast

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from disagg_proxy.config import Config
from disagg_proxy.coordinator.head import RequestHead, read_head
from disagg_proxy.errors import (
    BadRequest,
    BodyTimeout,
    HeadTimeout,
    HeadTooLarge,
    ProxyError,
    Unavailable,
    UnsupportedVersion,
    answer_of,
    shutting_down,
)
from disagg_proxy.http1.head_cache import HeadCache
from disagg_proxy.http1.head_writer import header_lines, status_line
from disagg_proxy.http1.headers import Headers, value_of
from disagg_proxy.openai.fields import Route
from disagg_proxy.runtime.shutdown import Shutdown
from disagg_proxy.runtime.write_coalescing import WriteCoalescer
from disagg_proxy.server.asgi.auth import KeyCheck
from disagg_proxy.server.asgi.exchange_scope import WATCHES
from disagg_proxy.server.fast_path import ROUTE_OF, FastPathRequest
from disagg_proxy.server.generation import check_encoding
from disagg_proxy.services import Services

log = logging.getLogger(__name__)

_MAX_HEADERS = 100
_MAX_PIPELINED = 128
_READ_AHEAD = 8
_FRAMING_PER_BYTE = 16
_LINGER = 2.0
"""Seconds for which a refused client's data is thrown away."""

_HOST = re.compile(
    rb"(?:(?:L{1,63}\.)*L{1,63}\.?)?(?::(?:L|[.:])*)?".replace(b"L", rb"[\w~!$&'()*+,;=%\[\]-]"), re.ASCII
)
"""Any name or address, with a port. Werkzeug cannot take labels that are empty or longer than 63."""
_NEVER = float("inf")

_NOTHING, _HEAD, _BODY = range(3)
"""Of which part of a message some was received, and some was not."""


_WHILE_STOPPING = frozenset({b"/health", b"/livez", b"/stats", b"/metrics"})


def protocol(config: Config, parts: Services) -> type[Protocol]:
    """The protocol class for uvicorn, with the limits of ``config``."""

    class Limited(Protocol):
        limits = config
        services = parts
        shutdown_state = parts.shutdown
        guard = KeyCheck(config)
        heads = HeadCache()
        max_connections = resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2

    return Limited


class Protocol(HttpToolsProtocol):
    """One connection of a client."""

    limits: Config
    services: Services
    shutdown_state: Shutdown
    guard: KeyCheck
    heads: HeadCache[tuple[RequestHead, bool]]
    max_connections = 0
    _date: tuple[Headers, bytes] = ([], b"")
    cycle: RequestResponseCycle | FastPathRequest  # type: ignore[assignment]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._part = _NOTHING
        self._left = 0  # bytes of a body that does not pass the parser
        self._first: bytes | None = None  # data that begins with a head
        self._fed = 0  # bytes given to the parser in the current call
        self._seen = 0  # bytes received in calls that held some of this message's head
        self._spent = 0  # bytes received in calls that held nothing else, less what they are good for
        self._host = self._framed = self._chunked = self._upgrading = False
        self._length = 0  # of the body, where it was given
        self._current: RequestResponseCycle | FastPathRequest | None = None
        self._whole: FastPathRequest | None = None  # its body came in the present call
        self._refusal: ProxyError | None = None
        self._deaf = False  # there is a refusal: nothing is read any more
        self._said = False  # it was sent
        self._timer: asyncio.TimerHandle | None = None
        self._deadline = 0.0
        self._unsent: float = _NEVER  # bytes that the client had not taken at the last look

    # The connection

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        # It has all of a transport that is used here and in uvicorn.
        super().connection_made(cast(asyncio.Transport, WriteCoalescer(transport, self.services.write_batch)))
        self._arm(self.limits.header_timeout)
        if 0 < self.max_connections < len(self.connections):
            self._refuse(Unavailable("Too many clients are connected.", retry_after=3))

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        # uvicorn tells the newest request only, which may still wait in the pipeline.
        if self._current is not None and not self._current.response_complete:
            _dismiss(self._current)
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        if isinstance(self._current, FastPathRequest):
            self._current.pause()
        self._unsent = self.transport.get_write_buffer_size()
        self._arm(self.limits.send_timeout)

    def resume_writing(self) -> None:
        self._unsent = _NEVER
        super().resume_writing()
        if isinstance(self._current, FastPathRequest):
            self._current.resume()

    def data_received(self, data: bytes) -> None:
        if self._deaf:
            return
        if self._left:
            self._rest(data)
            return
        if not self._part and not self._answering() and not self.pipeline:
            known = self.heads.get(data)
            if known is not None and self._known(data, *known):
                return
            self._first = data
        else:
            self._first = None
        self._fed = len(data)
        before = self.headers if self._part else None
        try:
            self._feed(data)
            if self._part:
                self._incomplete(before)
        except ProxyError as error:
            self._refuse(error)
        except httptools.HttpParserError as error:
            self._refuse(self._refusal or BadRequest(f"This is not HTTP/1.1: {error}"))
        if self._whole is not None:
            whole, self._whole = self._whole, None
            whole.start()

    def _known(self, data: bytes, judged: tuple[RequestHead, bool], body: int, length: int, client_id: bytes) -> bool:
        """Take a request with a known head, if it is one for here."""
        more = body + length - len(data)
        if more < 0 or not 0 < length <= self.limits.max_body_bytes or self.shutdown_state.begun.is_set():
            return False
        head, keep_alive = judged
        if client_id:
            head = head._replace(client_id=client_id.decode())
        cycle = FastPathRequest(self, self.services, head, keep_alive)
        self.cycle = self._current = cycle
        cycle.feed(data[body:])
        if more:
            self._left, self._part = more, _BODY
            self._arm(self.limits.body_timeout)
        else:
            cycle.start()
        return True

    def _rest(self, data: bytes) -> None:
        """More of a body that does not pass the parser."""
        cycle, left = self.cycle, self._left
        assert isinstance(cycle, FastPathRequest)
        cycle.feed(data[:left])
        self._left = max(0, left - len(data))
        if not self._left:
            self._part = _NOTHING
            cycle.start()
            if len(data) > left:
                self.data_received(data[left:])

    def _feed(self, data: bytes) -> None:
        while data:
            try:
                self.parser.feed_data(data)
                return
            except httptools.HttpParserUpgrade as stop:
                self.parser = httptools.HttpRequestParser(self)
                self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
                lines = [b"%s %s HTTP/1.1" % (self.scope["method"].encode(), self.url)]
                lines += [b"%s: %s" % header for header in self.headers if header[0] != b"upgrade"]
                data = b"\r\n".join(lines) + b"\r\n\r\n" + data[stop.args[0] :]

    def _incomplete(self, before: list[tuple[bytes, bytes]] | None) -> None:
        """More of a message is to come."""
        same = self.headers is before
        if same:
            self._spent += self._fed
        if self._part == _BODY:
            if self._spent > self.limits.max_header_bytes:
                raise BadRequest("The body's chunks carry far more framing than data.")
            if not same and isinstance(self.cycle, FastPathRequest):
                self._arm(self.limits.body_timeout)
            return
        self._seen += self._fed
        self._check_size()
        if not same and not self._answering():
            self._arm(self.limits.header_timeout)

    def _check_size(self) -> None:
        """Bound what there is of the head."""
        limit = self.limits.max_header_bytes
        known = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        if max(known, self._spent) > limit:
            raise HeadTooLarge(f"The request line and headers exceed {limit} bytes (MAX_HEADER_BYTES).")
        if len(self.headers) > _MAX_HEADERS:
            raise HeadTooLarge(f"The request has more than {_MAX_HEADERS} headers.")

    def _answering(self) -> bool:
        return self._current is not None and not self._current.response_complete

    # What the parser reports. It hides an error that is raised here behind one of its own.

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._part = _HEAD
        self._seen = self._spent = 0
        self._host = self._framed = self._chunked = self._upgrading = False

    def on_header(self, name: bytes, value: bytes) -> None:
        # llhttp leaves the white space behind a value, which is no part of it (RFC 9110, 5.5).
        name, value = name.lower(), value.rstrip(b" \t")
        check = _CHECKS.get(name)
        if check is not None:
            check(self, value)
        self.headers.append((name, value))

    def _check_expect(self, value: bytes) -> None:
        self.expect_100_continue = value.lower() == b"100-continue"

    def _check_host(self, value: bytes) -> None:
        if self._host or not _HOST.fullmatch(value):
            self._fail(BadRequest("There must be one Host header, with a host name or address."))
        self._host = True

    def _check_length(self, value: bytes) -> None:
        if self._framed:
            self._fail(BadRequest("The length of the body must be given once."))
        self._framed = True
        self._length = int(value) if value.isdigit() else 0

    def _check_encoding(self, value: bytes) -> None:
        if self._framed:
            self._fail(BadRequest("The length of the body must be given once."))
        self._framed = True
        if value.lower() != b"chunked":
            self._fail(BadRequest("The only Transfer-Encoding that is taken is chunked."))
        self._chunked = True

    def on_headers_complete(self) -> None:
        try:
            self._check_head()
        except ProxyError as error:
            self._fail(error)
        if self.parser.should_upgrade():
            self.scope["method"] = self.parser.get_method().decode()
            self._upgrading = True
            return
        route = ROUTE_OF.get(self.url)
        if route is not None and self._is_plain(route):
            wanted, keep_alive = self.services.coordinator.wanted, self.parser.should_keep_alive()
            head = read_head(self.limits, wanted, route, self.headers)
            self.cycle = self._current = FastPathRequest(self, self.services, head, keep_alive)
            if self._first is not None and self._first.startswith(b"POST "):
                self.heads.put(self._first, (head, keep_alive))
        else:
            self._through_quart()
        self._first = None
        self.headers = []  # for trailers, which nobody reads
        self._part = _BODY
        self._spent = 0

    def _is_plain(self, route: Route) -> bool:
        """Whether a request needs nothing of Quart: it will be read whole, and answered in one of the common ways."""
        if self._chunked or not 0 < self._length <= self.limits.max_body_bytes or self.expect_100_continue:
            return False
        if self._answering() or self.pipeline or self.parser.get_method() != b"POST":
            return False
        if self.parser.get_http_version() != "1.1":
            return False
        try:
            check_encoding(self.headers)
            self.guard.check(route.path, self.headers)
        except ProxyError:
            return False
        return not (self.limits.cors_origins and value_of(self.headers, b"origin"))

    def _through_quart(self) -> None:
        super().on_headers_complete()
        if self.expect_100_continue or self.shutdown_state.begun.is_set():
            _be_last(self.cycle)
        if not self.pipeline:
            self._current = self.cycle
        elif len(self.pipeline) <= _READ_AHEAD:
            # uvicorn stops reading, and with it noticing that the client has left.
            self.flow.resume_reading()

    def _check_head(self) -> None:
        version = self.parser.get_http_version()
        if version != "1.1":
            if version != "1.0":
                raise UnsupportedVersion(f"HTTP/{version} is not spoken here, only HTTP/1.0 and HTTP/1.1.")
            if self._chunked:
                raise BadRequest("HTTP/1.0 has no Transfer-Encoding.")
        elif not self._host:
            raise BadRequest("The Host header is missing.")
        if self._seen + self._fed > self.limits.max_header_bytes or len(self.headers) > _MAX_HEADERS:
            self._check_size()
        if self.parser.should_upgrade() or not self.url.startswith(b"/") or b"#" in self.url:
            self._check_target()
        if len(self.pipeline) >= _MAX_PIPELINED:
            raise BadRequest(f"More than {_MAX_PIPELINED} requests wait on this connection.")
        if self.shutdown_state.begun.is_set() and self.url.partition(b"?")[0] not in _WHILE_STOPPING:
            raise shutting_down()

    def _check_target(self) -> None:
        url, method = self.url, self.parser.get_method()
        path = url.startswith(b"/") or (url == b"*" and method == b"OPTIONS")
        if not path or b"#" in url or method == b"CONNECT":
            raise BadRequest("The request target must be a path: this is no forward proxy.")

    def on_body(self, body: bytes) -> None:
        self._spent -= len(body) * (_FRAMING_PER_BYTE + 1)
        if isinstance(self.cycle, FastPathRequest):
            self.cycle.feed(body)
        else:
            super().on_body(body)

    def on_message_complete(self) -> None:
        self._part = _NOTHING
        if self._upgrading:
            return
        if isinstance(self.cycle, FastPathRequest):
            self._whole = self.cycle
            return
        super().on_message_complete()
        if not self._answering():
            self._arm(self.timeout_keep_alive)

    # Answers and refusals

    @property
    def date(self) -> bytes:
        """What the server says of itself in every answer, as lines. uvicorn makes the list anew each second."""
        headers = self.server_state.default_headers
        made_of, lines = self._date
        if made_of is not headers:
            lines = header_lines(headers)
            type(self)._date = headers, lines
        return lines

    def on_response_complete(self) -> None:
        if self.pipeline:
            self._current = self.pipeline[-1][0]
            super().on_response_complete()
            return
        # As uvicorn's, without its timer for each request.
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            return
        self.flow.resume_reading()
        if self._deaf and not self._said:
            self._say()
        else:
            limits = self.limits
            self._arm((self.timeout_keep_alive, limits.header_timeout, limits.body_timeout)[self._part])

    def _fail(self, error: ProxyError) -> NoReturn:
        self._refusal = error
        raise error

    def _refuse(self, error: ProxyError) -> None:
        """Read nothing more; answer ``error`` once the requests before it are answered."""
        log.debug("A client's data was refused: %s", error.message)
        self._deaf = True
        self._refusal = error
        if self._part != _BODY:
            if not self._answering():
                self._say()
        elif self.pipeline:
            self.pipeline.popleft()
        elif self.cycle.response_started:
            self.transport.close()
        else:
            _dismiss(self.cycle)
            self._say()
        self._part = _NOTHING

    def _say(self) -> None:
        """Send the refusal and end the connection in a way that lets the client read it."""
        assert self._refusal is not None
        self._deaf = self._said = True
        status, headers, body = answer_of(self._refusal)
        framing = [(b"content-length", b"%d" % len(body)), (b"connection", b"close")]
        self.transport.write(status_line(status) + header_lines(headers + framing) + b"\r\n" + body)
        self.transport.write_eof()
        self.flow.resume_reading()
        self._arm(_LINGER)

    # The end

    def last_call(self) -> None:
        """The proxy is stopping: refuse what is not here whole, and end the connection after what is."""
        if self._deaf:
            return
        if self._part:
            self._refuse(shutting_down())
        elif self.cycle is not None and self.flow.write_paused and _only_watches(self.cycle):
            # It would miss nothing, and the end would wait for it.
            self.transport.abort()
        elif self.cycle is not None:
            _be_last(self.cycle)

    def shutdown(self) -> None:
        # A client that is refused gets its moment to read why.
        if not self._deaf:
            super().shutdown()

    def let_go(self) -> None:
        """Wait no longer for a client that takes nothing of its answer."""
        if self.flow.write_paused:
            self.transport.abort()

    # Time

    def _arm(self, seconds: float) -> None:
        """Look at the connection after ``seconds``, and not before."""
        self._deadline = self.loop.time() + seconds
        if self._timer is None:
            self._timer = self.loop.call_at(self._deadline, self._wake)
        elif self._timer.when() > self._deadline:
            self._timer.cancel()
            self._timer = self.loop.call_at(self._deadline, self._wake)

    def _wake(self) -> None:
        self._timer = None
        left = self._deadline - self.loop.time()
        if left > 0.001:
            self._arm(left)
        elif self._said or self._stuck():
            self.transport.abort()
        elif self._part == _BODY and isinstance(self.cycle, FastPathRequest):
            self._refuse(BodyTimeout("The request body did not arrive in time (BODY_TIMEOUT)."))
        elif self._unsent != _NEVER or self._answering():
            self._arm(self.limits.send_timeout)
        elif self._part == _HEAD:
            self._refuse(HeadTimeout("The request's headers did not arrive in time (HEADER_TIMEOUT)."))
        else:
            self.transport.close()
            self._arm(self.limits.send_timeout)

    def _stuck(self) -> bool:
        """Whether the client has taken nothing since the last look, although there was something to take."""
        unsent = self.transport.get_write_buffer_size()
        last = self._unsent
        # Only while nothing is added does the rest tell what was taken.
        still = self.transport.is_closing() or self.flow.write_paused or not self._answering()
        self._unsent = unsent if unsent and still else _NEVER
        return still and 0 < last <= unsent


def _dismiss(cycle: RequestResponseCycle | FastPathRequest) -> None:
    """Its client is not there any more, or will not get its answer."""
    if isinstance(cycle, FastPathRequest):
        cycle.left()
        return
    cycle.disconnected = True
    cycle.waiting_for_100_continue = False
    cycle.message_event.set()


def _only_watches(cycle: RequestResponseCycle | FastPathRequest) -> bool:
    """Whether its answer has no end of its own, such as the live page's feed."""
    return isinstance(cycle, RequestResponseCycle) and WATCHES in cycle.scope


def _be_last(cycle: RequestResponseCycle | FastPathRequest) -> None:
    """Close the connection after this answer, and say so if its head is not out yet."""
    cycle.keep_alive = False
    # uvicorn says so by itself only in newer versions.
    cycle.default_headers = [*cycle.default_headers, (b"connection", b"close")]


_CHECKS: dict[bytes, Callable[[Protocol, bytes], None]] = {
    b"content-length": Protocol._check_length,
    b"expect": Protocol._check_expect,
    b"host": Protocol._check_host,
    b"transfer-encoding": Protocol._check_encoding,
}
