"""What the stall detector decides at one check, on a clock that the test moves."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from disagg_proxy.cluster.instance import Instance, Role, State
from disagg_proxy.cluster.progress import PendingResponse
from disagg_proxy.errors import ProxyError
from disagg_proxy.health.peer_view import NoPeers
from disagg_proxy.health.stall_detector import StallDetector
from tests.connectors.conftest import Bench

pytestmark = pytest.mark.interpreted

SHORTEST, LONGEST = 20.0, 300.0


class Watched(Bench):
    """One pair, one prefill in flight towards the decode, and a stall detector over it."""

    def __init__(self) -> None:
        super().__init__()
        self.moved = 0
        self.given_up: list[ProxyError] = []
        self.stall_detector = StallDetector(self.world.registry, self.upstream, SHORTEST, LONGEST, b"")  # type: ignore[arg-type]
        self.receiver = self.placement().decode_lease
        self.pending = self.wait_for(self.prefill, tokens=512, receiver=self.receiver, move=self._move)

    def wait_for(self, instance: Instance, **options: Any) -> PendingResponse:
        """One more leg on an instance; what it fails with goes to ``given_up``."""
        pending = instance.progress.begin(self.world.registry.now, **options)
        pending.answer = SimpleNamespace(fail=self.given_up.append)
        return pending

    def _move(self) -> None:
        self.moved += 1

    def later(self, seconds: float, pinging: Instance | None = None, answering: Instance | None = None) -> None:
        """Some seconds pass, in which only these give a sign of life; the others' probes time out. Then a check."""
        self.world.time += seconds
        for instance in (self.prefill, self.decode):
            if instance is pinging:
                self.world.ping(instance.role, instance.http.port)
            if instance is answering:
                self.world.registry.admit(instance, instance.models)
            elif instance.state is not State.FROZEN:
                instance.probe_failures += 1
        self.world.registry.expire()
        self.stall_detector.check()

    @property
    def suspects(self) -> set[Instance]:
        return set(self.stall_detector._suspects)


@pytest.fixture
async def watched():
    one = Watched()
    yield one
    await one.stall_detector.stop()


@pytest.mark.parametrize("how", ["lost", "frozen", "ended", "replaced", "probes time out"])
async def test_a_request_may_leave_as_soon_as_its_decode_is_lost(watched: Watched, how: str) -> None:
    registry, decode = watched.world.registry, watched.decode
    watched.later(1.0, answering=decode)
    assert not watched.moved
    if how == "lost":
        watched.later(10.0, pinging=watched.prefill, answering=watched.prefill)
        assert decode.state is State.LOST
    elif how == "frozen":
        registry.freeze(decode, "stalled")
    elif how == "ended":
        registry.process_ended(decode)
    elif how == "replaced":
        registry.process_ended(decode)
        registry.admit(decode, decode.models)
    else:
        decode.probe_failures = 3
        registry.suspend(decode, "its /health does not answer in time")
    watched.stall_detector.check()
    assert watched.moved and not watched.given_up


async def test_a_refused_probe_moves_no_request(watched: Watched) -> None:
    """It is suspended briefly; its process runs, and decode may be sent to it when prefill is done."""
    decode = watched.decode
    watched.world.registry.has_liveness_connection = lambda instance: True
    watched.world.registry.suspend(decode, "its HTTP port refuses connections", gone=True)
    watched.stall_detector.check()
    assert decode.state is State.PROBING and not watched.moved


@pytest.mark.parametrize(
    ("known", "suspected_after"),
    [(0.0, SHORTEST / 2), (1.0, SHORTEST / 4), (15.0, 15.0)],
    ids=["nothing is known of it", "a quick one", "one that needs 15 s for such a prompt"],
)
async def test_a_prefill_whose_decode_is_lost_is_suspected_early_but_not_before_its_prompt_can_be_done(
    watched: Watched, known: float, suspected_after: float
) -> None:
    if known:
        for _ in range(9):
            watched.prefill.progress.baseline.add(known, 512)
    watched.world.registry.freeze(watched.decode, "stalled")
    watched.later(suspected_after, pinging=watched.prefill, answering=watched.prefill)
    assert watched.suspects == set()
    watched.later(0.1, pinging=watched.prefill, answering=watched.prefill)
    assert watched.suspects == {watched.prefill}


async def test_a_prefill_with_a_healthy_decode_has_its_learnt_deadline(watched: Watched) -> None:
    for _ in range(9):
        watched.prefill.progress.baseline.add(15.0, 512)
    for _ in range(37):
        watched.later(1.0, pinging=watched.prefill, answering=watched.prefill)
        watched.world.ping(Role.DECODE, watched.decode.http.port)
        watched.world.registry.admit(watched.decode, watched.decode.models)
    assert watched.suspects == set() and not watched.moved


