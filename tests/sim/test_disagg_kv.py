"""Engines with this project's own connector: both legs in any order, and decode depends on nobody."""

from __future__ import annotations

import asyncio
import contextlib
import re
import uuid
from collections.abc import AsyncIterator
from typing import Any

import msgpack
import pytest
import zmq
import zmq.asyncio

from disagg_kv.control import Control
from disagg_kv.protocol.frames import Kind
from disagg_kv.protocol.frames import encode as frame
from disagg_kv.protocol.handshake import Refused
from disagg_proxy.address import parse_address
from disagg_proxy.cluster.instance import Instance, Role, Source
from disagg_proxy.connectors.disagg_kv import KIND
from disagg_proxy.discovery.announcement import decode as decode_ping
from disagg_proxy.upstream.kv_control import KvControl
from disagg_sim import SimConfig, SimEngine, encode, expected_chat_text, expected_text
from disagg_sim.connectors.disagg_kv_wire import announcement, identity
from tests.conftest import soon

from .pair import CHAT, COMPLETIONS, MESSAGES, Answer, Pair, running

OWN = {"connector": "disagg_kv"}
PROMPT = " ".join(f"word{n}" for n in range(40))
RIGHT = expected_text(PROMPT, 8)
TOKENS = len(encode(PROMPT))
MESSAGE = [{"role": "user", "content": PROMPT}]


async def released(address: str, transfer: str) -> None:
    """As the proxy does it."""
    kv = parse_address(address)
    await KvControl("", 5.0).release(Instance(Role.DECODE, kv, kv, Source.PING, KIND), transfer)


@pytest.fixture
async def pair() -> AsyncIterator[Pair]:
    async with running(OWN, OWN) as engines:
        yield engines


class Transfer:
    """The two legs of one request."""

    def __init__(self, pair: Pair, path: str = COMPLETIONS, transfer: str = "", **body: Any) -> None:
        self.pair, self.path, self.id = pair, path, transfer or uuid.uuid4().hex
        prompt = {"prompt": PROMPT} if path == COMPLETIONS else {"messages": MESSAGE}
        self.body = {"model": "sim-model", "max_tokens": 8, **prompt, **body}

    def prefill(self) -> asyncio.Task[Answer]:
        params = {"transfer_id": self.id}
        return asyncio.create_task(
            self.pair.prefill(self.path, self.body, "x", kv_transfer_params=params, stream=False)
        )

    def decode(self, source: str | None = None) -> asyncio.Task[Answer]:
        params = {"transfer_id": self.id, "from": source or self.pair.p.kv_address}
        return asyncio.create_task(self.pair.post(self.pair.d, self.path, {**self.body, "kv_transfer_params": params}))


def sources(engine: SimEngine) -> dict[str, int]:
    return dict(engine.state()["tokens_by_source"])


def computed(engine: SimEngine) -> bool:
    return sources(engine)["external_kv_transfer"] == 0 and sources(engine)["local_compute"] > 0


async def idle(pair: Pair) -> None:
    for engine in (pair.p, pair.d):
        await soon(engine.wait_until(lambda s: not (s["kv_waiting"] or s["running"] or s["waiting"])))
    assert pair.p.state()["kv_wants"] == 0


async def waits(pair: Pair) -> None:
    await soon(pair.d.wait_until(lambda s: s["kv_waiting"] and s["kv_links"]))
    await soon(pair.p.wait_until(lambda s: s["kv_wants"] or s["kv_waiting"]))


@pytest.mark.parametrize("order", ["prefill first", "decode first", "at once"])
async def test_both_legs_in_any_order(pair: Pair, order: str) -> None:
    transfer = Transfer(pair)
    if order == "prefill first":
        assert (await transfer.prefill()).status == 200
        await pair.p.wait_until(lambda s: s["kv_waiting"])
        answer = await transfer.decode()
    elif order == "decode first":
        decode = transfer.decode()
        await waits(pair)
        await transfer.prefill()
        answer = await decode
    else:
        _, answer = await asyncio.gather(transfer.prefill(), transfer.decode())
    assert answer.json["choices"][0]["text"] == RIGHT
    assert sources(pair.d) == {"local_compute": 1, "local_cache_hit": 0, "external_kv_transfer": TOKENS - 1}
    shown = (await pair.get(pair.d, "/metrics")).text
    assert f'source="external_kv_transfer"}} {TOKENS - 1}.0' in shown and 'source="local_compute"} 1.0' in shown
    await idle(pair)


