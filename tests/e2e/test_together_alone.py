"""Engines of this project's own connector: decode alone, and which engines meet."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import msgpack
import pytest

from disagg_proxy.cluster.instance import State
from disagg_proxy.discovery.announcement import decode as decode_ping
from disagg_proxy.telemetry.stats_report import instance_reports
from disagg_sim import SimEngine
from disagg_sim.connectors.disagg_kv_wire import announcement, digest_of
from tests.conftest import soon
from tests.e2e.together import (
    ASK,
    COMPLETIONS,
    OWN,
    REQUESTS,
    TOKENS,
    clean,
    external,
    in_turn,
    right,
    settings,
    transfers,
)
from tests.simulated import Machine


@pytest.fixture
async def pair(machine: Machine) -> tuple[SimEngine, SimEngine]:
    return await machine.pair(**OWN)


# -- decode alone


async def test_no_prefill_is_no_reason_to_refuse(machine: Machine) -> None:
    decode = await machine.engine("decode", **OWN)
    await machine.proxy.until_state(decode.http_address, State.READY)
    await right(machine.post(COMPLETIONS, ASK))
    assert transfers(decode) == [None]
    status, health = await machine.get("/health")
    assert (status, health["pairs"], health["decodes_that_serve_alone"]) == (200, 0, 1)
    await clean(machine, decode)


@settings(decode_alone=False)
async def test_unless_it_is_set_so(machine: Machine) -> None:
    decode = await machine.engine("decode", **OWN)
    await machine.proxy.until_state(decode.http_address, State.READY)
    status, headers, body = await machine.post(COMPLETIONS, ASK)
    assert status == 503 and "no prefill instance is ready" in body["error"]["message"]
    assert headers["Retry-After"]
    assert (await machine.get("/health"))[0] == 503


@settings(decode_alone_below=100)
async def test_short_prompts_go_to_decode_alone(machine: Machine, pair) -> None:
    prefill, decode = pair
    await right(machine.post(COMPLETIONS, ASK)) if TOKENS < 100 else None
    body = {**ASK, "prompt": list(range(10, 60))}
    assert (await machine.post(COMPLETIONS, body))[0] == 200
    assert transfers(decode)[-1] is None
    count = len(prefill.received(COMPLETIONS))
    assert (await machine.post(COMPLETIONS, {**body, "prompt": list(range(10, 200))}))[0] == 200
    assert len(prefill.received(COMPLETIONS)) == count + 1
    await clean(machine, prefill, decode)


IMAGE = {"type": "image_url", "image_url": {"url": "http://x.invalid/a.png"}}
ONLY_ALONE: dict[str, tuple[str, dict[str, Any]]] = {
    "prompt_logprobs": (COMPLETIONS, {**ASK, "prompt_logprobs": 1, "stream": True}),
    "prompt_embeds": (COMPLETIONS, {**ASK, "prompt_embeds": "abc"}),
    "beam search": (COMPLETIONS, {**ASK, "use_beam_search": True, "n": 2, "temperature": 0}),
    "chat_template": (
        "/v1/chat/completions",
        {**REQUESTS["/v1/chat/completions"], "chat_template": "{{ messages }}"},
    ),
    "media": (
        "/v1/chat/completions",
        {**REQUESTS["/v1/chat/completions"], "messages": [{"role": "user", "content": [IMAGE]}]},
    ),
}


@pytest.mark.parametrize("what", ONLY_ALONE)
async def test_what_no_pair_can_serve(machine: Machine, pair, what: str) -> None:
    path, body = ONLY_ALONE[what]
    status, _, answer = await machine.send(path, body)
    assert status in (200, 400), answer
    assert not pair[0].received(path)
    assert transfers(pair[1], path) == [None]
    await clean(machine, *pair)


async def test_what_no_pair_can_serve_is_refused_without_such_a_decode(machine: Machine) -> None:
    await machine.pair()
    for path, body in ONLY_ALONE.values():
        assert (await machine.send(path, body))[0] == 400


async def test_it_is_no_mistake_of_the_clients_while_decode_is_down(machine: Machine, pair) -> None:
    await pair[1].kill()
    await machine.proxy.until_state(pair[1].http_address, State.PROBING)
    path, body = ONLY_ALONE["beam search"]
    assert (await machine.send(path, body))[0] == 503


async def test_prompt_logprobs_are_right(machine: Machine, pair) -> None:
    body = {**ASK, "max_tokens": 1, "prompt_logprobs": 1}
    _, _, answer = await machine.post(COMPLETIONS, body)
    found = answer["choices"][0]["prompt_logprobs"]
    assert len(found) == TOKENS and all(-5 <= next(iter(e.values()))["logprob"] <= 0 for e in found[1:])
    await clean(machine, *pair)


# -- which engines meet


@in_turn
async def test_both_kinds_behind_one_proxy(machine: Machine) -> None:
    old = await machine.pair()
    new = await machine.pair(**OWN)
    for _ in range(6):
        await right(machine.post(COMPLETIONS, ASK))
    assert machine.proxy.services.selection.ready_pairs() == 2
    for engine in old:
        for request in engine.received(COMPLETIONS):
            assert old[0].kv_address in request.headers["X-Request-Id"]
            assert old[1].kv_address in request.headers["X-Request-Id"]
    assert {params["from"] for params in transfers(new[1]) if params} == {new[0].kv_address}
    assert all(engine.received(COMPLETIONS) for engine in (*old, *new))
    _, stats = await machine.get("/stats")
    why = {i["http_address"]: i["cannot_exchange_because"] for i in stats["instances"]}
    assert why[old[0].http_address] == {new[1].http_address: "prefill speaks p2p_nccl, decode disagg_kv"}
    assert why[new[0].http_address] == {old[1].http_address: "prefill speaks disagg_kv, decode p2p_nccl"}
    path, body = ONLY_ALONE["beam search"]
    assert (await machine.send(path, body))[0] == 200
    await clean(machine, *old, *new)


@in_turn
async def test_a_retry_stays_with_its_protocol(machine: Machine) -> None:
    await machine.pair()
    _prefill, first = await machine.pair(**OWN)
    second = await machine.engine("decode", **OWN)
    await machine.proxy.until_state(second.http_address, State.READY)
    for decode in (first, second):
        decode.faults.fail_next(502, b"broken", path=COMPLETIONS)
        for _ in range(6):
            await right(machine.post(COMPLETIONS, ASK))
        decode.faults.injected_for(COMPLETIONS)
    assert machine.proxy.services.stats.failovers >= 1


@pytest.mark.parametrize(
    ("trait", "why"),
    [
        ({"kv_dtype": "float16"}, "dtype is bfloat16, on decode float16"),
        ({"kv_block_size": 32}, "block_size is 16, on decode 32"),
        ({"tp": 2}, "tp is 1, on decode 2"),
        ({"kv_model": "other", "kv_digest": None}, "kv_model is sim, on decode other"),
        ({"kv_digest": "f" * 32}, f"on decode sim@{'f' * 12} (other weights or configuration)"),
        ({"kv_transports": ("nccl",)}, "no common transport"),
        ({"kv_secret": "s"}, "only decode has a shared secret (DISAGG_KV_SECRET)"),
    ],
)
@settings(decode_alone=False)
async def test_caches_that_differ_make_no_pair(machine: Machine, trait: dict[str, Any], why: str, caplog) -> None:
    prefill = await machine.engine("prefill", **OWN)
    decode = await machine.engine("decode", **OWN, **trait)
    for engine in (prefill, decode):
        await machine.proxy.until_state(engine.http_address, State.READY)
    status, _, body = await machine.post(COMPLETIONS, ASK)
    assert status == 503 and why in body["error"]["message"]
    health_status, health = await machine.get("/health")
    assert health_status == 503 and why in str(health["missing"])
    for text in (str(body), str(health)):
        assert "127.0.0.1" not in text
    _, stats = await machine.get("/stats")
    found = next(i for i in stats["instances"] if i["role"] == "prefill")
    assert why in found["cannot_exchange_because"][decode.http_address]
    warned = [r for r in caplog.records if r.levelname == "WARNING" and "ready decode instances" in r.message]
    assert len(warned) == 1 and why in warned[0].message and prefill.http_address in warned[0].message


async def test_engines_announce_their_connections(machine: Machine) -> None:
    prefill, decode = await machine.pair(**OWN, ping_seconds=0.05)
    known = machine.proxy.instance(decode.http_address)
    await soon(machine.proxy.until(lambda: known.kv_links == {prefill.kv_address: "tcp"}))
    await prefill.kill()
    await soon(machine.proxy.until(lambda: not known.kv_links))


async def test_stats_name_the_transport_that_runs(machine: Machine) -> None:
    prefill, decode = await machine.pair(**OWN, ping_seconds=60.0)
    links = {prefill.kv_address: "tcp; nccl failed: RuntimeError"}
    own = announcement(decode.config, decode.state()["boot_id"])
    ping = {"type": "D", "http_address": decode.http_address, "zmq_address": decode.kv_address, **own}
    services = machine.proxy.services
    services.discovery.take([decode_ping([msgpack.dumps({**ping, "kv_links": links})])])
    reports = instance_reports(services, await services.overview())
    assert {report["role"]: report["kv_transports"] for report in reports} == {"decode": links, "prefill": {}}
    services.discovery.take([decode_ping([msgpack.dumps(ping)])])
    assert all(not instance.kv_links for instance in services.registry.instances())


async def test_models_are_known_by_their_weights(machine: Machine) -> None:
    """Another folder name is no other model, and an engine of a release without digests is known by the name."""
    prefill, decode = await machine.pair(**OWN)
    renamed = await machine.engine("decode", **OWN, kv_model="renamed", kv_digest=digest_of(decode.config))
    older = await machine.engine("decode", **OWN, kv_digest=None)
    other = await machine.engine("decode", **OWN, kv_digest="f" * 32)
    for engine in (renamed, older, other):
        await machine.proxy.until_state(engine.http_address, State.READY)
    for _ in range(9):
        await right(machine.post(COMPLETIONS, ASK))
    assert [external(engine) > 0 for engine in (decode, renamed, older, other)] == [True, True, True, False]
    _, stats = await machine.get("/stats")
    found = next(i for i in stats["instances"] if i["role"] == "prefill")
    assert found["cannot_exchange_with"] == [other.http_address]
    await clean(machine, prefill, decode, renamed, older, other)


@pytest.mark.parametrize("role", ["prefill", "decode"])
async def test_a_folder_replaced_between_two_starts_ends_the_pair(machine: Machine, pair, role: str) -> None:
    """The engine comes back at the same addresses before the proxy has missed it."""
    await right(machine.post(COMPLETIONS, ASK))
    old = pair[0 if role == "prefill" else 1]
    await old.kill()
    config = replace(old.restarted().config, kv_digest="f" * 32)
    new = SimEngine(config)
    await new.start()
    machine.engines.append(new)
    await soon(apart(machine))
    before = external(pair[1]), new.state()["kv_sent" if role == "prefill" else "kv_links"]
    await right(machine.post(COMPLETIONS, ASK))
    assert (external(pair[1]), new.state()["kv_sent" if role == "prefill" else "kv_links"]) == before
    _, health = await machine.get("/health")
    assert health["pairs"] == 0 and "(other weights or configuration)" in str(health["missing"])


async def apart(machine: Machine) -> None:
    """Returns once both engines are ready and make no pair."""
    while True:
        _, health = await machine.get("/health")
        if health["prefill"]["ready"] and health["decode"]["ready"] and not health["pairs"]:
            return
        await asyncio.sleep(0.02)


@pytest.mark.parametrize("role", ["prefill", "decode"])
async def test_a_restarted_engine_is_out_at_once_and_back_after_a_probe(machine: Machine, pair, role: str) -> None:
    await right(machine.post(COMPLETIONS, ASK))
    old = pair[0 if role == "prefill" else 1]
    await old.kill()
    await machine.proxy.until_state(old.http_address, State.PROBING)
    new = old.restarted()
    await new.start()
    machine.engines.append(new)
    await soon(machine.proxy.until_pairs())
    instance = machine.proxy.instance(new.http_address)
    await soon(machine.proxy.until(lambda: instance.boot == new.state()["boot_id"] and instance.state is State.READY))
    before = external(new) if role == "decode" else external(pair[1])
    await right(machine.post(COMPLETIONS, ASK))
    assert external(new if role == "decode" else pair[1]) == before + TOKENS - 1
    await clean(machine, new)