async def test_a_process_without_a_sign_of_life_is_given_up(watched: Watched) -> None:
    decode = watched.decode
    watched.later(10.0, pinging=watched.prefill, answering=watched.prefill)
    watched.later(19.0, pinging=watched.prefill, answering=watched.prefill)
    assert (decode.state, decode.restart_wanted) == (State.LOST, False)
    wait = watched.wait_for(decode)
    watched.later(1.0, pinging=watched.prefill, answering=watched.prefill)
    assert (decode.state, decode.restart_wanted) == (State.LOST, True)
    assert decode.reason == "its process hangs: no ping and no answer from /health for 30 s; restart it"
    assert [(error.status, error.message) for error in watched.given_up] == [
        (504, "The decode instance does not answer.")
    ]
    wait.end()
    changes = len(watched.world.changed)
    watched.later(1.0, pinging=watched.prefill, answering=watched.prefill)
    assert len(watched.given_up) == 1 and len(watched.world.changed) == changes, "its restart is requested once"


class _Second(NoPeers):
    """Another worker has found everything before this one."""

    def report_hung(self, instance: Instance, last_sign: float) -> bool:
        return False

    def given_up(self, instance: Instance) -> bool:
        return True


@pytest.mark.parametrize("cause", ["hung", "stalled"])
@pytest.mark.parametrize("first", [True, False])
async def test_giving_up_is_logged_as_an_error_by_one_worker(watched: Watched, caplog, cause: str, first: bool) -> None:
    if not first:
        watched.stall_detector._peer_view = _Second()
    caplog.set_level("DEBUG", "disagg_proxy.health.stall_detector")
    if cause == "hung":
        watched.later(10.0, pinging=watched.prefill, answering=watched.prefill)
        watched.later(20.0, pinging=watched.prefill, answering=watched.prefill)
    else:
        watched.world.registry.freeze(watched.decode, "stalled")
        watched.stall_detector._give_up(watched.decode, "stalled; restart it")
    assert watched.decode.restart_wanted
    levels = [r.levelname for r in caplog.records if "decode" in r.message and "is given up" in r.message]
    assert levels == ["ERROR" if first else "DEBUG"]


@pytest.mark.parametrize("sign", ["ping", "answer", "refusal", "part of an answer", "never ready", "another process"])
async def test_a_process_with_a_sign_of_life_is_not_given_up(watched: Watched, sign: str) -> None:
    registry, decode = watched.world.registry, watched.decode
    if sign == "never ready":
        registry.process_ended(decode)
    for _ in range(40):
        watched.later(
            1.0,
            pinging=decode if sign == "ping" else watched.prefill,
            answering=decode if sign == "answer" else watched.prefill,
        )
        if sign == "refusal":
            registry.suspend(decode, "its HTTP port refuses connections", gone=True)
        elif sign == "part of an answer":
            decode.progress.outputs += 1
        elif sign == "another process" and decode.state is State.LOST:
            watched.world.ping(Role.DECODE, decode.http.port, boot=str(watched.world.time))
    assert not decode.restart_wanted


async def test_the_restart_request_ends_with_a_sign_of_life_and_with_the_process(watched: Watched) -> None:
    decode = watched.decode
    for sign in (lambda: watched.world.ping(Role.DECODE, 2), lambda: watched.world.registry.process_ended(decode)):
        watched.later(31.0)
        assert decode.restart_wanted
        sign()
        assert not decode.restart_wanted
        watched.world.ping(Role.DECODE, 2)
        watched.world.registry.admit(decode, decode.models)


async def test_requests_leave_a_prefill_that_is_lost_itself(watched: Watched) -> None:
    watched.later(10.0, pinging=watched.decode, answering=watched.decode)
    assert watched.prefill.state is State.LOST and watched.moved == 1
    assert not watched.given_up, "where there is no other, it may still answer"
    watched.later(20.0, pinging=watched.decode, answering=watched.decode)
    assert watched.prefill.restart_wanted and len(watched.given_up) == 1


@pytest.mark.parametrize("replaced", [False, True])
async def test_prefills_that_block_on_an_ended_process_do_not_give_up_its_successor(replaced: bool) -> None:
    watched = Watched()
    registry, decode = watched.world.registry, watched.decode
    other = watched.world.ready(Role.PREFILL, 3)
    watched.wait_for(other, receiver=watched.receiver)
    if replaced:
        registry.process_ended(decode)
        registry.admit(decode, decode.models)
    for prefill in (watched.prefill, other):
        registry.freeze(prefill, "stalled")
        watched.stall_detector._give_up(prefill, "stalled; restart it")
    assert len(watched.given_up) == 2
    assert (decode.state, decode.restart_wanted) == ((State.READY, False) if replaced else (State.FROZEN, True))
