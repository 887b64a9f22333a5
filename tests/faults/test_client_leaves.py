"""A client that leaves, at each moment: the prefill is never cancelled, no KV is left over, every count comes back to
zero, and the next request is right."""

import asyncio
import random
from collections.abc import AsyncIterator

import pytest

from disagg_proxy.connectors import p2p_nccl_loads
from tests.conftest import Wire, soon
from tests.simulated import REQUESTS

PATH = "/v1/completions"
ASK = REQUESTS[PATH]
LONG = {**ASK, "max_tokens": 5000, "ignore_eos": True}
KINDS = pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])


@pytest.fixture
def dial(dial_either_way):
    """Every test here runs over both ways in."""
    return dial_either_way


@pytest.fixture
async def client(machine, pair, dial) -> AsyncIterator[Wire]:
    """A connection whose owner the test lets go; afterwards everything must be as if it had never been there."""
    prefill, decode = pair
    yield await dial(machine.proxy.url)
    await soon(machine.proxy.until_idle())
    await machine.unharmed(prefill, decode)
    assert prefill.state()["aborted"] == 0, "a prefill that was sent is never cancelled"
    assert machine.proxy.services.stats.in_flight == 0
    assert [machine.proxy.instance(engine.http_address).in_flight for engine in pair] == [0, 0]
    await machine.check_right()


def drains(machine) -> int:
    return machine.proxy.services.stats.kv_releases.done


async def test_while_it_sends_the_body(machine, pair, client: Wire) -> None:
    client.start(PATH, "Content-Length: 100")
    client.send(b'{"model": "sim-model"')
    while not machine.proxy.exchanges:
        await asyncio.sleep(0)
    await machine.left(client)
    assert not pair[0].received(PATH)


@KINDS
@pytest.mark.parametrize("point", ["schedule", "forward", "answer"], ids=["queued", "computing", "computed"])
async def test_during_the_prefill(machine, pair, client: Wire, point: str, stream: bool) -> None:
    prefill, decode = pair
    with prefill.faults.held(point):
        client.post(PATH, {**LONG, "stream": stream})
        await soon(prefill.wait_until(lambda state: state["held_at"] == point))
        await machine.left(client)
        assert machine.proxy.instance(decode.http_address).in_flight == 1, "its place is kept for the drain"
        assert not decode.received(PATH)
    await soon(machine.proxy.until_idle())
    (drain,) = decode.received(PATH)
    assert drain.json["max_tokens"] == 1 and drains(machine) == 1
    assert machine.proxy.services.stats.outcomes == {"client_left": 1}


@pytest.fixture
def proven_soon(machine, pair, monkeypatch) -> None:
    """A decode that is slow enough for its counters to show that it has loaded the KV of an unstreamed request."""
    object.__setattr__(pair[1].config, "time_per_output_token", 0.005)
    monkeypatch.setattr(p2p_nccl_loads, "POLL_INTERVAL", 0.02)
    machine.proxy.services.coordinator._connectors["p2p_nccl"]._loads._timeouts.seconds = 0.05


@pytest.mark.interpreted
@KINDS
async def test_between_the_legs(machine, pair, client: Wire, monkeypatch, proven_soon, stream: bool) -> None:
    decode = pair[1]
    upstream = machine.proxy.services.upstream
    original, gone = upstream.request, []

    async def request(method, instance, path, **options):
        if options["leg"] == "decode" and not gone:
            gone.append(client)
            await machine.left(client)
        return await original(method, instance, path, **options)

    monkeypatch.setattr(upstream, "request", request)
    client.post(PATH, {**LONG, "stream": stream})
    await soon(decode.wait_until(lambda state: state["aborted"] == 1))
    await soon(machine.proxy.until_idle())
    assert gone and drains(machine) == 0 and len(decode.received(PATH)) == 1


@pytest.mark.parametrize("point", ["schedule", "forward", "answer"], ids=["queued", "loading", "decoding"])
async def test_before_the_first_byte(machine, pair, client: Wire, point: str) -> None:
    decode = pair[1]
    with decode.faults.held(point):
        client.post(PATH, {**LONG, "stream": True})
        await soon(decode.wait_until(lambda state: state["held_at"] == point))
        await machine.left(client)
        assert len(machine.proxy.services.background) == 1, "decode is aborted only when it has loaded the KV"
    await soon(decode.wait_until(lambda state: state["aborted"] == 1))


