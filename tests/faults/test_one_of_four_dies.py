"""Two prefills and two decodes under load, any one of them killed: only the streams that decode on it are lost."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

import aiohttp
import pytest

from disagg_sim import SimEngine, expected_text
from tests.conftest import soon
from tests.faults.conftest import ids
from tests.simulated import Machine, events, text_of_events

PATH = "/v1/completions"
TOKENS = 40
REFUSED = {"prompt": "x", "temperature": -1}


@dataclass
class Load:
    """Streams that run at the same time, each with a prompt of its own."""

    machine: Machine
    streams: dict[str, "asyncio.Task[bytes | None]"] = field(default_factory=dict)

    async def add(self, count: int, sent: Callable[[], int]) -> None:
        """One after the other, so that each pair is chosen with the ones before in mind."""
        for _ in range(count):
            prompt = f"Stream {len(self.streams)}"
            before = sent()
            self.streams[prompt] = asyncio.create_task(self._stream(prompt))
            while sent() == before:
                await asyncio.sleep(0)

    async def _stream(self, prompt: str) -> bytes | None:
        """The whole answer; None when it was cut."""
        body = {"prompt": prompt, "max_tokens": TOKENS, "ignore_eos": True, "stream": True}
        async with self.machine.http.post(self.machine.proxy.url + PATH, json=body) as answer:
            assert answer.status == 200, await answer.read()
            try:
                return await answer.read()
            except aiohttp.ClientError:
                return None

    async def lost(self) -> set[str]:
        """Those that were cut; all others must be right."""
        await soon(asyncio.gather(*self.streams.values()))
        lost = {prompt for prompt, task in self.streams.items() if task.result() is None}
        for prompt in self.streams.keys() - lost:
            right = expected_text(prompt, TOKENS, ignore_eos=True)
            assert text_of_events(events(self.streams[prompt].result())) == right
        return lost


def prompts(engine: SimEngine) -> set[str]:
    return {request.json["prompt"] for request in engine.received(PATH)}


async def until_all_kv_is_there(prefills: list[SimEngine], decode: SimEngine) -> None:
    """The last layer is still under way when prefill says that it has sent everything."""
    asked = [request for prefill in prefills for request in prefill.received(PATH) if "temperature" not in request.json]
    sent = sum(decode.kv_address in r.headers["X-Request-Id"].partition("___decode_addr_")[2] for r in asked)
    await soon(decode.wait_until(lambda state: state["kv_received"] == sent * decode.config.kv_layers))


@pytest.mark.settings(
    prefill_policy="least_loaded", decode_policy="least_loaded", probe_interval=60.0, instance_expiry=60.0
)
@pytest.mark.parametrize("victim", range(4), ids=["first prefill", "second prefill", "first decode", "second decode"])
async def test_only_the_streams_that_decode_on_it_are_lost(machine, four, victim: int) -> None:
    prefills, decodes = four
    engines = [*prefills, *decodes]
    dies = engines[victim]
    load = Load(machine)

    # Streams in the middle of their answers: of both prefills, on both decodes.
    for decode in decodes:
        decode.faults.hold("schedule")
    for count in (7, 2, 4):
        await load.add(count, lambda: len(ids(*decodes)))
        # It takes a turn without staying, so that each prefill meets both decodes.
        assert (await machine.post(PATH, REFUSED))[0] == 400
    for decode in decodes:
        decode.faults.step("schedule", 5)
        await soon(decode.wait_until(lambda state: state["steps"] == 5 and state["held_at"] == "schedule"))
    decoding = {decode: prompts(decode) for decode in decodes}
    assert all(decoding[decode] & prompts(prefill) for decode in decodes for prefill in prefills)

    # And requests in the middle of their prefill. Those whose KV is still to be sent towards a dead decode freeze
    # their prefill, which test_engine_dies.py shows; here it has been sent when a decode dies.
    for prefill in prefills:
        prefill.faults.hold("schedule")
    await load.add(8, lambda: len(ids(*prefills)))
    if dies in decodes:
        for prefill in prefills:
            prefill.faults.hold("answer")
            prefill.faults.release("schedule")
            await soon(prefill.wait_until(lambda state: state["held_at"] == "answer" and state["waiting"] == 0))
        await until_all_kv_is_there(prefills, dies)

    await machine.kill(dies)
    for engine in engines:
        engine.faults.release()
    assert await load.lost() == decoding.get(dies, set())

    await soon(machine.proxy.until_idle())
    assert len(ids(*decodes)) == len(set(ids(*decodes))), "no id is decoded twice"
    stats = machine.proxy.services.stats
    assert stats.kv_releases.started == 0 and stats.failovers > 0
    assert [machine.proxy.instance(engine.http_address).in_flight for engine in engines] == [0] * 4
    before = len(dies.requests)
    for _ in range(4):
        await machine.check_right()
    assert len(dies.requests) == before
    await machine.unharmed(*(engine for engine in engines if engine is not dies))