@pytest.mark.parametrize("path", [CHAT, MESSAGES])
async def test_every_generation_route(pair: Pair, path: str) -> None:
    transfer = Transfer(pair, path)
    _, answer = await asyncio.gather(transfer.prefill(), transfer.decode())
    text = answer.json["content"][0]["text"] if path == MESSAGES else answer.json["choices"][0]["message"]["content"]
    assert text == expected_chat_text(MESSAGE, 8)
    assert sources(pair.d)["external_kv_transfer"] > 16
    await idle(pair)


async def test_prompt_lists_and_n_share_transfers(pair: Pair) -> None:
    prompts = [PROMPT, f"{PROMPT} more", PROMPT]
    transfer = Transfer(pair, prompt=prompts, n=2, temperature=1.0)
    _, answer = await asyncio.gather(transfer.prefill(), transfer.decode())
    texts = [choice["text"] for choice in answer.json["choices"]]
    assert texts == [expected_text(prompt, 8, index=index) for prompt in prompts for index in range(2)]
    assert sources(pair.d)["external_kv_transfer"] == TOKENS - 1 + len(encode(prompts[1])) - 1
    await idle(pair)


async def test_chunked_prefill_arrives_in_parts() -> None:
    async with running({**OWN, "max_num_batched_tokens": 32}, OWN) as pair:
        pair.p.faults.hold("forward", after=1)
        transfer = Transfer(pair, prompt=" ".join(f"w{n}" for n in range(100)))
        prefill, decode = transfer.prefill(), transfer.decode()
        await soon(pair.p.wait_until(lambda s: s["held_at"] == "forward" and s["kv_sent"] == 2))
        pair.p.faults.release()
        answer = await decode
        await prefill
        assert answer.json["choices"][0]["text"] == expected_text(transfer.body["prompt"], 8)
        assert pair.p.state()["kv_sent"] == -(-len(encode(transfer.body["prompt"])) // 16)


@pytest.mark.parametrize("params", [None, {}, {"transfer_id": "bad id"}, {"transfer_id": "x", "from": "nowhere"}])
async def test_without_usable_params_it_is_computed(pair: Pair, params: Any) -> None:
    for engine in (pair.p, pair.d):
        body = {"prompt": PROMPT, "max_tokens": 8, "kv_transfer_params": params}
        answer = await pair.post(engine, COMPLETIONS, body, "no addresses in here")
        assert answer.json["choices"][0]["text"] == RIGHT
    assert computed(pair.d) and pair.d.state()["dead"] is None


async def test_equal_request_ids_and_no_ids_kill_nobody(pair: Pair) -> None:
    body = {"prompt": PROMPT, "max_tokens": 4}
    answers = await asyncio.gather(*(pair.post(pair.d, COMPLETIONS, body, "same") for _ in range(5)))
    assert {answer.status for answer in answers} == {200}
    assert pair.d.state()["dead"] is None


async def test_a_waiting_request_holds_up_no_other(pair: Pair) -> None:
    decode = Transfer(pair).decode()
    await waits(pair)
    assert (await pair.post(pair.d, COMPLETIONS, {"prompt": "other", "max_tokens": 4})).status == 200
    other = Transfer(pair, prompt=f"{PROMPT} too")
    await asyncio.gather(other.prefill(), other.decode())
    assert not decode.done() and sources(pair.d)["external_kv_transfer"] == len(encode(other.body["prompt"])) - 1
    decode.cancel()
    await idle(pair)


@pytest.mark.parametrize("what", ["released", "killed", "aborted", "released on prefill"])
async def test_kv_that_does_not_come_is_computed(what: str) -> None:
    async with running({**OWN, "max_num_batched_tokens": 32}, OWN) as pair:
        await does_not_come(pair, what)


async def does_not_come(pair: Pair, what: str) -> None:
    transfer = Transfer(pair)
    prefill = None
    if what in ("aborted", "killed"):
        pair.p.faults.hold("forward", after=1)
        prefill = transfer.prefill()
    decode = transfer.decode()
    await waits(pair)
    if prefill is not None:
        await pair.p.wait_until(lambda s: s["held_at"] == "forward" and s["kv_sent"] == 2)
    if what == "aborted":
        assert prefill is not None
        prefill.cancel()
        await pair.p.wait_until(lambda s: s["aborting"] == 1)
        pair.p.faults.release()
    elif what == "killed":
        await pair.p.kill()
    else:
        address = pair.p.kv_address if what == "released on prefill" else pair.d.kv_address
        await released(address, transfer.id)
    answer = await soon(decode)
    assert answer.json["choices"][0]["text"] == RIGHT
    assert computed(pair.d)
    if prefill is not None:
        await asyncio.gather(prefill, return_exceptions=True)


async def test_a_dead_prefill_is_noticed_at_once(pair: Pair) -> None:
    await pair.p.kill()
    answer = await soon(Transfer(pair).decode())
    assert answer.json["choices"][0]["text"] == RIGHT and computed(pair.d)


async def test_kv_that_is_late_is_computed() -> None:
    async with running(OWN, {**OWN, "load_timeout": 0.05}) as pair:
        answer = await soon(Transfer(pair).decode())
        assert answer.json["choices"][0]["text"] == RIGHT and computed(pair.d)
        await soon(pair.p.wait_until(lambda s: s["kv_wants"] == 0))


async def test_kv_that_nobody_fetches_expires() -> None:
    async with running({**OWN, "hold_timeout": 0.05}, OWN) as pair:
        transfer = Transfer(pair)
        await transfer.prefill()
        await soon(pair.p.wait_until(lambda s: not s["kv_waiting"]))
        assert (await transfer.decode()).json["choices"][0]["text"] == RIGHT
        assert computed(pair.d)


async def test_the_proxy_releases_what_prefill_holds(pair: Pair) -> None:
    transfer = Transfer(pair)
    await transfer.prefill()
    assert pair.p.state()["kv_waiting"]
    await released(pair.p.kv_address, transfer.id)
    await soon(pair.p.wait_until(lambda s: not s["kv_waiting"]))


async def test_an_aborted_decode_releases_what_it_asked_for(pair: Pair) -> None:
    transfer = Transfer(pair)
    decode = transfer.decode()
    await waits(pair)
    decode.cancel()
    await soon(pair.p.wait_until(lambda s: s["kv_wants"] == 0))
    await idle(pair)


async def test_a_killed_decode_leaves_prefill_alone(pair: Pair) -> None:
    decode = Transfer(pair).decode()
    await waits(pair)
    await pair.d.kill()
    await asyncio.gather(decode, return_exceptions=True)
    await soon(pair.p.wait_until(lambda s: s["kv_wants"] == 0))
    pair.d = pair.d.restarted()
    await pair.d.start()
    transfer = Transfer(pair)
    _, answer = await asyncio.gather(transfer.prefill(), transfer.decode())
    assert answer.json["choices"][0]["text"] == RIGHT
    assert sources(pair.d)["external_kv_transfer"] == TOKENS - 1


async def test_wrong_kv_shows(pair: Pair) -> None:
    pair.p.faults.corrupt_kv = True
    transfer = Transfer(pair)
    _, answer = await asyncio.gather(transfer.prefill(), transfer.decode())
    assert answer.status == 200 and answer.json["choices"][0]["text"] != RIGHT


async def test_prompt_logprobs_are_right_on_decode(pair: Pair) -> None:
    transfer = Transfer(pair, prompt_logprobs=1)
    _, answer = await asyncio.gather(transfer.prefill(), transfer.decode())
    right = await pair.post(pair.p, COMPLETIONS, transfer.body)
    got, wanted = (a.json["choices"][0]["prompt_logprobs"] for a in (answer, right))
    assert got == wanted and len(got) == TOKENS
    assert computed(pair.d)


@pytest.mark.parametrize("trait", [{"kv_dtype": "float16"}, {"kv_block_size": 32}, {"tp": 2}, {"kv_secret": "other"}])
async def test_engines_that_do_not_fit_compute(trait: dict[str, Any]) -> None:
    async with running({**OWN, "kv_secret": "one"}, {**OWN, "kv_secret": "one", **trait}) as pair:
        answer = await soon(Transfer(pair).decode())
        assert answer.json["choices"][0]["text"] == RIGHT and computed(pair.d)


async def test_the_secret_is_asked_for() -> None:
    async with running({**OWN, "kv_secret": "s"}, {**OWN, "kv_secret": "s"}) as pair:
        transfer = Transfer(pair)
        _, answer = await asyncio.gather(transfer.prefill(), transfer.decode())
        assert answer.json["choices"][0]["text"] == RIGHT and sources(pair.d)["external_kv_transfer"] == TOKENS - 1
        with pytest.raises(Refused):
            await Control.open(pair.d.kv_address, "wrong")
        control = await Control.open(pair.d.kv_address, "s")
        assert control.boot == pair.d.state()["boot_id"]
        await control.meet(pair.p.kv_address)
        await pair.d.wait_until(lambda s: s["kv_links"] == [pair.p.kv_address])
        await control.close()


@pytest.mark.parametrize("data", [b"GET / HTTP/1.1\r\n\r\n", bytes(200), frame(Kind.WANT, {}), frame(Kind.HELLO, {})])
async def test_anything_else_ends_that_connection_only(pair: Pair, data: bytes) -> None:
    for engine in (pair.p, pair.d):
        host, port = engine.kv_address.split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(data)
        writer.write_eof()
        with contextlib.suppress(ConnectionResetError):
            await soon(reader.read())
        writer.close()
    transfer = Transfer(pair)
    _, answer = await asyncio.gather(transfer.prefill(), transfer.decode())
    assert answer.json["choices"][0]["text"] == RIGHT


async def test_the_announcement_is_the_connectors_own() -> None:
    context = zmq.asyncio.Context()
    router = context.socket(zmq.ROUTER)
    port = router.bind_to_random_port("tcp://127.0.0.1")
    engine = SimEngine(SimConfig(role="decode", connector="disagg_kv", proxy=f"127.0.0.1:{port}"))
    try:
        await engine.start()
        who, message = await soon(router.recv_multipart())
        assert who.decode() == engine.kv_address
        assert msgpack.unpackb(message) == {
            "type": "D", "http_address": engine.http_address, "zmq_address": engine.kv_address,
            **announcement(engine.config, engine.state()["boot_id"]),
        }  # fmt: skip
        ping = decode_ping([message])
        assert ping.kind.computes and ping.boot == engine.state()["boot_id"]
    finally:
        await engine.stop()
        router.close(0)
        context.term()


def test_the_announcement_has_the_fields_of_the_real_one() -> None:
    real = pytest.importorskip("disagg_kv.engine.announce")
    config = SimConfig(role="decode", connector="disagg_kv")
    sent = real.announcement(identity(config, "b"), "h:1", "k:2", list(config.kv_transports))
    assert {"type": "D", "http_address": "h:1", "zmq_address": "k:2", **announcement(config, "b")} == sent


async def test_prefill_keeps_the_oldest_prompts_when_too_much_waits() -> None:
    """Decode, whose queue is first come, first served, asks for them next."""
    blocks = -(-TOKENS // 16)
    async with running({**OWN, "hold_blocks": 2 * blocks}, OWN) as pair:
        transfers = [Transfer(pair, transfer=f"t{number}") for number in range(4)]
        for transfer in transfers:
            assert (await transfer.prefill()).status == 200
        for number, transfer in enumerate(transfers):
            before = sources(pair.d)["external_kv_transfer"]
            assert (await transfer.decode()).json["choices"][0]["text"] == RIGHT
            assert (sources(pair.d)["external_kv_transfer"] > before) is (number < 2)
        await idle(pair)


async def test_a_prefill_that_has_stopped_is_noticed() -> None:
    """Its KV port accepts what comes and says nothing."""
    async with running(OWN, {**OWN, "load_timeout": 600.0, "stall_timeout": 0.1}) as pair:
        first = Transfer(pair)
        await asyncio.gather(first.prefill(), first.decode())
        pair.p.faults.kv_answers = False
        answer = await soon(Transfer(pair).decode())
        assert answer.json["choices"][0]["text"] == RIGHT
        pair.p.faults.kv_answers = True
        again = Transfer(pair)
        await asyncio.gather(again.prefill(), again.decode())
        assert sources(pair.d)["external_kv_transfer"] == 2 * (TOKENS - 1)


async def test_metrics_say_how_transfers_ended() -> None:
    """By the names of the real connector; an engine with another connector has none of them."""
    async with running({**OWN, "hold_timeout": 0.1}, {**OWN, "load_timeout": 0.1}) as pair:
        transfer = Transfer(pair)
        await transfer.prefill()
        await transfer.decode()
        await Transfer(pair).decode()
        await Transfer(pair).prefill()
        await soon(pair.p.wait_until(lambda state: not state["kv_waiting"]))
        loaded, late = pair.d.metrics(), pair.p.metrics()
    assert re.search(r"^vllm:disagg_kv_loaded_prompts_total\{.*\} 1.0$", loaded, re.M)
    assert re.search(r'^vllm:disagg_kv_recomputed_prompts_total\{.*reason="timeout"\} 1.0$', loaded, re.M)
    assert re.search(r'^vllm:disagg_kv_recomputed_prompts_total\{.*reason="refused"\} 0.0$', loaded, re.M)
    assert re.search(r'^vllm:disagg_kv_unfetched_prompts_total\{.*reason="expired"\} 1.0$', late, re.M)
    async with running({}, {}) as other:
        assert "disagg_kv" not in other.d.metrics()
