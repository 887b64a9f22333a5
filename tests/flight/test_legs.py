"""The retry rule and the count of legs, with an upstream that fails as it is told to."""

from __future__ import annotations

import json

import pytest

from disagg_proxy.cluster.instance import State
from disagg_proxy.config import Config
from disagg_proxy.errors import EngineDeadline, EngineDisconnected, EngineUnreachable, ProxyError
from disagg_proxy.flight.legs import NotAsked
from disagg_proxy.upstream import Enough
from tests.flight.conftest import Bench

pytestmark = pytest.mark.interpreted

RESET = EngineDisconnected("x", unsent=False, reused=True)
RESET_FRESH = EngineDisconnected("x", unsent=False, reused=False)
UNSENT = EngineDisconnected("x", unsent=True, reused=True)
REFUSED = EngineUnreachable("x")
LATE = EngineDeadline("x")
HEADERS = b"x-custom: 1\r\nx-request-id: %s\r\n"


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
    assert {sent.headers for sent in bench.upstream.sent} == {HEADERS % bench.legs.id.internal.encode()}
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
    assert not bench.upstream.sent


async def test_each_leg_gets_its_own_body_and_the_same_headers(bench: Bench) -> None:
    bench.upstream.outcomes = [200, 200]
    await bench.legs.prefill()
    await bench.legs.decode()
    assert [json.loads(sent.body)["max_tokens"] for sent in bench.upstream.sent] == [1, 9]
    assert bench.upstream.sent[0].headers == bench.upstream.sent[1].headers
    assert bench.upstream.sent[0].headers.startswith(b"x-custom: 1\r\n")
    assert [sent.enough for sent in bench.upstream.sent] == [Enough.WHOLE, Enough.WHOLE]
    assert bench.upstream.sent[0].silence == 2 * Config().prefill_timeout


async def test_a_streamed_answer_is_there_when_it_begins(bench: Bench) -> None:
    bench.upstream.outcomes = [200]
    legs = bench.legs_of(stream=True)
    await legs.decode()
    assert bench.upstream.sent[0].enough is Enough.BEGUN
