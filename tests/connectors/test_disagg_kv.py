"""The two legs between engines of the project's own connector, with an upstream that fails as the test says."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from disagg_proxy.cluster.instance import Instance
from disagg_proxy.connectors.disagg_kv import KIND, DisaggKvAttempt
from disagg_proxy.errors import EngineDeadline, EngineDisconnected, EngineFrozen, EngineUnreachable, ProxyError
from disagg_proxy.runtime.inline_coroutine import InlineCoroutine
from disagg_proxy.upstream import Response
from tests.conftest import soon
from tests.connectors.conftest import Bench

pytestmark = pytest.mark.interpreted

RESET_FRESH = EngineDisconnected("x", unsent=False, reused=False)
TO_PREFILL, TO_DECODE = "127.0.0.1:1001", "127.0.0.1:1002"


class OwnBench(Bench):
    """Two engines of this project's connector, and the RELEASE messages that they get."""

    def __init__(self) -> None:
        super().__init__(KIND)
        self.released = self.kv_control.released

    def own(self, alone: bool = False, **fields: Any) -> DisaggKvAttempt:
        return DisaggKvAttempt(self.engines, self.request(**fields), self.placement(alone))

    async def ask(self, attempt: DisaggKvAttempt) -> Any:
        """Both legs, as the connector sends them."""
        attempt.start_prefill()
        attempt.watch(waiting=attempt.prefilled)
        return await attempt.request_decode(attempt.decode_body())

    async def end(self, attempt: DisaggKvAttempt) -> None:
        attempt.release()
        await soon(self.background.ended())
        assert self.counts() == [0, 0, 0, 0]


class Hanging:
    """Answers that do not come until they are failed."""

    def __init__(self, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
        self.answers: dict[str, Response] = {}
        monkeypatch.setattr(bench.upstream, "request", self._request)

    async def _request(self, method: str, instance: Instance, path: str, **options: Any) -> Response:
        answer = self.answers[options["leg"]] = Response(self, options["leg"], reused=False)
        options["pending"].answer = answer
        await answer.wait_until(options["until"])
        return answer

    def abort(self) -> None: ...


@pytest.fixture
def own() -> OwnBench:
    return OwnBench()


async def test_both_legs_name_one_transfer(own: OwnBench) -> None:
    own.upstream.outcomes = [200, 200]
    attempt = own.own()
    assert own.counts() == [1, 1, 1, 1]
    await own.ask(attempt)
    bodies = [json.loads(sent.body) for sent in own.upstream.sent]
    transfer = bodies[0]["kv_transfer_params"]["transfer_id"]
    assert bodies[0]["kv_transfer_params"] == {"transfer_id": transfer} and bodies[0]["max_tokens"] == 1
    assert bodies[1]["kv_transfer_params"] == {"transfer_id": transfer, "from": TO_PREFILL}
    assert len({sent.headers for sent in own.upstream.sent}) == 1
    attempt.placement.release_kv()
    await own.end(attempt)
    assert not own.released


@pytest.mark.parametrize("outcome", [500, 400, RESET_FRESH, EngineUnreachable("x"), EngineDeadline("x")])
async def test_a_prefill_that_fails_releases_decode(own: OwnBench, outcome: ProxyError | int) -> None:
    own.upstream.outcomes = [outcome, 200]
    attempt = own.own()
    await own.ask(attempt)
    await soon(own.background.ended())
    assert [to for to, _ in own.released] == [TO_DECODE] and own.prefill.in_flight == 0
    attempt.placement.release_kv()
    await own.end(attempt)


async def test_a_stalled_prefill_releases_decode(own: OwnBench, monkeypatch: pytest.MonkeyPatch) -> None:
    Hanging(own, monkeypatch)
    attempt = own.own()
    attempt.start_prefill()
    (pending,) = own.prefill.progress.pending
    pending.fail(EngineFrozen("stalled"))
    await soon(own.background.ended())
    assert [to for to, _ in own.released] == [TO_DECODE] and attempt.prefilled
    assert own.prefill.failures_total == 1


async def test_a_stalled_decode_is_a_failure(own: OwnBench, monkeypatch: pytest.MonkeyPatch) -> None:
    Hanging(own, monkeypatch)
    attempt = own.own(alone=True)
    asked = asyncio.create_task(own.ask(attempt))
    await asyncio.sleep(0)
    attempt.decoding.fail(EngineFrozen("stalled"))
    with pytest.raises(EngineFrozen):
        await soon(asked)


async def test_a_cancelled_attempt_ends_both_legs_and_releases_prefill(
    own: OwnBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    hanging = Hanging(own, monkeypatch)
    attempt = own.own()
    ends: list[BaseException | None] = []
    work = InlineCoroutine(own.ask(attempt), lambda work, error: ends.append(error))
    work.start()
    assert set(hanging.answers) == {"prefill", "decode"} and len(own.background) == 1
    work.cancel()
    assert isinstance(ends[0], asyncio.CancelledError)
    await own.end(attempt)
    assert [to for to, _ in own.released] == [TO_PREFILL]


async def test_decode_is_waited_for_from_prefills_end_on(own: OwnBench, monkeypatch: pytest.MonkeyPatch) -> None:
    hanging = Hanging(own, monkeypatch)
    attempt = own.own()
    asked = asyncio.create_task(own.ask(attempt))
    await asyncio.sleep(0)
    own.world.time += 30
    assert own.decode.progress.stalled_for(own.world.time) == 0
    hanging.answers["prefill"].fail(EngineDisconnected("x", unsent=False, reused=False))
    own.world.time += 2
    assert own.decode.progress.stalled_for(own.world.time) == 2
    asked.cancel()
    await asyncio.gather(asked, return_exceptions=True)


@pytest.mark.parametrize("alone", [True, False])
async def test_decode_alone(own: OwnBench, alone: bool) -> None:
    """Without a prefill, and for prompt logprobs, which decode has to compute."""
    own.upstream.outcomes = [200]
    attempt = own.own(alone, **({} if alone else {"prompt_logprobs": 1, "max_tokens": 1}))
    assert attempt.placement.prefill is None and attempt.prefilled
    await own.ask(attempt)
    (sent,) = own.upstream.sent
    assert sent.leg == "decode" and "kv_transfer_params" not in json.loads(sent.body)
    own.world.time += 2
    assert own.decode.progress.stalled_for(own.world.time) == 2
    await own.end(attempt)
    assert not own.released
