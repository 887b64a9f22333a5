"""What each leg sends, when it may be sent again, and what a failure says of the instance."""

from __future__ import annotations

import json

import pytest

from disagg_proxy.cluster.instance import State
from disagg_proxy.config import Config
from disagg_proxy.connectors.p2p_nccl_legs import NotSent
from disagg_proxy.errors import EngineDeadline, EngineDisconnected, EngineUnreachable, ProxyError
from disagg_proxy.upstream import ReadUntil, Resend
from tests.connectors.conftest import Bench

pytestmark = pytest.mark.interpreted

RESET_FRESH = EngineDisconnected("x", unsent=False, reused=False)
REFUSED = EngineUnreachable("x")
LATE = EngineDeadline("x")
HEADERS = b"x-custom: 1\r\nx-request-id: %s\r\n"


@pytest.mark.parametrize(
    ("outcome", "error"),
    [(200, None), (RESET_FRESH, EngineDisconnected), (REFUSED, EngineUnreachable), (LATE, EngineDeadline), (500, None)],
)
async def test_prefill(bench: Bench, outcome: ProxyError | int, error: type[ProxyError] | None) -> None:
    bench.upstream.outcomes = [outcome]
    attempt = bench.attempt()
    if error is None:
        await attempt.prefill()
    else:
        with pytest.raises(error):
            await attempt.prefill()
    (sent,) = bench.upstream.sent
    assert (sent.fresh, sent.resend) == (False, Resend.REUSED), "a prefill may be repeated with its id"
    assert sent.headers == HEADERS % attempt.id.internal.encode()
    assert bench.prefill.in_flight == 0
    assert bench.prefill.failures_total == (error is not None or outcome == 500)


@pytest.mark.parametrize(
    ("outcome", "error"),
    [(200, None), (RESET_FRESH, EngineDisconnected), (REFUSED, NotSent), (LATE, EngineDeadline), (500, None)],
)
async def test_decode(bench: Bench, outcome: ProxyError | int, error: type[Exception] | None) -> None:
    bench.upstream.outcomes = [outcome]
    attempt = bench.attempt()
    if error is None:
        await attempt.request_decode()
    else:
        with pytest.raises(error):
            await attempt.request_decode()
    (sent,) = bench.upstream.sent
    assert (sent.fresh, sent.resend) == (False, Resend.UNSENT), "never twice where it may have been received"
    assert bench.decode.in_flight == 1, "until the attempt releases its placement"
    attempt.release()
    assert bench.counts() == [0, 0, 0, 0]


@pytest.mark.parametrize(
    ("outcome", "out", "probed"), [(REFUSED, True, True), (RESET_FRESH, False, True), (LATE, False, False)]
)
async def test_what_a_failure_says_of_the_instance(bench: Bench, outcome: ProxyError, out: bool, probed: bool) -> None:
    bench.upstream.outcomes = [outcome]
    with pytest.raises(ProxyError):
        await bench.attempt().prefill()
    assert (bench.prefill.state is not State.READY) == out
    assert (bench.world.probes == [bench.prefill]) == probed


async def test_a_decode_that_was_away_meanwhile_is_not_sent_the_request(bench: Bench) -> None:
    attempt = bench.attempt()
    bench.world.registry.suspend(bench.decode, "gone", gone=True)
    bench.world.registry.admit(bench.decode, bench.decode.models)
    with pytest.raises(NotSent, match="went away during the prefill"):
        await attempt.request_decode()
    assert not bench.upstream.sent


async def test_each_leg_gets_its_own_body_and_the_same_headers(bench: Bench) -> None:
    bench.upstream.outcomes = [200, 200]
    attempt = bench.attempt()
    await attempt.prefill()
    await attempt.request_decode()
    assert [json.loads(sent.body)["max_tokens"] for sent in bench.upstream.sent] == [1, 9]
    assert bench.upstream.sent[0].headers == bench.upstream.sent[1].headers
    assert bench.upstream.sent[0].headers.startswith(b"x-custom: 1\r\n")
    assert [sent.until for sent in bench.upstream.sent] == [ReadUntil.COMPLETE, ReadUntil.COMPLETE]
    assert bench.upstream.sent[0].idle_timeout == 2 * Config().prefill_timeout


async def test_a_streamed_answer_is_there_when_it_begins(bench: Bench) -> None:
    bench.upstream.outcomes = [200]
    await bench.attempt(stream=True).request_decode()
    assert bench.upstream.sent[0].until is ReadUntil.BODY_STARTED