@pytest.mark.interpreted
@KINDS
async def test_decode_is_not_aborted_before_it_has_loaded_the_kv(
    machine, pair, client: Wire, proven_soon, stream: bool
) -> None:
    decode = pair[1]
    with decode.faults.held():
        client.post(PATH, {**LONG, "stream": stream})
        await soon(decode.wait_until(lambda state: state["held_at"] == "schedule"))
        await machine.left(client)
        counted = len(decode.received("/metrics"))
        while not stream and len(decode.received("/metrics")) < counted + 3:
            await asyncio.sleep(0.01)
        assert decode.state()["kv_waiting"] and machine.proxy.instance(decode.http_address).kv_waiting_tokens
    await soon(decode.wait_until(lambda state: state["aborted"] == 1))
    assert decode.state()["kv_buffer_used"] == 0, "the KV of a request that is aborted earlier counts indefinitely"
    assert decode.state()["steps"] < 1000


@pytest.mark.interpreted
async def test_while_decode_makes_a_whole_answer(machine, pair, client: Wire, proven_soon) -> None:
    decode = pair[1]
    client.post(PATH, LONG)
    await soon(decode.wait_until(lambda state: state["running"] == 1))
    await machine.left(client)
    await soon(machine.proxy.until_idle())
    await soon(decode.wait_until(lambda state: state["aborted"] == 1))
    assert decode.state()["steps"] < 1000


@pytest.mark.parametrize("path", REQUESTS)
async def test_in_mid_stream(machine, pair, client: Wire, path: str) -> None:
    decode = pair[1]
    decode.faults.hold("schedule", after=3)
    client.post(path, {**REQUESTS[path], "max_tokens": 5000, "ignore_eos": True, "stream": True})
    assert (await client.head())[0] == 200
    await client.chunk()
    await soon(decode.wait_until(lambda state: state["held_at"] == "schedule"))
    await machine.left(client)
    decode.faults.release()
    state = await soon(decode.wait_until(lambda state: state["aborted"] == 1))
    assert state["steps"] < 1000, "decode stops long before its 5000 tokens"
    assert drains(machine) == 0 and len(decode.received(path)) == 1
    assert machine.proxy.services.stats.outcomes == {"client_left": 1}
    assert machine.proxy.instance(decode.http_address).failures_total == 0


@KINDS
async def test_at_the_end(machine, pair, client: Wire, stream: bool) -> None:
    client.post(PATH, {**ASK, "stream": stream})
    await client.answer()
    await machine.left(client)
    assert machine.proxy.services.stats.outcomes == {"ok": 1}


async def test_without_reading_a_byte_of_a_finished_stream(machine, pair, client: Wire) -> None:
    client.post(PATH, {**ASK, "stream": True})
    await soon(pair[1].wait_until(lambda state: state["finished"] == 1))
    await machine.left(client)


async def test_a_client_that_leaves_disturbs_no_other(machine, pair, client: Wire) -> None:
    decode = pair[1]
    decode.faults.hold("schedule", after=1)
    others = [asyncio.create_task(machine.post(PATH, {**ASK, "prompt": f"{n} times"})) for n in range(5)]
    client.post(PATH, {**LONG, "stream": True})
    await soon(decode.wait_until(lambda state: state["held_at"] == "schedule"))
    await left_alone(client)
    decode.faults.release()
    assert [status for status, _, _ in await soon(asyncio.gather(*others))] == [200] * 5


async def left_alone(client: Wire) -> None:
    client.leave()
    await asyncio.sleep(0)


@pytest.mark.parametrize("seed", range(3))
async def test_a_hundred_clients_that_leave_at_random_moments(machine, dial, seed: int) -> None:
    rng = random.Random(seed)
    prefill, decode = await machine.pair(prefill_tokens_per_second=20_000, time_per_output_token=0.001)

    async def visit() -> None:
        path = rng.choice(list(REQUESTS))
        body = {**REQUESTS[path], "max_tokens": rng.choice([1, 20, 200]), "stream": rng.random() < 0.7}
        ticks, chunks = rng.randrange(400), rng.randrange(30)
        client = await dial(machine.proxy.url)
        client.post(path, body)
        for _ in range(ticks):
            await asyncio.sleep(0)
        if body["stream"] and rng.random() < 0.5:
            status, _ = await client.head()
            assert status == 200
            while chunks and await client.chunk():
                chunks -= 1
        client.leave()

    await soon(asyncio.gather(*(visit() for _ in range(100))))
    await soon(machine.proxy.until_idle())
    await machine.unharmed(prefill, decode)
    assert decode.state()["kv_buffer_used"] == 0
    assert prefill.state()["aborted"] == 0
    assert sum(machine.proxy.services.stats.outcomes.values()) == prefill.state()["finished"]
    assert machine.proxy.services.stats.kv_releases.failed == 0
    assert [machine.proxy.instance(engine.http_address).in_flight for engine in (prefill, decode)] == [0, 0]
    for path in REQUESTS:
        await machine.check_right(path)
