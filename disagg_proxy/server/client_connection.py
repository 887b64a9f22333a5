"""Reads the requests of a client's connection, and starts them on the fast path or through ASGI.

``request_head`` decides which heads are refused, ``connection_lifecycle`` what a refusal does and how long a client may
take. The rules here:

1. **Upgrade is ignored** (RFC 9110, 7.8). llhttp stops at it and would take the body for the next request, so the head
   is parsed again without it.
2. **Trailers** are dropped. They must not become headers (RFC 9110, 6.5.1), which have been checked already.
3. **Size**: the framing of a chunked body, trailers included, may have MAX_HEADER_BYTES, and 16 more for each byte of
   the body; 128 requests may be pipelined, and beyond 8 of them nothing more is read.
4. **Expect: 100-continue** ends the connection after the response: a client whose body was refused may send either the
   body or its next request. What else applies to the last request of a connection is in ``closing_cycle``.
5. **During a shutdown** only the routes that report the state of the proxy are still served.

A generation request whose head is in the cache (``http1/head_cache``), with no request in front of it, bypasses the
parser; its body is counted here.
"""

from __future__ import annotations

import resource
from typing import Any, NoReturn, cast

import httptools

from disagg_proxy.admission.client_key import ClientKey
from disagg_proxy.config import Config
from disagg_proxy.coordinator.coordinator import RequestHead, read_head
from disagg_proxy.errors import BadRequest, ProxyError, shutting_down
from disagg_proxy.http1.head_cache import HeadCache
from disagg_proxy.http1.head_writer import CachedHeaderLines, header_lines
from disagg_proxy.http1.headers import request_id_headers, request_id_of, value_of
from disagg_proxy.openai.fields import Route
from disagg_proxy.runtime.shutdown import Shutdown
from disagg_proxy.server.asgi.auth import KeyCheck
from disagg_proxy.server.asgi.request import REQUEST_ID
from disagg_proxy.server.closing_cycle import ClosingCycle
from disagg_proxy.server.connection_lifecycle import BODY, HEAD, NOTHING, ConnectionLifecycle, close_after
from disagg_proxy.server.fast_path import ROUTE_OF, FastPathRequest
from disagg_proxy.server.request_head import (
    CHECKED_HEADERS,
    MAX_HEADERS,
    HeadFields,
    check_encoding,
    check_size,
    check_target,
    check_version,
)
from disagg_proxy.services import Services

_MAX_PIPELINED = 128
_READ_AHEAD = 8
"""Pipelined requests beyond which the connection is not read."""
_FRAMING_PER_BYTE = 16

_SERVED_WHILE_STOPPING = frozenset({b"/health", b"/livez", b"/stats", b"/metrics"})


def connection_class(config: Config, parts: Services) -> type[ClientConnection]:
    """The protocol class for uvicorn, which creates its instances with arguments of its own only."""

    class ConfiguredConnection(ClientConnection):
        limits = config
        services = parts
        shutdown_state = parts.shutdown
        key_check = KeyCheck(config, parts.keys)
        heads = HeadCache()
        default_lines = CachedHeaderLines()
        max_connections = resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2

    def reconfigure(config: Config) -> None:
        ConfiguredConnection.limits = config
        # Heads were read and checked under the former settings and keys.
        ConfiguredConnection.heads = HeadCache()

    parts.reloads.on_config(reconfigure)
    # A head is kept with the key that was found for it.
    parts.keys.watch(lambda: ConfiguredConnection.heads.clear())
    return ConfiguredConnection


