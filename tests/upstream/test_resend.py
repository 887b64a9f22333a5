"""When a request is resent on a fresh connection, and requests to instances found stalled or lost."""

from __future__ import annotations

import asyncio

import pytest

from disagg_proxy.cluster.progress import ProgressTracker
from disagg_proxy.errors import EngineDisconnected, EngineFrozen
from disagg_proxy.upstream import ReadUntil, Resend
from tests.conftest import soon
from tests.upstream.conftest import CLOSE, Ask, Server

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"
COMPLETE = {"method": "POST", "until": ReadUntil.COMPLETE}


def failed(*, unsent: bool, reused: bool) -> EngineDisconnected:
    return EngineDisconnected("closed", unsent=unsent, reused=reused)


@pytest.mark.parametrize("reused", [False, True])
@pytest.mark.parametrize("unsent", [False, True])
def test_the_rule(unsent: bool, reused: bool) -> None:
    error = failed(unsent=unsent, reused=reused)
    assert not Resend.NEVER.allows(error)
    assert Resend.UNSENT.allows(error) is unsent
    assert Resend.REUSED.allows(error) is (unsent or reused)


async def test_a_reused_connection_that_closes_is_followed_by_a_fresh_one(server: Server, ask: Ask) -> None:
    server.answers = [OK, CLOSE, OK]
    await ask(**COMPLETE)
    answer = await ask(**COMPLETE, body=b"first", resend=Resend.REUSED, resend_body=b"again")
    assert answer.read().body == b"{}" and server.bodies == [b"", b"first", b"again"]
    assert server.ports[0] == server.ports[1] != server.ports[2]


@pytest.mark.parametrize("resend", [Resend.NEVER, Resend.UNSENT])
async def test_no_resend_when_the_request_may_have_been_received(server: Server, ask: Ask, resend: Resend) -> None:
    server.answers = [OK, CLOSE, OK]
    await ask(**COMPLETE)
    with pytest.raises(EngineDisconnected):
        await ask(**COMPLETE, body=b"first", resend=resend)
    assert server.bodies == [b"", b"first"]


async def test_no_resend_after_a_fresh_connection_closes(server: Server, ask: Ask) -> None:
    server.answers = [CLOSE, OK, CLOSE, CLOSE, OK]
    with pytest.raises(EngineDisconnected):
        await ask(**COMPLETE, resend=Resend.REUSED)
    await ask(**COMPLETE)
    with pytest.raises(EngineDisconnected):
        await ask(**COMPLETE, resend=Resend.REUSED)
    assert len(server.asked) == 4


async def test_a_failed_pending_response_ends_the_response(server: Server, ask: Ask) -> None:
    server.answers = [(b"HTTP/1.1 200 OK\r\n", b"")]
    pending = ProgressTracker(0.0).begin(lambda: 0.0)
    asked = asyncio.ensure_future(ask(**COMPLETE, pending=pending))
    while pending.answer is None:
        await asyncio.sleep(0)
    pending.fail(EngineFrozen("stalled"))
    with pytest.raises(EngineFrozen):
        await soon(asked)
    server.more.set()
    await soon(server.gone.wait())


async def test_a_pending_response_that_fails_while_connecting_is_not_sent(server: Server, ask: Ask) -> None:
    pending = ProgressTracker(0.0).begin(lambda: 0.0)
    pending.fail(EngineFrozen("stalled"))
    with pytest.raises(EngineFrozen):
        await ask(**COMPLETE, pending=pending)
    await soon(server.gone.wait())
    assert not server.asked
