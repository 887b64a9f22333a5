"""One request from its body to the end of its answer, without a client's connection."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import pytest

from disagg_proxy.coordinator.coordinator import RequestHead
from disagg_proxy.downstream.refusal import ClientResponse
from disagg_proxy.downstream.reply import Reply
from disagg_proxy.downstream.response_stream import ResponseStream
from disagg_proxy.errors import BadRequest, ProxyError, StreamCut
from disagg_proxy.openai.fields import COMPLETIONS
from tests.conftest import soon
from tests.simulated import Machine

CONNECTORS = pytest.mark.parametrize("connector", ["p2p_nccl", "disagg_kv"])


class Client:
    """Takes the outcome of one request, and its body if that is streamed."""

    write_framed = None

    def __init__(self) -> None:
        self.outcome: asyncio.Future[ClientResponse | ProxyError] = asyncio.get_running_loop().create_future()
        self.body = b""
        self.over = asyncio.Event()

    def respond(self, outcome: ClientResponse) -> None:
        self.outcome.set_result(outcome)
        if isinstance(outcome.body, ResponseStream):
            outcome.body.pipe_to(self)

    def refuse(self, error: ProxyError) -> None:
        self.outcome.set_result(error)

    def write(self, piece: bytes) -> None:
        self.body += piece

    def end(self) -> None:
        self.over.set()

    def cut(self, cause: StreamCut) -> None:
        self.over.set()


def start(machine: Machine, body: bytes) -> tuple[Client, Reply]:
    client = Client()
    reply = Reply(client)
    machine.proxy.services.coordinator.start(
        RequestHead(COMPLETIONS, [], b"content-type: application/json\r\n", None, b""), body, reply
    )
    return client, reply


def completion(**fields: Any) -> bytes:
    return json.dumps({"model": "sim-model", "prompt": "one two", "max_tokens": 4, **fields}).encode()


@pytest.mark.interpreted
@CONNECTORS
async def test_a_long_prompt_is_not_kept_while_its_answer_streams(machine: Machine, connector: str) -> None:
    _, decode = await machine.pair(connector=connector)
    body = completion(prompt="word " * 2000, stream=True)
    before = sys.getrefcount(body)
    decode.faults.hold("forward", after=2)
    client, reply = start(machine, body)
    assert isinstance(await soon(client.outcome), ClientResponse)
    assert not client.over.is_set() and sys.getrefcount(body) == before
    decode.faults.release()
    await soon(client.over.wait())
    reply.leave()
    assert client.body.endswith(b"data: [DONE]\n\n")


@CONNECTORS
async def test_a_client_that_leaves_the_queue_takes_no_place(machine: Machine, connector: str) -> None:
    pair = await machine.pair(connector=connector)
    instances = [machine.proxy.instance(engine.http_address) for engine in pair]
    for instance in instances:
        instance.in_flight += 10**6
    machine.proxy.services.admission_queue._limits = type(machine.proxy.services.admission_queue._limits)(
        decode=1, queue=10
    )
    client, reply = start(machine, completion())
    assert machine.proxy.services.admission_queue.waiting == 1 and not client.outcome.done()
    reply.leave()
    await soon(machine.proxy.until_idle())
    assert machine.proxy.services.admission_queue.waiting == 0
    assert [instance.in_flight for instance in instances] == [10**6, 10**6]
    for instance in instances:
        instance.in_flight -= 10**6
    assert machine.proxy.services.stats.outcomes == {"client_left": 1}


async def test_what_the_body_is_refused_for_is_delivered_within_the_call(machine: Machine) -> None:
    client, reply = start(machine, b"[]")
    assert isinstance(client.outcome.result(), BadRequest)
    reply.leave()
    assert machine.proxy.services.stats.outcomes == {"client_error": 1}


@pytest.mark.interpreted
async def test_a_bug_is_a_500_and_gives_everything_back(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = await machine.pair()

    async def bug(*args: object) -> None:
        raise ValueError("a bug")

    monkeypatch.setattr("disagg_proxy.connectors.p2p_nccl_legs.P2pAttempt.request_decode", bug)
    client, reply = start(machine, completion())
    error = await soon(client.outcome)
    assert isinstance(error, ProxyError) and error.status == 500
    reply.leave()
    await soon(machine.proxy.until_idle())
    for engine in pair:
        assert machine.proxy.instance(engine.http_address).in_flight == 0
