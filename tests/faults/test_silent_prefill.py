"""A prefill of this project's own connector whose process stops (SIGSTOP, swap, a dead host): its kernel still accepts
connections and data, but nothing answers. Decode must not wait for ``load_timeout_s``."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from disagg_proxy.cluster.instance import Role, State
from disagg_sim import SimEngine, expected_text
from tests.conftest import soon
from tests.e2e.together import (
    ASK,
    COMPLETIONS,
    OWN,
    PROMPT,
    REQUESTS,
    RIGHT,
    asked,
    clean,
    external,
    meets,
    right,
    settings,
)
from tests.simulated import Machine, text_of, text_of_events

PATIENT = {**OWN, "load_timeout": 600.0}
UNNOTICED = {"probe_interval": 60.0, "instance_expiry": 60.0}
"""The proxy does not find out."""


async def connected(machine: Machine, **knobs: Any) -> tuple[SimEngine, SimEngine]:
    """A pair that has met."""
    prefill, decode = await machine.pair(**PATIENT, **knobs)
    await soon(decode.wait_until(lambda s: bool(s["kv_links"])))
    return prefill, decode


def stop(engine: SimEngine) -> None:
    """As SIGSTOP; connections stay."""
    engine.faults.pings = engine.faults.kv_answers = False
    engine.faults.hold("schedule")
    engine.faults.hang_next(times=1000)


def go_on(engine: SimEngine) -> None:
    """As SIGCONT."""
    engine.faults.pings = engine.faults.kv_answers = True
    while engine.faults.injected_for("/health"):
        pass
    engine.faults.release()


def lose(machine: Machine, engine: SimEngine) -> None:
    """As after INSTANCE_EXPIRY without a ping. A short expiry would lose other engines too on a busy machine."""
    instance, registry = machine.proxy.instance(engine.http_address), machine.proxy.services.registry
    assert instance.last_ping is not None
    instance.last_ping -= UNNOTICED["instance_expiry"]
    registry.expire()
    assert instance.state is State.LOST


@settings(**UNNOTICED)
@pytest.mark.parametrize("stream", [False, True])
async def test_when_it_is_lost_decode_is_released_and_its_leg_is_ended(machine: Machine, stream: bool) -> None:
    prefill, decode = await connected(machine)
    stop(prefill)
    ask = machine.stream(COMPLETIONS, ASK) if stream else machine.post(COMPLETIONS, ASK)
    answer: asyncio.Task[Any] = asyncio.create_task(ask)
    await soon(prefill.wait_until(lambda s: bool(prefill.received(COMPLETIONS))))
    lose(machine, prefill)
    if stream:
        assert text_of_events(await soon(answer)) == RIGHT[COMPLETIONS]
    else:
        await right(answer)
    there = machine.proxy.instance(prefill.http_address)
    assert there.state is State.LOST and (there.in_flight, there.failures_total) == (0, 1)
    assert external(decode) == 0
    await clean(machine, decode)
    go_on(prefill)
    await soon(machine.proxy.until_state(prefill.http_address, State.READY))
    await right(machine.post(COMPLETIONS, {**ASK, "user": "again"}))
    await soon(machine.proxy.until_idle())


@settings(**UNNOTICED, prefill_policy="round_robin")
async def test_every_request_in_flight_is_released_and_those_on_others_are_not(machine: Machine) -> None:
    lost, decode = await connected(machine)
    kept = await machine.engine("prefill", **PATIENT)
    await machine.proxy.until_state(kept.http_address, State.READY)
    stop(lost)
    kept.faults.hold("forward")
    prompts = [f"{number} {PROMPT}" for number in range(100)]
    answers = [await asked(machine, {**ASK, "prompt": prompt}) for prompt in prompts]
    await soon(lost.wait_until(lambda s: len(lost.received(COMPLETIONS)) == 50))
    lose(machine, lost)
    await soon(asyncio.wait(answers, return_when=asyncio.FIRST_COMPLETED))
    kept.faults.release()
    for prompt, answer in zip(prompts, await soon(asyncio.gather(*answers)), strict=True):
        assert answer[0] == 200 and text_of(answer[2]) == expected_text(prompt, 8)
    assert machine.proxy.instance(kept.http_address).failures_total == 0
    assert external(decode) > 0
    await clean(machine, kept, decode)


@settings(probe_interval=60.0)
async def test_when_another_process_announces_itself_in_its_place(machine: Machine) -> None:
    """The host was lost: no reset ever comes from the old process."""
    prefill, decode = await connected(machine)
    stop(prefill)
    answer = await asked(machine)
    await soon(prefill.wait_until(lambda s: bool(prefill.received(COMPLETIONS))))
    there = machine.proxy.instance(prefill.http_address)
    assert there.kv is not None
    machine.proxy.services.registry.announce(Role.PREFILL, there.http, there.kv, there.kind, "another")
    await right(answer)
    assert external(decode) == 0
    await clean(machine, decode)


@settings(**UNNOTICED)
@pytest.mark.parametrize("path", REQUESTS)
async def test_decode_notices_without_the_proxy(machine: Machine, path: str) -> None:
    """By PING on the KV connection."""
    prefill, decode = await connected(machine, stall_timeout=0.2)
    stop(prefill)
    status, _, answer = await soon(machine.post(path, REQUESTS[path]))
    assert status == 200 and text_of(answer) == RIGHT[path]
    assert external(decode) == 0
    assert machine.proxy.instance(prefill.http_address).state is State.READY


@settings(**UNNOTICED)
async def test_a_prefill_that_is_only_slow_is_waited_for(machine: Machine) -> None:
    """Its step takes longer than the limit on silence; its KV port answers meanwhile."""
    prefill, decode = await connected(machine, stall_timeout=0.1)
    with prefill.faults.held("forward"):
        answer: asyncio.Task[Any] = await asked(machine)
        await meets(prefill, decode)
        assert not (await asyncio.wait((answer,), timeout=0.6))[0]
    await right(answer)
    assert external(decode) > 0
    await clean(machine, prefill, decode)
