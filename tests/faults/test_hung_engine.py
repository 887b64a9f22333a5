"""An engine process that is stopped as a whole: no ping, no answer, though the kernel still accepts its connections.

The engine is a process of its own that gets SIGSTOP, as one is that swaps, is debugged or hangs in the kernel.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack

import pytest

from disagg_proxy.cluster.instance import Role, State
from disagg_proxy.config.model import StaticInstance
from disagg_proxy.connectors.table import kind_named
from disagg_sim import SimEngine
from tests.command import EngineProcess, engine_process
from tests.conftest import soon
from tests.faults.conftest import ids
from tests.faults.test_frozen_engine import ask_for
from tests.simulated import REQUESTS, RIGHT, Machine, check_error

PATH = "/v1/completions"
ASK = REQUESTS[PATH]
SETTINGS = {
    "prefill_policy": "round_robin",
    "decode_policy": "round_robin",
    "instance_expiry": 2.0,
    "probe_interval": 0.5,
    "freeze_after_min": 2.0,
    "freeze_after_max": 60.0,
}
"""The learnt deadline is out of reach, since fewer than 8 answers are known: nothing here may wait for it."""
QUICK = pytest.mark.settings(**SETTINGS)


def name(machine: Machine, engine: EngineProcess | SimEngine, role: str, connector: str) -> None:
    """As on the proxy's command line, for an engine without pings."""
    nixl = connector == "nixl"
    named = StaticInstance(engine.http_address, None if nixl else engine.kv_address)
    machine.proxy.services.registry.add_static(Role(role), named, kind_named("nixl" if nixl else None))


async def engine(machine: Machine, role: str, connector: str) -> SimEngine:
    """An engine inside this process."""
    one = await machine.engine(role, connector=connector)
    if connector == "nixl":
        name(machine, one, role, connector)
    await soon(machine.proxy.until_state(one.http_address, State.READY))
    return one


Start = Callable[..., Awaitable[EngineProcess]]


@pytest.fixture
async def process(machine: Machine) -> AsyncIterator[Start]:
    """Starts an engine as a process of its own, by default one that pings."""
    async with AsyncExitStack() as stack:

        async def start(role: str, connector: str = "p2p_nccl", pings: bool = True) -> EngineProcess:
            proxy = machine.proxy.zmq if pings else None
            engine = await stack.enter_async_context(engine_process(role, proxy, "--connector", connector))
            if not pings or connector == "nixl":
                name(machine, engine, role, connector)
            await soon(machine.proxy.until_state(engine.http_address, State.READY))
            return engine

        yield start


async def shown(machine: Machine, engine) -> dict:
    _, stats = await machine.get("/stats")
    return next(i for i in stats["instances"] if i["http_address"] == engine.http_address)


async def until_restart_is_wanted(machine: Machine, engine) -> dict:
    there = machine.proxy.instance(engine.http_address)
    await soon(machine.proxy.until(lambda: there.restart_wanted))
    return await shown(machine, engine)


@QUICK
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("pings", [True, False], ids=["pings", "static"])
async def test_requests_leave_a_prefill_that_sends_to_a_stopped_decode(machine, process, stream, pings) -> None:
    """They move when it is lost; the prefill is found by its counters; the restart of both is asked for."""
    prefills = [await machine.engine("prefill"), await machine.engine("prefill")]
    decode = await machine.engine("decode")
    for one in (*prefills, decode):
        await soon(machine.proxy.until_state(one.http_address, State.READY))
    stopped = await process("decode", pings=pings)
    stopped.stop()
    answers = await soon(asyncio.gather(*(ask_for(machine, stream) for _ in range(4))))
    assert answers == [RIGHT[PATH]] * 4
    assert len(ids(decode)) == len(set(ids(decode))) == 4
    blocked = [prefill for prefill in prefills if prefill.state()["sender"]]
    assert len(blocked) == 1, "each prefill has sent to one decode"
    found = await until_restart_is_wanted(machine, blocked[0])
    assert found["state"] == "frozen" and "no scheduler step" in found["reason"]
    assert await soon(ask_for(machine, stream)) == RIGHT[PATH], "nothing new goes to the blocked prefill"
    hung = await until_restart_is_wanted(machine, stopped)
    assert hung["state"] == ("lost" if pings else "probing")
    said = "no ping and no answer from /health for" if pings else "its process hangs: no answer from /health for"
    assert said in hung["reason"]
    fine = next(prefill for prefill in prefills if prefill is not blocked[0])
    assert (await shown(machine, fine))["freezes"] == 0
    # As the supervisor restarts them: the wish ends with the process.
    await stopped.kill()
    await machine.kill(blocked[0])
    there = machine.proxy.instance(stopped.http_address)
    await soon(machine.proxy.until(lambda: not there.restart_wanted))
    await soon(machine.proxy.until_idle())
    assert machine.proxy.services.stats.kv_releases.started == 0, "the KV is gone with the process"
    await machine.unharmed(fine, decode)


