"""``server/client_connection.py`` without sockets: arbitrary bytes in arbitrary chunks, compared with h11.

Properties: every accepted request is the one that h11 reads at the same place, with the same method, target, headers
and body; nothing is accepted after a refusal; the split into chunks does not matter; every request gets one response,
in order, and at most one refusal follows. When time passes the connection ends, and with it every task. Where h11
refuses an accepted request, the label says so; :data:`TAKEN` lists the known reasons.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import patch

import h11
import uvicorn
from uvicorn.server import ServerState

from disagg_proxy.config import Config
from disagg_proxy.config.reload import Reloads
from disagg_proxy.coordinator.coordinator import RequestHead
from disagg_proxy.keys.key_table import KeyTable
from disagg_proxy.openai.prefix_hash import AffinityNeeds
from disagg_proxy.runtime.shutdown import Shutdown
from disagg_proxy.runtime.write_coalescing import WriteBatch
from disagg_proxy.server import client_connection
from disagg_proxy.server.client_connection import connection_class
from disagg_proxy.server.fast_path import ROUTE_OF, ClientProtocol, FastPathRequest
from disagg_proxy.services import Services
from disagg_proxy.telemetry.stats import Stats
from fuzz.pure import Witness
from fuzz.requests import SEEDS as REQUESTS
from fuzz.requests import WORDS as WORDS
from fuzz.source import Source

SEEDS = [prefix + raw for raw in REQUESTS for prefix in (b"\0" * 8, b"\1\2\3\4\5\1\2\3")]

MAX_LEN = 2048
"""Bytes; more could hold more requests than may be pipelined, and then the split into chunks does matter."""

TAKEN = ("illegal request line", "illegal chunk header")
"""Beginnings of h11's refusals of requests that both nevertheless read in the same way."""

_LIMITS = Config(header_timeout=5.0, body_timeout=7.0, send_timeout=11.0)
_KEEP_ALIVE = 13
_ALL_TIMES = 80.0
"""Seconds after which every connection has ended: head, body, keep-alive, twice the send timeout, and the linger."""

Taken = tuple[str, bytes, list[tuple[bytes, bytes]], bytes]


class Clock(asyncio.SelectorEventLoop):
    """An event loop whose clock can be advanced."""

    ahead = 0.0

    def time(self) -> float:
        return super().time() + self.ahead

    def spin(self, progress: Callable[[], object]) -> None:
        """Run the loop until there is no more progress."""
        before, rounds = progress(), 0
        while rounds < 12:
            self.call_soon(self.stop)
            self.run_forever()
            now = progress()
            before, rounds = now, rounds + 1 if now == before else 0


class Wire(asyncio.Transport):
    """Records what the protocol writes."""

    def __init__(self, closed: Callable[[], object]) -> None:
        super().__init__()
        self.sent = b""
        self.closed = self.ended = self.paused = False
        self._on_close = closed

    def write(self, data: Any) -> None:
        if self.ended or self.closed:
            raise RuntimeError("written after the end")
        self.sent += bytes(data)

    def write_eof(self) -> None:
        self.ended = True

    def can_write_eof(self) -> bool:
        return True

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            self._on_close()

    abort = close

    def is_closing(self) -> bool:
        return self.closed

    def get_write_buffer_size(self) -> int:
        return 0

    def pause_reading(self) -> None:
        self.paused = True

    def resume_reading(self) -> None:
        self.paused = False

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return default


@dataclass
class Reading:
    """The requests and responses of one connection."""

    requests: list[Taken] = field(default_factory=list)
    sent: bytes = b""


