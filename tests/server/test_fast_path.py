"""How the response of one exchange is written: what is available together is written together."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from disagg_proxy.cluster.progress import ProgressTracker
from disagg_proxy.config import Config
from disagg_proxy.coordinator.coordinator import RequestHead
from disagg_proxy.downstream.refusal import ClientResponse
from disagg_proxy.downstream.reply import Reply
from disagg_proxy.downstream.response_stream import ResponseStream
from disagg_proxy.errors import EngineDisconnected
from disagg_proxy.http1.headers import ForwardedHeaders, ResponseHeaders
from disagg_proxy.openai.fields import COMPLETIONS
from disagg_proxy.openai.usage import UsageRepair
from disagg_proxy.request_id import NoRewriting
from disagg_proxy.runtime.shutdown import Shutdown
from disagg_proxy.server import fast_path
from disagg_proxy.telemetry.request_recorder import RequestRecorder
from disagg_proxy.upstream import Response

pytestmark = pytest.mark.interpreted

HEAD = b"HTTP/1.1 200 OK\r\ndate: now\r\ncontent-type: text/event-stream\r\nx-request-id: mine\r\n"
CHUNKED = b"x-accel-buffering: no\r\ntransfer-encoding: chunked\r\n\r\n"


class Exchange:
    """A client's connection, and the coordinator that serves it."""

    default_header_lines = b"date: now\r\n"
    wanted = None

    def __init__(self, config: Config | None = None) -> None:
        self.config = config or Config()
        self.writes: list[bytes] = []
        self.closed = self.complete = False
        self.transport = SimpleNamespace(write=self.writes.append, close=self.close)
        self.answer = Response(SimpleNamespace(abort=lambda: None), "decode", reused=False)
        self.answer.on_head(200, ResponseHeaders())
        self.reply: Reply | None = None

    @property
    def left(self) -> bool:
        return self.reply is not None and self.reply.gone

    def start(self, head: RequestHead, body: bytes, reply: Reply) -> None:
        self.reply = reply

    def close(self) -> None:
        self.closed = True

    def on_response_complete(self) -> None:
        self.complete = True

    async def stream(self) -> None:
        """The request is complete, and decode's answer begins."""
        head = RequestHead(COMPLETIONS, [], b"", "mine", b"")
        services = SimpleNamespace(shutdown=Shutdown(0.0, lambda: 0.0), coordinator=self, config=self.config)
        one = fast_path.FastPathRequest(self, services, head, True)  # type: ignore[arg-type]
        one.on_body(b"{}")
        one.start()
        assert self.reply is not None
        pending, record = (
            ProgressTracker(0.0).begin(lambda: 0.0),
            RequestRecorder.standalone().open("/v1/completions", None),
        )
        stream = ResponseStream(self.answer, NoRewriting(), UsageRepair(COMPLETIONS, None), pending, record)
        self.reply.send(ClientResponse(200, ForwardedHeaders([(b"content-type", b"text/event-stream")]), stream))


@pytest.fixture
async def exchange() -> Exchange:
    return Exchange()


async def test_the_head_is_written_with_the_first_token(exchange: Exchange) -> None:
    exchange.answer.on_data(b"data: 1\n\n")
    await exchange.stream()
    exchange.answer.on_data(b"data: 2\n\n")
    exchange.answer.on_end()
    assert exchange.writes == [HEAD + CHUNKED + b"9\r\ndata: 1\n\n\r\n", b"9\r\ndata: 2\n\n\r\n", b"0\r\n\r\n"]
    assert exchange.complete and exchange.left and not exchange.closed


async def test_a_head_does_not_wait_for_a_token(exchange: Exchange) -> None:
    await exchange.stream()
    assert exchange.writes == [HEAD + CHUNKED]
    exchange.answer.on_data(b"data: 1\n\n")
    assert exchange.writes[1:] == [b"9\r\ndata: 1\n\n\r\n"]


async def test_the_head_is_written_with_the_end_of_an_empty_body(exchange: Exchange) -> None:
    exchange.answer.on_end()
    await exchange.stream()
    assert exchange.writes == [HEAD + CHUNKED + b"0\r\n\r\n"] and exchange.complete


async def test_the_head_is_written_before_a_cut(exchange: Exchange) -> None:
    exchange.answer.on_error(EngineDisconnected("broken", unsent=False, reused=False))
    await exchange.stream()
    assert exchange.writes == [HEAD + CHUNKED] and exchange.closed and not exchange.complete


async def test_an_error_event_is_one_chunk_before_the_cut() -> None:
    exchange = Exchange(Config(stream_error_event=True))
    await exchange.stream()
    exchange.answer.on_data(b"data: 1\n\n")
    exchange.answer.on_error(EngineDisconnected("broken", unsent=False, reused=False))
    event = (
        b'data: {"error": {"message": "broken", "type": "upstream_error", "param": null, '
        b'"code": "engine_disconnected"}}\n\n'
    )
    assert exchange.writes[1:] == [b"9\r\ndata: 1\n\n\r\n", b"%x\r\n%b\r\n" % (len(event), event)]
    assert exchange.closed and not exchange.complete