@pytest.mark.settings(**{**SETTINGS, "freeze_after_min": 30.0})
async def test_kv_that_reaches_a_decode_after_its_stop_is_released(machine, process) -> None:
    prefills = [await machine.engine("prefill"), await machine.engine("prefill")]
    decode = await machine.engine("decode")
    for one in (*prefills, decode):
        await soon(machine.proxy.until_state(one.http_address, State.READY))
    stopped = await process("decode")
    stopped.stop()
    answers = await soon(asyncio.gather(*(ask_for(machine, stream=True) for _ in range(4))))
    assert answers == [RIGHT[PATH]] * 4
    stopped.resume()
    await soon(machine.proxy.until_idle())
    drains = machine.proxy.services.stats.kv_releases
    assert (drains.started, drains.done) == (2, 2)
    async with machine.http.get(f"http://{stopped.http_address}/sim/state") as answer:
        state = await answer.json()
    assert not state["kv_waiting"] and not state["stalled_on"]
    assert not (await shown(machine, stopped))["restart_wanted"]
    await machine.unharmed(*prefills, decode)


@QUICK
async def test_without_another_pair_the_request_waits_until_its_prefill_is_found(machine, process) -> None:
    prefill, stopped = await machine.engine("prefill"), await process("decode")
    await soon(machine.proxy.until_pairs())
    stopped.stop()
    message = check_error(*await soon(machine.send(PATH, ASK)), 504, "engine_frozen")
    assert message == "The prefill instance is stalled."
    assert (await until_restart_is_wanted(machine, prefill))["state"] == "frozen"
    assert (await until_restart_is_wanted(machine, stopped))["state"] == "lost"
    status, report = await machine.get("/health")
    assert status == 503 and "hangs" in " ".join(report["missing"]) and "127.0.0.1" not in " ".join(report["missing"])


@QUICK
@pytest.mark.parametrize("connector", ["p2p_nccl", "disagg_kv", "nixl"])
async def test_a_stopped_prefill_holds_nobody_and_is_named_for_a_restart(machine, process, connector: str) -> None:
    spare, decode = await engine(machine, "prefill", connector), await engine(machine, "decode", connector)
    stopped = await process("prefill", connector)
    stopped.stop()
    answers = await soon(asyncio.gather(*(ask_for(machine, stream=True) for _ in range(4))))
    assert answers == [RIGHT[PATH]] * 4
    hung = await until_restart_is_wanted(machine, stopped)
    assert hung["state"] == ("probing" if connector == "nixl" else "lost") and "hangs" in hung["reason"]
    await stopped.kill()
    await soon(machine.proxy.until_idle())
    await machine.unharmed(spare, decode)


@QUICK
@pytest.mark.parametrize("connector", ["p2p_nccl", "disagg_kv", "nixl"])
async def test_streams_of_a_stopped_decode_are_cut_when_its_restart_is_wanted(machine, process, connector: str) -> None:
    prefill, stopped = await engine(machine, "prefill", connector), await process("decode", connector)
    body = {**ASK, "max_tokens": 30_000, "ignore_eos": True, "stream": True}
    async with machine.http.post(machine.proxy.url + PATH, json=body) as stream:
        await soon(stream.content.readany())
        stopped.stop()

        async def read_on() -> None:
            async for _ in stream.content.iter_any():
                pass

        reading = asyncio.ensure_future(read_on())
        await until_restart_is_wanted(machine, stopped)
        with pytest.raises(Exception, match=r"(?i)payload|reset|disconnected"):
            await soon(reading)
    await stopped.kill()
    await soon(machine.proxy.until_idle())
    assert prefill.state()["dead"] is None
