"""When a request is sent once more over a fresh connection, and what ends one whose instance is given up."""

from __future__ import annotations

import asyncio

import pytest

from disagg_proxy.cluster.progress import ProgressTracker
from disagg_proxy.errors import EngineDisconnected, EngineFrozen
from disagg_proxy.upstream import ReadUntil, Resend
from tests.conftest import soon
from tests.upstream.conftest import CLOSE, Ask, Server

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"
WHOLE = {"method": "POST", "enough": ReadUntil.WHOLE}


def failed(*, unsent: bool, reused: bool) -> EngineDisconnected:
    return EngineDisconnected("closed", unsent=unsent, reused=reused)


@pytest.mark.parametrize("reused", [False, True])
@pytest.mark.parametrize("unsent", [False, True])
def test_the_rule(unsent: bool, reused: bool) -> None:
    error = failed(unsent=unsent, reused=reused)
    assert not Resend.NEVER.allows(error)
    assert Resend.UNSENT.allows(error) is unsent
    assert Resend.REUSED.allows(error) is (unsent or reused)


async def test_a_kept_connection_that_closes_is_made_up_for(server: Server, ask: Ask) -> None:
    server.answers = [OK, CLOSE, OK]
    await ask(**WHOLE)
    answer = await ask(**WHOLE, body=b"first", resend=Resend.REUSED, resend_body=b"again")
    assert answer.read().body == b"{}" and server.bodies == [b"", b"first", b"again"]
    assert server.ports[0] == server.ports[1] != server.ports[2]


@pytest.mark.parametrize("resend", [Resend.NEVER, Resend.UNSENT])
async def test_but_not_where_it_may_have_been_received(server: Server, ask: Ask, resend: Resend) -> None:
    server.answers = [OK, CLOSE, OK]
    await ask(**WHOLE)
    with pytest.raises(EngineDisconnected):
        await ask(**WHOLE, body=b"first", resend=resend)
    assert server.bodies == [b"", b"first"]


async def test_a_fresh_connection_that_closes_is_not_and_neither_is_the_second(server: Server, ask: Ask) -> None:
    server.answers = [CLOSE, OK, CLOSE, CLOSE, OK]
    with pytest.raises(EngineDisconnected):
        await ask(**WHOLE, resend=Resend.REUSED)
    await ask(**WHOLE)
    with pytest.raises(EngineDisconnected):
        await ask(**WHOLE, resend=Resend.REUSED)
    assert len(server.asked) == 4


async def test_an_instance_that_is_given_up_ends_its_answer(server: Server, ask: Ask) -> None:
    server.answers = [(b"HTTP/1.1 200 OK\r\n", b"")]
    pending = ProgressTracker(0.0).begin(lambda: 0.0)
    asked = asyncio.ensure_future(ask(**WHOLE, pending=pending))
    while pending.answer is None:
        await asyncio.sleep(0)
    pending.fail(EngineFrozen("stalled"))
    with pytest.raises(EngineFrozen):
        await soon(asked)
    server.more.set()
    await soon(server.gone.wait())


async def test_one_that_is_given_up_while_it_is_connected_to_is_not_sent_the_request(server: Server, ask: Ask) -> None:
    pending = ProgressTracker(0.0).begin(lambda: 0.0)
    pending.fail(EngineFrozen("stalled"))
    with pytest.raises(EngineFrozen):
        await ask(**WHOLE, pending=pending)
    await soon(server.gone.wait())
    assert not server.asked
