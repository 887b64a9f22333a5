"""How the answer of one exchange is written: what is there together leaves together."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from disagg_proxy.cluster.pulse import Pulse
from disagg_proxy.coordinator.head import Head
from disagg_proxy.errors import EngineDisconnected
from disagg_proxy.http import direct
from disagg_proxy.observe.recorder import Recorder
from disagg_proxy.protocol.fields import COMPLETIONS
from disagg_proxy.protocol.headers import AnswerHeaders, PassedHeaders
from disagg_proxy.protocol.redact import NoHiding
from disagg_proxy.protocol.usage import UsageRepair
from disagg_proxy.response.outcome import Outcome
from disagg_proxy.response.reply import Reply
from disagg_proxy.response.stream import ResponseStream
from disagg_proxy.stopping import Stopping
from disagg_proxy.upstream import Answer

pytestmark = pytest.mark.interpreted

HEAD = b"HTTP/1.1 200 OK\r\ndate: now\r\ncontent-type: text/event-stream\r\nx-request-id: mine\r\n"
CHUNKED = b"transfer-encoding: chunked\r\n\r\n"


class Exchange:
    """A client's connection, and the coordinator that serves it."""

    date = b"date: now\r\n"
    wanted = None

    def __init__(self) -> None:
        self.writes: list[bytes] = []
        self.closed = self.complete = False
        self.transport = SimpleNamespace(write=self.writes.append, close=self.close)
        self.answer = Answer(SimpleNamespace(abort=lambda: None), "decode", reused=False)
        self.answer.begun(200, AnswerHeaders())
        self.reply: Reply | None = None

    @property
    def left(self) -> bool:
        return self.reply is not None and self.reply.gone

    def start(self, head: Head, body: bytes, reply: Reply) -> None:
        self.reply = reply

    def close(self) -> None:
        self.closed = True

    def on_response_complete(self) -> None:
        self.complete = True

    async def stream(self) -> None:
        """The request is complete, and decode's answer begins."""
        head = Head(COMPLETIONS, [], b"", "mine", b"")
        services = SimpleNamespace(stopping=Stopping(0.0, lambda: 0.0), coordinator=self)
        one = direct.Direct(self, services, head, True)  # type: ignore[arg-type]
        one.feed(b"{}")
        one.start()
        assert self.reply is not None
        vigil, record = Pulse(0.0).begin(lambda: 0.0), Recorder.alone().open("/v1/completions", None)
        stream = ResponseStream(self.answer, NoHiding(), UsageRepair(COMPLETIONS, None), vigil, record)
        self.reply.send(Outcome(200, PassedHeaders([(b"content-type", b"text/event-stream")]), stream))


@pytest.fixture
async def exchange() -> Exchange:
    return Exchange()


async def test_the_head_leaves_with_the_first_token(exchange: Exchange) -> None:
    exchange.answer.received(b"data: 1\n\n")
    await exchange.stream()
    exchange.answer.received(b"data: 2\n\n")
    exchange.answer.ended()
    assert exchange.writes == [HEAD + CHUNKED + b"9\r\ndata: 1\n\n\r\n", b"9\r\ndata: 2\n\n\r\n", b"0\r\n\r\n"]
    assert exchange.complete and exchange.left and not exchange.closed


async def test_a_head_without_a_token_does_not_wait_for_one(exchange: Exchange) -> None:
    await exchange.stream()
    assert exchange.writes == [HEAD + CHUNKED]
    exchange.answer.received(b"data: 1\n\n")
    assert exchange.writes[1:] == [b"9\r\ndata: 1\n\n\r\n"]


async def test_it_leaves_with_the_end_of_an_empty_body(exchange: Exchange) -> None:
    exchange.answer.ended()
    await exchange.stream()
    assert exchange.writes == [HEAD + CHUNKED + b"0\r\n\r\n"] and exchange.complete


async def test_it_leaves_before_a_cut(exchange: Exchange) -> None:
    exchange.answer.broke(EngineDisconnected("broken", unsent=False, reused=False))
    await exchange.stream()
    assert exchange.writes == [HEAD + CHUNKED] and exchange.closed and not exchange.complete
