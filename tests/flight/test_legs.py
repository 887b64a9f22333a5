"""The retry rule and the count of legs, with an upstream that fails as it is told to."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
from multidict import CIMultiDict, CIMultiDictProxy

from disagg_proxy.cluster.instance import Role, State
from disagg_proxy.cluster.pairing import Pair
from disagg_proxy.config import Config
from disagg_proxy.errors import EngineDeadline, EngineDisconnected, EngineUnreachable, ProxyError
from disagg_proxy.flight.legs import Legs, NotAsked
from disagg_proxy.protocol.fields import COMPLETIONS
from disagg_proxy.protocol.prepare import prepare
from disagg_proxy.stats import Drains
from disagg_proxy.upstream import WholeAnswer
from tests.cluster.conftest import World

RESET = EngineDisconnected("x", unsent=False, reused=True)
RESET_FRESH = EngineDisconnected("x", unsent=False, reused=False)
UNSENT = EngineDisconnected("x", unsent=True, reused=True)
REFUSED = EngineUnreachable("x")
LATE = EngineDeadline("x")


class Upstream:
    """Ends each request with the next of ``outcomes``: an error, or an answer with that status."""

    def __init__(self) -> None:
        self.outcomes: list[ProxyError | int] = []
        self.sent: list[SimpleNamespace] = []

    async def request(self, method: str, instance: Any, path: str, **options: Any) -> Any:
        self.sent.append(SimpleNamespace(instance=instance, path=path, **options))
        outcome = self.outcomes.pop(0)
        if isinstance(outcome, ProxyError):
            raise outcome
        whole = WholeAnswer(outcome, CIMultiDictProxy(CIMultiDict()), b"{}")

        async def read() -> WholeAnswer:
            return whole

        return SimpleNamespace(status=outcome, whole=read)

    @property
    def fresh(self) -> list[bool]:
        return [sent.fresh for sent in self.sent]


class Bench:
    """The legs of one request, and everything around them."""

    def __init__(self) -> None:
        self.world, self.upstream, self.drains = World(), Upstream(), Drains()
        self.prefill, self.decode = (
            self.world.ready(role, port) for role, port in ((Role.PREFILL, 1), (Role.DECODE, 2))
        )
        self.world.probes.clear()
        body = json.dumps({"model": "m", "prompt": "x", "max_tokens": 9}).encode()
        pair = Pair(self.prefill, self.decode)
        headers = CIMultiDict({"X-Custom": "1"})
        self.legs = Legs(
            self.upstream,
            self.world.registry,
            Config(),
            self.drains,
            pair,
            COMPLETIONS,
            headers,
            prepare(COMPLETIONS, body),
        )


@pytest.fixture
def bench() -> Bench:
    return Bench()


@pytest.mark.parametrize(
    ("outcomes", "fresh", "error"),
    [
        ([200], [False], None),
        ([RESET, 200], [False, True], None),
        ([UNSENT, 200], [False, True], None),
        ([RESET, RESET_FRESH], [False, True], EngineDisconnected),
        ([RESET_FRESH], [False], EngineDisconnected),
        ([REFUSED], [False], EngineUnreachable),
        ([LATE], [False], EngineDeadline),
        ([500], [False], None),
    ],
)
async def test_prefill(bench: Bench, outcomes: list, fresh: list[bool], error: type | None) -> None:
    bench.upstream.outcomes = list(outcomes)
    if error is None:
        await bench.legs.prefill()
    else:
        with pytest.raises(error):
            await bench.legs.prefill()
    assert bench.upstream.fresh == fresh
    assert {sent.headers["X-Request-Id"] for sent in bench.upstream.sent} == {bench.legs.id.internal}
    assert bench.prefill.in_flight == 0
    assert bench.prefill.failures_total == (error is not None or outcomes[-1] == 500)


@pytest.mark.parametrize(
    ("outcomes", "fresh", "error"),
    [
        ([200], [False], None),
        ([UNSENT, 200], [False, True], None),
        ([UNSENT, UNSENT], [False, True], EngineDisconnected),
        ([RESET], [False], EngineDisconnected),
        ([RESET_FRESH], [False], EngineDisconnected),
        ([REFUSED], [False], NotAsked),
        ([LATE], [False], EngineDeadline),
        ([500], [False], None),
    ],
)
async def test_decode(bench: Bench, outcomes: list, fresh: list[bool], error: type | None) -> None:
    bench.upstream.outcomes = list(outcomes)
    if error is None:
        await bench.legs.decode()
    else:
        with pytest.raises(error):
            await bench.legs.decode()
    assert bench.upstream.fresh == fresh
    assert bench.decode.in_flight == 1, "until whoever holds the legs ends the lease"


@pytest.mark.parametrize(
    ("outcome", "out", "probed"), [(REFUSED, True, True), (RESET_FRESH, False, True), (LATE, False, False)]
)
async def test_what_a_failure_says_of_the_instance(bench: Bench, outcome, out: bool, probed: bool) -> None:
    bench.upstream.outcomes = [outcome]
    with pytest.raises(ProxyError):
        await bench.legs.prefill()
    assert (bench.prefill.state is not State.READY) == out
    assert (bench.world.probes == [bench.prefill]) == probed


async def test_a_decode_that_was_away_meanwhile_is_not_asked(bench: Bench) -> None:
    bench.world.registry.suspend(bench.decode, "gone", gone=True)
    bench.world.registry.admit(bench.decode, bench.decode.models)
    with pytest.raises(NotAsked, match="went away during the prefill"):
        await bench.legs.decode()
    await bench.legs.drain()
    assert not bench.upstream.sent
    assert bench.drains == Drains(started=1, done=0, failed=1)


@pytest.mark.parametrize(("outcome", "done"), [(200, 1), (400, 0), (500, 0), (RESET_FRESH, 0), (LATE, 0)])
async def test_a_drain_goes_over_a_fresh_connection_once(bench: Bench, outcome, done: int) -> None:
    bench.upstream.outcomes = [outcome]
    await bench.legs.drain()
    (sent,) = bench.upstream.sent
    assert sent.fresh and sent.instance is bench.decode and sent.path == "/v1/completions"
    assert json.loads(sent.body)["max_tokens"] == 1
    assert bench.drains == Drains(started=1, done=done, failed=1 - done)


async def test_each_leg_gets_its_own_body_and_the_same_headers(bench: Bench) -> None:
    bench.upstream.outcomes = [200, 200]
    await bench.legs.prefill()
    await bench.legs.decode()
    assert [json.loads(sent.body)["max_tokens"] for sent in bench.upstream.sent] == [1, 9]
    assert bench.upstream.sent[0].headers == bench.upstream.sent[1].headers
    assert bench.upstream.sent[0].headers["X-Custom"] == "1"
    assert bench.upstream.sent[0].silence == 2 * Config().prefill_timeout
