"""When a KV release is sent, tried again, and given up."""

from __future__ import annotations

import asyncio
import json

import pytest

from disagg_proxy.cluster.instance import State
from disagg_proxy.connectors import kv_release
from disagg_proxy.connectors.kv_release import KvReleaser
from disagg_proxy.errors import EngineDeadline, EngineDisconnected, EngineUnreachable
from disagg_proxy.telemetry.stats import KvReleases
from tests.connectors.conftest import Bench

pytestmark = pytest.mark.interpreted

RESET = EngineDisconnected("reset", unsent=False, reused=False)
REFUSED = EngineUnreachable("refused", refused=False)
LATE = EngineDeadline("late")


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> KvReleases:
    monkeypatch.setattr(kv_release, "_PAUSES", (0.0,) * 4)
    return KvReleases()


@pytest.mark.parametrize(("outcome", "done"), [(200, 1), (400, 0), (500, 0), (RESET, 0), (LATE, 0)])
async def test_it_goes_over_a_fresh_connection_once(bench: Bench, counts: KvReleases, outcome, done: int) -> None:
    bench.upstream.outcomes = [outcome]
    await KvReleaser(counts).release(bench.attempt())
    (sent,) = bench.upstream.sent
    assert sent.fresh and sent.instance is bench.decode and sent.path == "/v1/completions"
    assert json.loads(sent.body)["max_tokens"] == 1
    assert counts == KvReleases(started=1, done=done, failed=1 - done, tokens=7 * done)


@pytest.mark.parametrize("outcome", [REFUSED, 503, 429])
async def test_it_is_tried_again_when_it_cannot_have_been_taken_in(bench: Bench, counts: KvReleases, outcome) -> None:
    bench.upstream.outcomes = [outcome, outcome, 200]
    await KvReleaser(counts).release(bench.attempt())
    assert len(bench.upstream.sent) == 3
    assert counts == KvReleases(started=1, done=1, tokens=7)


@pytest.mark.parametrize(("outcome", "left"), [(200, 0), (400, 7), (LATE, 7)])
async def test_kv_that_is_not_released_counts_until_decodes_process_ends(
    bench: Bench, counts: KvReleases, outcome, left: int
) -> None:
    attempt = bench.attempt()
    attempt.placement.kv.resize(7)
    bench.upstream.outcomes = [outcome]
    await KvReleaser(counts).release(attempt)
    assert (bench.decode.kv_waiting, bench.decode.kv_waiting_tokens) == (0, left)
    bench.world.registry.process_ended(bench.decode)
    assert bench.decode.kv_waiting_tokens == 0


async def test_it_is_given_up_after_some_tries(bench: Bench, counts: KvReleases) -> None:
    bench.upstream.outcomes = [REFUSED] * 5
    await KvReleaser(counts).release(bench.attempt())
    assert len(bench.upstream.sent) == 4
    assert counts == KvReleases(started=1, failed=1)


async def test_another_process_is_not_asked(bench: Bench, counts: KvReleases) -> None:
    attempt = bench.attempt()
    bench.world.registry.suspend(bench.decode, "gone", gone=True)
    bench.world.registry.admit(bench.decode, bench.decode.models)
    await KvReleaser(counts).release(attempt)
    assert not bench.upstream.sent
    assert counts == KvReleases(started=1, failed=1)


async def test_a_frozen_decode_is_waited_for(bench: Bench, counts: KvReleases, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_release, "_FROZEN_CHECK_INTERVAL", 0.0)
    bench.upstream.outcomes = [200]
    bench.world.registry.freeze(bench.decode, "is stalled")
    draining = asyncio.ensure_future(KvReleaser(counts).release(bench.attempt()))
    for _ in range(20):
        await asyncio.sleep(0)
    assert not bench.upstream.sent and counts.waiting == 1
    bench.world.registry.unfreeze(bench.decode, "moves")
    bench.world.registry.admit(bench.decode, {"m": {}})
    await draining
    assert counts == KvReleases(started=1, done=1, tokens=7)


async def test_no_more_than_a_few_run_on_one_decode(bench: Bench, counts: KvReleases) -> None:
    releaser, go, most, now = KvReleaser(counts), asyncio.Event(), 0, 0
    request = bench.upstream.request

    async def slow(*args, **options):
        nonlocal most, now
        now += 1
        most = max(most, now)
        await go.wait()
        now -= 1
        return await request(*args, **options)

    bench.upstream.request = slow
    bench.upstream.outcomes = [200] * 30
    tasks = [asyncio.ensure_future(releaser.release(bench.attempt())) for _ in range(30)]
    while now < kv_release._MAX_CONCURRENT:
        await asyncio.sleep(0)
    assert counts.waiting == 30
    go.set()
    await asyncio.gather(*tasks)
    assert most == kv_release._MAX_CONCURRENT
    assert counts == KvReleases(started=30, done=30, tokens=210)
    assert bench.decode.state is State.READY
