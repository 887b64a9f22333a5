"""The two legs between engines of the project's own connector, with an upstream that fails as it is told to."""

from __future__ import annotations

import asyncio
import json

import pytest

from disagg_proxy.cluster.instance import Instance, Role
from disagg_proxy.cluster.kv_kind import DISAGG_KV, KvKind
from disagg_proxy.cluster.pairing import Alone, Pair
from disagg_proxy.config import Config
from disagg_proxy.errors import EngineDeadline, EngineDisconnected, EngineFrozen, EngineUnreachable, ProxyError
from disagg_proxy.flight.together_legs import TogetherLegs
from disagg_proxy.protocol.disagg_kv import DisaggKvHandover
from disagg_proxy.protocol.fields import COMPLETIONS
from disagg_proxy.protocol.prepare import prepare
from tests.cluster.conftest import World
from tests.flight.conftest import Upstream

pytestmark = pytest.mark.interpreted

OWN = KvKind(DISAGG_KV)
RESET = EngineDisconnected("x", unsent=False, reused=True)
RESET_FRESH = EngineDisconnected("x", unsent=False, reused=False)


class Together:
    def __init__(self) -> None:
        self.world, self.upstream = World(), Upstream()
        self.prefill, self.decode = (
            self.world.ready(role, port, kind=OWN) for role, port in ((Role.PREFILL, 1), (Role.DECODE, 2))
        )
        self.transfer_id = ""
        self.released: list[tuple[str, str]] = []

    def legs(self, alone: bool = False, **fields: object) -> TogetherLegs:
        body = json.dumps({"model": "m", "prompt": "x", "max_tokens": 9, **fields}).encode()
        found = Alone(self.decode) if alone else Pair(self.prefill, self.decode)
        handover = None if alone else DisaggKvHandover("127.0.0.1:1001")
        self.transfer_id = "" if handover is None else handover.transfer_id
        return TogetherLegs(
            self.upstream, self.world.registry, Config(), self._release, found, handover, COMPLETIONS,
            b"x-custom: 1\r\n", prepare(COMPLETIONS, body), "id", tokens=3,
        )  # fmt: skip

    async def _release(self, instance: Instance, transfer: str) -> None:
        assert instance.kv is not None
        self.released.append((instance.kv.text, transfer))

    def counts(self) -> list[int]:
        return [self.prefill.in_flight, self.decode.in_flight, self.prefill.kv_waiting, self.decode.kv_waiting]


@pytest.fixture
def bench() -> Together:
    return Together()


async def test_both_legs_speak_of_one_transfer(bench: Together) -> None:
    bench.upstream.outcomes = [200, 200]
    legs = bench.legs()
    assert bench.counts() == [1, 1, 1, 1] and legs.unfetched
    assert (await legs.ask_prefill()) is not None
    await legs.ask_decode()
    bodies = [json.loads(sent.body) for sent in bench.upstream.sent]
    assert bodies[0]["kv_transfer_params"] == {"transfer_id": bench.transfer_id} and bodies[0]["max_tokens"] == 1
    assert bodies[1]["kv_transfer_params"] == {"transfer_id": bench.transfer_id, "from": "127.0.0.1:1001"}
    assert {sent.headers for sent in bench.upstream.sent} == {b"x-custom: 1\r\nx-request-id: id\r\n"}
    assert not bench.released
    legs.loaded()
    assert not legs.unfetched
    legs.give_back()
    assert bench.counts() == [0, 0, 0, 0]


@pytest.mark.parametrize(
    "outcomes", [[500], [400], [RESET_FRESH], [RESET, RESET_FRESH], [EngineUnreachable("x")], [EngineDeadline("x")]]
)
async def test_a_prefill_that_fails_releases_decode(bench: Together, outcomes: list[ProxyError | int]) -> None:
    bench.upstream.outcomes = list(outcomes)
    legs = bench.legs()
    assert await legs.ask_prefill() is None
    assert bench.released == [("127.0.0.1:1002", bench.transfer_id)] and bench.prefill.in_flight == 0
    legs.give_back()
    assert bench.counts() == [0, 0, 0, 0]


async def test_a_frozen_prefill_releases_decode(bench: Together, monkeypatch: pytest.MonkeyPatch) -> None:
    legs = await hanging(bench, monkeypatch)
    task = asyncio.create_task(legs.ask_prefill())
    await asyncio.sleep(0)
    (vigil,) = bench.prefill.pulse.open
    vigil.give_up(EngineFrozen("still"))
    assert await task is None and bench.released == [("127.0.0.1:1002", bench.transfer_id)]


async def test_a_frozen_decode_is_a_failure(bench: Together, monkeypatch: pytest.MonkeyPatch) -> None:
    legs = await hanging(bench, monkeypatch)
    task = asyncio.create_task(legs.ask_decode())
    await asyncio.sleep(0)
    legs.decoding.give_up(EngineFrozen("still"))
    with pytest.raises(EngineFrozen):
        await task


async def hanging(bench: Together, monkeypatch: pytest.MonkeyPatch) -> TogetherLegs:
    async def hang(*args: object, **options: object) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(bench.upstream, "request", hang)
    return bench.legs()


async def test_a_cancelled_leg_is_cancelled(bench: Together, monkeypatch: pytest.MonkeyPatch) -> None:
    legs = await hanging(bench, monkeypatch)
    for leg in (legs.ask_prefill, legs.ask_decode):
        task = asyncio.create_task(leg())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert not bench.released
    legs.give_back()
    assert bench.counts() == [0, 0, 0, 0]


async def test_decode_is_waited_for_from_prefills_end_on(bench: Together) -> None:
    bench.upstream.outcomes = [200, 200]
    legs = bench.legs()
    await legs.ask_decode()
    bench.world.time += 30
    assert bench.decode.pulse.silent_for(bench.world.time) == 0
    await legs.ask_prefill()
    bench.world.time += 2
    assert bench.decode.pulse.silent_for(bench.world.time) == 2


@pytest.mark.parametrize("alone", [True, False])
async def test_decode_alone(bench: Together, alone: bool) -> None:
    """Without a prefill, and for prompt logprobs, which decode has to compute."""
    bench.upstream.outcomes = [200]
    legs = bench.legs(alone, **({} if alone else {"prompt_logprobs": 1, "max_tokens": 1}))
    assert legs.prefill is None and not legs.unfetched and await legs.ask_prefill() is None
    await legs.ask_decode()
    assert "kv_transfer_params" not in json.loads(bench.upstream.sent[0].body)
    bench.world.time += 2
    assert bench.decode.pulse.silent_for(bench.world.time) == 2
    legs.give_back()
    await legs.forget()
    assert bench.counts() == [0, 0, 0, 0] and not bench.released