class Server:
    """The protocol with an application that records and answers."""

    def __init__(self) -> None:
        self.loop = Clock()
        self.loop.set_exception_handler(self._failed)
        self.failures: list[str] = []
        logging.getLogger("uvicorn.error").addHandler(Witness(self.failures))
        self.reading = Reading()
        services = SimpleNamespace(
            config=_LIMITS,
            keys=KeyTable(_LIMITS, Stats(lambda: 0.0)),
            reloads=Reloads(),
            coordinator=SimpleNamespace(wanted=AffinityNeeds(prefix=False, session=False)),
            write_batch=WriteBatch(),
            shutdown=Shutdown(1.0, self.loop.time),
        )
        self.direct = _recording(self)
        self.config = uvicorn.Config(
            self._app,
            interface="asgi3",
            proxy_headers=False,
            log_config=None,
            lifespan="off",
            ws="none",
            http=connection_class(_LIMITS, cast(Services, services)),
            timeout_keep_alive=_KEEP_ALIVE,
        )
        self.config.load()

    def _failed(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        self.failures.append(f"{context.get('message')}: {context.get('exception')!r}")

    async def _app(self, scope: Any, receive: Any, send: Any) -> None:
        reading, body = self.reading, b""
        status = 200
        while True:
            try:
                event = await asyncio.wait_for(receive(), _LIMITS.body_timeout)
            except asyncio.TimeoutError:
                status = 408
                break
            if event["type"] == "http.disconnect":
                return
            body += event["body"]
            if not event["more_body"]:
                target = _target(scope["raw_path"], scope["query_string"])
                reading.requests.append((scope["method"], target, scope["headers"], body))
                break
        number = len(reading.requests)
        head = [(b"content-length", b"0"), (b"x-number", b"%d" % number)]
        await send({"type": "http.response.start", "status": status, "headers": head})
        await send({"type": "http.response.body", "body": b""})

    def read(self, chunks: list[bytes]) -> Reading:
        """One connection from its opening to its end."""
        with patch.object(client_connection, "FastPathRequest", self.direct):
            return self._read(chunks)

    def _read(self, chunks: list[bytes]) -> Reading:
        asyncio.set_event_loop(self.loop)
        self.reading = Reading()
        self.failures.clear()
        state = ServerState()
        connection = self.config.http_protocol_class(self.config, state, {}, _loop=self.loop)  # type: ignore[call-arg,operator]
        wire = Wire(lambda: self.loop.call_soon(connection.connection_lost, None))
        connection.connection_made(wire)
        for chunk in chunks:
            if not wire.closed:
                self.loop.call_soon(connection.data_received, chunk)
                self.loop.spin(lambda: len(wire.sent))
            assert wire.closed or not wire.paused, "reading stays paused"
        for _ in range(8):
            self.loop.ahead += _ALL_TIMES / 8
            self.loop.spin(lambda: len(wire.sent))
        assert wire.closed, "the connection is kept for nothing"
        assert not asyncio.all_tasks(self.loop) and not state.tasks and not state.connections
        assert not self.failures, self.failures
        self.reading.sent = wire.sent
        return self.reading


def _recording(server: Server) -> type[FastPathRequest]:
    """A class that records and answers requests on the fast path, as ``_app`` does for the others."""

    class Recording(FastPathRequest):
        def __init__(self, client: ClientProtocol, services: Services, head: RequestHead, keep_alive: bool) -> None:
            super().__init__(client, services, head, keep_alive)
            self.received = head

        def start(self) -> None:
            requests, head, body = server.reading.requests, self.received, b"".join(self._chunks)
            # A cached head has the headers of its first request, except for these two.
            now = {b"content-length": b"%d" % len(body)}
            if head.client_id:
                now[b"x-request-id"] = head.client_id.encode()
            headers = [(name, now.get(name, value)) for name, value in head.headers]
            requests.append(("POST", head.route.path.encode() + b"?", headers, body))
            self._send_response(200, b"x-number: %d\r\n" % len(requests), b"")

    return Recording


def _target(path: bytes, query: bytes) -> bytes:
    """What of a request's target must be read alike: the generation routes ignore a query string."""
    return path + b"?" + (b"" if path in ROUTE_OF else query)


@dataclass
class Second:
    """h11's reading: the requests up to the first that it refuses, and its reason."""

    requests: list[Taken] = field(default_factory=list)
    why: str = ""


def second_reading(data: bytes) -> Second:
    """Each request with a parser of its own, so that no answer has to be invented.

    Line ends in front of a request are skipped, whole or not: they mean nothing to llhttp, and h11 takes none.
    """
    found = Second()
    while True:
        data = data.lstrip(b"\r\n")
        if not data:
            found.why = "incomplete"
            return found
        parser = h11.Connection(h11.SERVER, max_incomplete_event_size=10**6)
        parser.receive_data(data)
        head, body = None, b""
        try:
            while not isinstance(event := parser.next_event(), h11.EndOfMessage):
                if event is h11.NEED_DATA:
                    found.why = "incomplete"
                    return found
                if isinstance(event, h11.Request):
                    head = event
                elif isinstance(event, h11.Data):
                    body += bytes(event.data)
        except h11.RemoteProtocolError as error:
            found.why = str(error)
            return found
        assert head is not None
        path, _, query = head.target.partition(b"?")
        found.requests.append((head.method.decode(), _target(path, query), [(n, v) for n, v in head.headers], body))
        if parser.their_state is h11.MUST_CLOSE:
            found.why = "to be closed"
            return found
        data = parser.trailing_data[0]


def answers(sent: bytes) -> list[tuple[int, bytes]]:
    """Status and number of each response, without interim ones."""
    found = []
    while sent:
        parser = h11.Connection(h11.CLIENT)
        parser.send(h11.Request(method="GET", target="/", headers=[("Host", "x")]))
        parser.send(h11.EndOfMessage())
        parser.receive_data(sent)
        while not isinstance(event := parser.next_event(), h11.EndOfMessage):
            assert event is not h11.NEED_DATA, f"half an answer: {sent[-300:]!r}"
            if isinstance(event, h11.Response):
                found.append((event.status_code, dict(event.headers).get(b"x-number", b"")))
        sent = parser.trailing_data[0]
    return found


_server: Server | None = None


def check(data: bytes) -> str:
    """One execution: eight bytes determine the split into chunks, the rest is sent by the client."""
    global _server
    _server = _server or Server()
    raw = data[8 : 8 + MAX_LEN]
    whole = _server.read([raw])
    cut = _server.read(Source(data[:8]).pieces(raw))
    assert whole.requests == cut.requests, f"whole {whole.requests}, in chunks {cut.requests}"
    sent = answers(whole.sent)
    assert [status for status, _ in sent] == [status for status, _ in answers(cut.sent)]
    return compare(whole, second_reading(raw), sent)


def compare(whole: Reading, second: Second, sent: list[tuple[int, bytes]]) -> str:
    """The two readings side by side."""
    count = len(whole.requests)
    served = [number for status, number in sent if status == 200]
    assert served == [b"%d" % (i + 1) for i in range(count)], sent
    refusals = [status for status, _ in sent if status != 200]
    assert len(refusals) <= 1 and all(400 <= status < 500 or status == 505 for status in refusals), sent
    for mine, other in zip(whole.requests, second.requests, strict=False):
        assert _plain(mine) == _plain(other), f"read as {mine}, by h11 as {other}"
    label = f"{min(count, 3)}{'+' if count > 3 else ''} taken, then {refusals[0] if refusals else 'nothing'}"
    if count > len(second.requests):
        why = next((known for known in TAKEN if second.why.startswith(known)), None)
        assert why, f"{whole.requests[len(second.requests)]} is taken; h11: {second.why}"
        label += f" (h11: {why})"
    return label


def _plain(taken: Taken) -> Taken:
    method, target, headers, body = taken
    return method, target, [(name, value) for name, value in headers if name != b"upgrade"], body
