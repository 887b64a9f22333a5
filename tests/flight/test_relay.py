"""One body on its way to the client."""

from __future__ import annotations

from collections.abc import AsyncGenerator

import pytest

from disagg_proxy.address import parse_address
from disagg_proxy.cluster.pulse import Pulse
from disagg_proxy.errors import EngineDisconnected, StreamCut
from disagg_proxy.flight.relay import Relay
from disagg_proxy.protocol.p2p_nccl import RequestId, new_request_id
from disagg_proxy.protocol.redact import IdHider
from disagg_proxy.protocol.usage import UsageRepair

ID = new_request_id(parse_address("127.0.0.1:1"), parse_address("127.0.0.1:2"))
BROKEN = EngineDisconnected("broken", unsent=False, reused=False)


class Said:
    """Stands for decode's answer; an exception in ``pieces`` is raised in its turn."""

    def __init__(self, *pieces: bytes | Exception) -> None:
        self._pieces = iter(pieces)
        self.closed = 0

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        for piece in self._pieces:
            if isinstance(piece, Exception):
                raise piece
            yield piece

    def close(self) -> None:
        self.closed += 1


class Relayed:
    """A relay and what it has reported."""

    def __init__(self, *pieces: bytes | Exception, request_id: RequestId = ID) -> None:
        self.answer = Said(*pieces)
        self.pulse = Pulse(0.0)
        self.vigil = self.pulse.begin(lambda: 0.0, give_up=lambda error: None)
        self.ended: list[bool] = []
        self.relay = Relay(self.answer, IdHider(request_id), UsageRepair(0), self.vigil, self.ended.append)

    async def read(self) -> bytes:
        await self.relay.begin()
        return b"".join([piece async for piece in self.relay])


async def test_a_body_that_comes_to_its_end() -> None:
    relayed = Relayed(b"data: 1\n\n", b"data: 2\n\n")
    assert await relayed.read() == b"data: 1\n\ndata: 2\n\n"
    assert (relayed.pulse.moves, relayed.ended) == (2, [True])
    relayed.relay.close()
    assert (relayed.ended, relayed.answer.closed) == ([True], 0)


@pytest.mark.parametrize("size", [1, 3, 50, 1000])
async def test_the_internal_id_is_hidden_wherever_it_is_split(size: int) -> None:
    body = b'data: {"id": "cmpl-%s-0"}\n\n' % ID.internal.encode() * 3
    relayed = Relayed(*(body[at : at + size] for at in range(0, len(body), size)))
    assert await relayed.read() == body.replace(ID.internal.encode(), ID.public.encode())


async def test_a_piece_that_may_begin_an_id_is_held_back_but_not_lost_at_the_end() -> None:
    relayed = Relayed(b"data: __", b"_prefill_addr_")
    assert await relayed.read() == b"data: ___prefill_addr_"


async def test_a_break_is_a_cut_and_nothing_is_added() -> None:
    relayed = Relayed(b"data: 1\n\n___pre", BROKEN)
    pieces = []
    await relayed.relay.begin()
    with pytest.raises(StreamCut, match="broken"):
        async for piece in relayed.relay:
            pieces.append(piece)
    assert pieces == [b"data: 1\n\n"]
    assert relayed.ended == [False]


async def test_an_empty_body_has_no_first_byte() -> None:
    relayed = Relayed()
    assert await relayed.read() == b""
    assert (relayed.vigil.begun, relayed.ended) == (False, [True])


async def test_giving_up_closes_the_answer_and_is_reported_once() -> None:
    relayed = Relayed(b"data: 1\n\n", b"data: 2\n\n")
    await relayed.relay.begin()
    await anext(aiter(relayed.relay))
    relayed.relay.close()
    relayed.relay.close()
    assert (relayed.ended, relayed.answer.closed) == ([False], 1)


async def test_a_break_before_the_first_byte_is_still_an_error() -> None:
    relayed = Relayed(BROKEN)
    with pytest.raises(EngineDisconnected):
        await relayed.relay.begin()
    assert relayed.ended == [] and relayed.answer.closed == 1, "its owner decides what becomes of it"


async def test_while_the_client_reads_nobody_waits_for_decode() -> None:
    relayed = Relayed(b"data: 1\n\n", b"data: 2\n\n")
    assert relayed.pulse.waiting() == [relayed.vigil]
    await relayed.relay.begin()
    assert relayed.pulse.waiting() == []
    pieces = aiter(relayed.relay)
    await anext(pieces)
    assert relayed.pulse.waiting() == []
    await anext(pieces)
    assert relayed.pulse.waiting() == []


async def test_a_cut_reaches_the_reader() -> None:
    relayed = Relayed(b"data: 1\n\n")
    await relayed.relay.begin()
    relayed.relay.cut()
    assert (relayed.ended, relayed.answer.closed) == ([], 1), "the reader's error ends it"