class ClientConnection(ConnectionLifecycle):
    """One connection of a client. Use the subclass that :func:`connection_class` returns."""

    shutdown_state: Shutdown
    key_check: KeyCheck
    heads: HeadCache[tuple[RequestHead, bool]]
    default_lines: CachedHeaderLines

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._body_left = 0  # bytes of a body that bypasses the parser
        self._head_data: bytes | None = None  # the current data, if it begins with a head
        self._read_size = 0  # bytes passed to the parser in the current call
        self._head_size = 0  # bytes received in calls that contained a part of the current head
        self._overhead = 0  # bytes received in calls that contained nothing else, minus what the body allows
        self._fields = HeadFields()
        self._upgrading = False
        self._client_key: ClientKey | None = None  # of the current head, if it is on the fast path
        self._received: FastPathRequest | None = None  # its body was completed in the current call

    # -- called by the transport

    def data_received(self, data: bytes) -> None:
        if self._discarding:
            return
        if self._body_left:
            self._continue_body(data)
            return
        if not self._part and not self._answering() and not self.pipeline:
            known = self.heads.get(data)
            if known is not None and self._start_known(data, *known):
                return
            self._head_data = data
        else:
            self._head_data = None
        self._read_size = len(data)
        before = self.headers if self._part else None
        try:
            self._parse(data)
            if self._part:
                self._on_incomplete(before)
        except ProxyError as error:
            self._refuse(error)
        except httptools.HttpParserError as error:
            self._refuse(self._refusal or BadRequest(f"This is not HTTP/1.1: {error}"))
        if self._received is not None:
            received, self._received = self._received, None
            received.start()

    def _start_known(
        self, data: bytes, cached: tuple[RequestHead, bool], body: int, length: int, client_id: bytes
    ) -> bool:
        """Start a generation request whose head is in the cache. Returns False if it must be parsed after all."""
        missing = body + length - len(data)
        if missing < 0 or not 0 < length <= self.limits.max_body_bytes or self.shutdown_state.begun.is_set():
            return False
        head, keep_alive = cached
        if client_id:
            head = head._replace(client_id=client_id.decode())
        request = FastPathRequest(self, self.services, head, keep_alive)
        self.cycle = self._current = request
        request.on_body(data[body:])
        if missing:
            self._body_left, self._part = missing, BODY
            self._set_timer(self.limits.body_timeout)
        else:
            request.start()
        return True

    def _continue_body(self, data: bytes) -> None:
        """More data of a body that bypasses the parser."""
        request, left = self.cycle, self._body_left
        assert isinstance(request, FastPathRequest)
        request.on_body(data[:left])
        self._body_left = max(0, left - len(data))
        if not self._body_left:
            self._part = NOTHING
            request.start()
            if len(data) > left:
                self.data_received(data[left:])

    def _parse(self, data: bytes) -> None:
        while data:
            try:
                self.parser.feed_data(data)
                return
            except httptools.HttpParserUpgrade as stop:
                # Parse the head again without Upgrade.
                self.parser = httptools.HttpRequestParser(self)
                self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
                line = b"%s %s HTTP/1.1\r\n" % (self.scope["method"].encode(), self.url)
                kept = [header for header in self.headers if header[0] != b"upgrade"]
                data = line + header_lines(kept) + b"\r\n" + data[stop.args[0] :]

    def _on_incomplete(self, before: list[tuple[bytes, bytes]] | None) -> None:
        """The current data ended within a message; ``before`` is its header list, if it had begun earlier."""
        continued = self.headers is before
        if continued:
            self._overhead += self._read_size
        if self._part == BODY:
            if self._overhead > self.limits.max_header_bytes:
                raise BadRequest("The body's chunks carry far more framing than data.")
            if not continued and isinstance(self.cycle, FastPathRequest):
                self._set_timer(self.limits.body_timeout)
            return
        self._head_size += self._read_size
        check_size(self.url, self.headers, self._overhead, self.limits.max_header_bytes)
        if not continued and not self._answering():
            self._set_timer(self.limits.header_timeout)

    # -- called by the parser, which replaces an exception that is raised here with one of its own

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._part = HEAD
        self._head_size = self._overhead = 0
        self._fields.reset()
        self._upgrading = False

    def on_header(self, name: bytes, value: bytes) -> None:
        # llhttp keeps the white space behind a value, which is not part of it (RFC 9110, 5.5).
        name, value = name.lower(), value.rstrip(b" \t")
        if name in CHECKED_HEADERS:
            try:
                self._fields.add(name, value)
            except ProxyError as error:
                self._fail(error)
        self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        try:
            self._check_head()
        except ProxyError as error:
            self._fail(error)
        if self.parser.should_upgrade():
            self.scope["method"] = self.parser.get_method().decode()
            self._upgrading = True
            return
        route = ROUTE_OF.get(self.url.partition(b"?")[0])
        if route is not None and self._is_fast_path(route):
            needs, keep_alive = self.services.coordinator.wanted, self.parser.should_keep_alive()
            head = read_head(self.limits, needs, route, self.headers, self._client_key)
            self.cycle = self._current = FastPathRequest(self, self.services, head, keep_alive)
            if self._head_data is not None and self._head_data.startswith(b"POST "):
                self.heads.put(self._head_data, (head, keep_alive))
        else:
            self._start_cycle()
        self._head_data = None
        self.headers = []  # for trailers, which are ignored
        self._part = BODY
        self._overhead = 0

    def _is_fast_path(self, route: Route) -> bool:
        """Whether a request bypasses Quart: a POST with a body of known length, on which no other rule applies."""
        fields = self._fields
        if fields.chunked or not 0 < fields.length <= self.limits.max_body_bytes or fields.expects_continue:
            return False
        if self._answering() or self.pipeline or self.parser.get_method() != b"POST":
            return False
        if self.parser.get_http_version() != "1.1":
            return False
        try:
            check_encoding(self.headers)
            self._client_key = self.key_check.check(route.path, self.headers)
        except ProxyError:
            return False
        return not (self.limits.cors_origins and value_of(self.headers, b"origin"))

    def _start_cycle(self) -> None:
        """Start a request through ASGI, or queue it behind the one that is answered."""
        super().on_headers_complete()
        # An HTTP/1.0 client does not understand it (RFC 9110, 10.1.1).
        expects_continue = self._fields.expects_continue and self.scope["http_version"] == "1.1"
        request_id = request_id_of(self.headers)
        cast(dict[str, Any], self.scope)[REQUEST_ID] = request_id
        self.cycle.default_headers = [*self.cycle.default_headers, *request_id_headers(request_id, self.url)]
        if expects_continue or self.shutdown_state.begun.is_set():
            close_after(self.cycle)
        if not self.cycle.keep_alive:
            ClosingCycle.adopt(self.cycle, expects_continue)
        if not self.pipeline:
            self._current = self.cycle
        elif len(self.pipeline) <= _READ_AHEAD:
            # uvicorn has stopped reading, and would not notice that the client leaves.
            self.flow.resume_reading()

    def _check_head(self) -> None:
        check_version(self.parser.get_http_version(), self._fields)
        limit = self.limits.max_header_bytes
        if self._head_size + self._read_size > limit or len(self.headers) > MAX_HEADERS:
            check_size(self.url, self.headers, self._overhead, limit)
        if self.parser.should_upgrade() or not self.url.startswith(b"/") or b"#" in self.url:
            check_target(self.parser.get_method(), self.url)
        if len(self.pipeline) >= _MAX_PIPELINED:
            raise BadRequest(f"More than {_MAX_PIPELINED} requests wait on this connection.")
        if self.shutdown_state.begun.is_set() and self.url.partition(b"?")[0] not in _SERVED_WHILE_STOPPING:
            raise shutting_down()

    def on_body(self, body: bytes) -> None:
        self._overhead -= len(body) * (_FRAMING_PER_BYTE + 1)
        if isinstance(self.cycle, FastPathRequest):
            self.cycle.on_body(body)
        else:
            super().on_body(body)

    def on_message_complete(self) -> None:
        self._part = NOTHING
        if self._upgrading:
            return
        if isinstance(self.cycle, FastPathRequest):
            self._received = self.cycle
            return
        super().on_message_complete()
        if not self._answering():
            self._set_timer(self.timeout_keep_alive)

    # -- responses and refusals

    @property
    def default_header_lines(self) -> bytes:
        """Header lines of every response, such as Date. uvicorn replaces their list every second."""
        return self.default_lines.lines(self.server_state.default_headers)

    def _fail(self, error: ProxyError) -> NoReturn:
        self._refusal = error
        raise error
