"""RELEASE and MEET go to every rank of an instance, whatever becomes of the others."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from disagg_kv.control import Control
from disagg_kv.protocol.handshake import Refused
from disagg_proxy.cluster.instance import Instance, Role
from disagg_proxy.cluster.kv_kind import MAX_RANKS, KvKind
from disagg_proxy.upstream.kv_control import KvControl
from tests.cluster.conftest import World

Sent = list[tuple[str, str, str]]


class _Control:
    def __init__(self, sent: Sent, address: str) -> None:
        self._sent, self._address = sent, address

    async def release(self, transfer: str) -> None:
        self._sent.append((self._address, "release", transfer))

    async def meet(self, prefill: str) -> None:
        self._sent.append((self._address, "meet", prefill))

    async def close(self) -> None:
        pass


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> Sent:
    """What was sent to which address; nobody is at a port that ends in 2."""
    found: Sent = []

    async def open_(address: str, secret: str, timeout: float) -> _Control:
        if address.endswith("2"):
            raise ConnectionRefusedError
        return _Control(found, address)

    monkeypatch.setattr(Control, "open", open_)
    return found


def instances(tp: int | str) -> tuple[Instance, Instance]:
    world, kind = World(), KvKind("disagg_kv", (("tp", tp),))
    return world.ready(Role.PREFILL, 1, kind=kind), world.ready(Role.DECODE, 2, kind=kind)


async def test_messages_go_to_every_rank(sent: Sent) -> None:
    prefill, decode = instances(4)
    control = KvControl("", 1.0)
    await control.release(prefill, "t")
    assert sorted(sent) == [(f"127.0.0.1:{port}", "release", "t") for port in (1001, 1003, 1004)]
    sent.clear()
    await control.meet(decode, prefill)
    assert sorted(sent) == [(f"127.0.0.1:{port}", "meet", "127.0.0.1:1001") for port in (1003, 1004, 1005)]


@pytest.mark.parametrize("tp", [1, 0, -1, MAX_RANKS + 1, "many"])
async def test_an_invalid_number_of_ranks_counts_as_one(sent: Sent, tp: int | str) -> None:
    await KvControl("", 1.0).release(instances(tp)[0], "t")
    assert sent == [("127.0.0.1:1001", "release", "t")]


Ask = Callable[[KvControl, Instance], Awaitable[None]]


@pytest.mark.parametrize("ask", [lambda c, i: c.release(i, "t"), lambda c, i: c.meet(i, i)], ids=["release", "meet"])
async def test_an_instance_without_a_kv_address_gets_no_message(sent: Sent, ask: Ask) -> None:
    instance = instances(1)[0]
    instance.kv = None
    await ask(KvControl("", 1.0), instance)
    assert not sent


async def test_connections_to_one_port_are_bounded(sent: Sent, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine takes 64 by default, and a lost prefill can have hundreds of transfers to release."""
    now, most = 0, 0
    say = _Control.release

    async def release(self: _Control, transfer: str) -> None:
        nonlocal now, most
        now += 1
        most = max(most, now)
        await asyncio.sleep(0)
        await say(self, transfer)
        now -= 1

    monkeypatch.setattr(_Control, "release", release)
    control, prefill = KvControl("", 1.0), instances(1)[0]
    await asyncio.gather(*(control.release(prefill, str(number)) for number in range(300)))
    assert len({transfer for _, _, transfer in sent}) == 300 and most == 8
    assert not control._slots, "addresses of engines that are gone are not kept"


async def test_a_refusal_is_logged_once_and_kept_until_a_message_arrives(
    sent: Sent, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def refuse(address: str, secret: str, timeout: float) -> _Control:
        raise Refused("the shared secret differs")

    control, prefill = KvControl("", 1.0), instances(1)[0]
    with monkeypatch.context() as refusing:
        refusing.setattr(Control, "open", refuse)
        for _ in range(3):
            await control.release(prefill, "t")
    assert prefill.kv_control_refused == "the shared secret differs"
    assert len([record for record in caplog.records if record.levelname == "WARNING"]) == 1
    assert str(prefill) in caplog.text and "the shared secret differs" in caplog.text
    await control.release(prefill, "t")
    assert prefill.kv_control_refused == ""
