"""MoRIIOConnector: what its engines announce and get, with simulated ones and on vLLM 0.33's formats. Its engines need
AMD GPUs; no real one was run."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import aiohttp
import msgpack
import pytest

from disagg_proxy.address import parse_address
from disagg_proxy.cluster.instance import Instance, Role, Source, State
from disagg_proxy.cluster.kv_kind import KvKind, why_apart
from disagg_proxy.config import ConfigError, load
from disagg_proxy.connectors import moriio, table
from disagg_proxy.connectors.base import never_announced
from disagg_proxy.discovery.announcement import BadAnnouncement, decode
from disagg_proxy.http1.headers import client_request_id
from disagg_sim import SimConfig, SimEngine, encode, expected_text
from tests.conftest import running_proxy, soon
from tests.e2e.together import COMPLETIONS, PROMPT, REQUESTS, RIGHT, ROUTES, TOKENS, computed, external, transfers
from tests.simulated import Machine, text_of, text_of_events

PING = {"type": "P", "http_address": "127.0.0.1:20003", "dp_size": 1, "tp_size": 2, "transfer_mode": "READ"}
ADDRESS = "host:10.0.0.1,handshake:6301,notify:61005"
MODES = pytest.mark.parametrize("read_mode", [True, False], ids=["read", "write"])
PEER = {
    "remote_host": "10.0.0.1",
    "remote_handshake_port": 6301,
    "remote_notify_port": 61005,
    "remote_dp_size": 1,
    "remote_tp_size": 2,
}
ANSWER: dict[str, Any] = {
    "do_remote_prefill": True,
    "do_remote_decode": False,
    "remote_block_ids": [[1, 2, 3]],
    "remote_engine_id": "e",
    "remote_host": "10.0.0.1",
    "remote_handshake_port": 6301,
    "remote_notify_port": 61005,
    "remote_dp_rank": 1,
    "remote_dp_rank_override": True,
    "remote_dp_size": 2,
    "remote_dp_size_local": 2,
    "tp_size": 2,
    "transfer_id": "tx-1",
}
"""As vLLM 0.33's prefill answers (``moriio_connector.py``, ``request_finished``)."""


def announced(**changes: Any) -> KvKind:
    return decode([msgpack.dumps({**PING, "zmq_address": ADDRESS, **changes})]).kind


# -- formats


def test_its_announcements_are_read() -> None:
    found = decode([msgpack.dumps({**PING, "zmq_address": ADDRESS})])
    assert (found.role, found.kv.host, found.kv.port) == (Role.PREFILL, "10.0.0.1", 6301)
    assert (found.kind.protocol, found.kind.traits) == ("moriio", (("transfer_mode", "READ"),))
    assert dict(found.kind.peer_params) == PEER


def test_ipv6() -> None:
    found = decode([msgpack.dumps({**PING, "zmq_address": "host:fd00::1,handshake:6301,notify:61005"})])
    assert (found.kv.netloc, dict(found.kind.peer_params)["remote_host"]) == ("[fd00::1]:6301", "fd00::1")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("zmq_address", text) for text in (
            "host:", "host:10.0.0.1", "host:10.0.0.1,handshake:0,notify:1", "host:a___b,handshake:1,notify:1",
        )),
        ("transfer_mode", "PUSH"), ("transfer_mode", None), ("dp_size", 0), ("tp_size", "1"), ("tp_size", True),
        ("tp_size", 10**9),
    ],
)  # fmt: skip
def test_wrong_ones_are_refused(field: str, value: Any) -> None:
    with pytest.raises(BadAnnouncement) as caught:
        decode([msgpack.dumps({**PING, "zmq_address": ADDRESS, field: value})])
    assert caught.value.kind == "mistyped" and field in str(caught.value)


@pytest.mark.parametrize("other", [{"zmq_address": "10.0.0.1:1"}, {"protocol": "disagg_kv"}])
def test_announcements_of_others_are_left_to_them(other: dict[str, Any]) -> None:
    assert moriio.read({**PING, "zmq_address": ADDRESS, **other}) is None


def test_only_one_mode_pairs_and_sizes_may_differ() -> None:
    assert why_apart(announced(), announced(tp_size=8, dp_size=4)) is None
    assert why_apart(announced(), announced(transfer_mode="WRITE")) == "transfer_mode is READ, on decode WRITE"


def test_what_prefill_gets() -> None:
    assert moriio.prefill_params("tx-1", announced()) == {
        "do_remote_decode": True,
        "do_remote_prefill": False,
        "remote_engine_id": None,
        "remote_block_ids": None,
        "transfer_id": "tx-1",
        **PEER,
    }


def test_what_decode_gets() -> None:
    answer = json.dumps({"id": "x", "kv_transfer_params": ANSWER}).encode()
    assert moriio.decode_params("tx-1", announced(), answer) == {
        "do_remote_decode": False,
        "do_remote_prefill": True,
        "remote_engine_id": "e",
        "remote_block_ids": [[1, 2, 3]],
        "transfer_id": "tx-1",
        **PEER,
        "remote_dp_rank": 1,
        "remote_dp_size_local": 2,
    }, "as vLLM's example proxy sends it: without remote_dp_rank_override, which makes other ranks wait for ever"


@pytest.mark.parametrize("changes", [
    {"remote_engine_id": None}, {"remote_block_ids": []}, {"remote_block_ids": [[]]}, {"remote_block_ids": [["1"]]},
    {"transfer_id": "tx-2"}, {"do_remote_prefill": False},
])  # fmt: skip
def test_params_that_are_not_whole_never_reach_decode(changes: dict[str, Any]) -> None:
    answer = json.dumps({"kv_transfer_params": {**ANSWER, **changes}}).encode()
    assert moriio.decode_params("tx-1", announced(), answer) is None


@pytest.mark.parametrize("marked", [
    f"___prefill_addr_{ADDRESS}___decode_addr_{ADDRESS}_{'0' * 32}", f"x___decode_addr_{ADDRESS}_{'0' * 32}",
])  # fmt: skip
def test_no_client_names_the_engine_that_kv_comes_from(marked: str) -> None:
    """An engine prefers the address in the id to the params."""
    assert client_request_id([(b"x-request-id", marked.encode())]) is None


@pytest.mark.parametrize(("version", "old"), [
    ("0.33.0", False), ("0.32.1", True), ("0.11.0+rocm", True), ("1.0.0", False), ("0.1.dev9+g1", False), ("", False),
    (None, False),
])  # fmt: skip
def test_the_oldest_version(version: str | None, old: bool) -> None:
    engine = Instance(Role.DECODE, parse_address("a:1"), None, Source.PING, moriio.KIND)
    engine.version = version
    assert moriio.too_old(engine) is old


# -- with simulated engines


@pytest.fixture
async def machine(http: aiohttp.ClientSession) -> AsyncIterator[Machine]:
    async with running_proxy() as proxy, AsyncExitStack() as stack:
        yield Machine(proxy, stack, http)


@MODES
@ROUTES
@pytest.mark.parametrize("stream", [False, True])
async def test_every_route(machine: Machine, read_mode: bool, path: str, stream: bool) -> None:
    prefill, decode = await machine.pair(connector="moriio", read_mode=read_mode)
    if stream:
        assert text_of_events(await machine.stream(path, REQUESTS[path])) == RIGHT[path]
    else:
        _status, _, answer = await machine.post(path, REQUESTS[path])
        assert text_of(answer) == RIGHT[path] and not answer.get("kv_transfer_params")
    assert external(decode) >= TOKENS - 1 and computed(decode) == 1, "prefill's KV was used"
    (to_prefill,), (to_decode,) = transfers(prefill, path), transfers(decode, path)
    assert to_prefill["transfer_id"] == to_decode["transfer_id"]
    assert int(to_prefill["remote_notify_port"]) == int(decode.kv_address.rpartition(":")[2])
    assert int(to_decode["remote_notify_port"]) == int(prefill.kv_address.rpartition(":")[2])
    assert prefill.received(path)[0].headers["X-Request-Id"] == decode.received(path)[0].headers["X-Request-Id"]
    status, stats = await machine.get("/stats")
    assert status == 200 and {i["kv_protocol"] for i in stats["instances"]} == {"moriio"}
    await soon(machine.proxy.until_idle())
    await machine.unharmed(prefill, decode)


@MODES
async def test_a_forged_id_does_no_harm(machine: Machine, read_mode: bool) -> None:
    prefill, decode = await machine.pair(connector="moriio", read_mode=read_mode)
    forged = f"___prefill_addr_{ADDRESS}___decode_addr_{ADDRESS}_{'0' * 32}"
    url, headers = machine.proxy.url + COMPLETIONS, {"X-Request-Id": forged}
    async with machine.http.post(url, json=REQUESTS[COMPLETIONS], headers=headers) as answer:
        assert answer.status == 200 and text_of(await answer.json()) == RIGHT[COMPLETIONS]
    assert external(decode) > 0
    await machine.unharmed(prefill, decode)


@MODES
async def test_decode_computes_what_prefill_does_not(machine: Machine, read_mode: bool) -> None:
    prefill, decode = await machine.pair(connector="moriio", read_mode=read_mode)
    prefill.faults.reset_next(path=COMPLETIONS, times=2)
    status, _, body = await machine.post(COMPLETIONS, REQUESTS[COMPLETIONS])
    assert status == 200 and text_of(body) == RIGHT[COMPLETIONS]
    assert transfers(decode) == [None] and external(decode) == 0
    await soon(machine.proxy.until_idle())
    assert [machine.proxy.instance(e.http_address).in_flight for e in (prefill, decode)] == [0, 0]


@MODES
async def test_several_prompts_are_decodes_alone(machine: Machine, read_mode: bool) -> None:
    prefill, decode = await machine.pair(connector="moriio", read_mode=read_mode)
    prompts = [PROMPT, f"{PROMPT} and more"]
    status, _, answer = await machine.post(COMPLETIONS, {**REQUESTS[COMPLETIONS], "prompt": prompts})
    assert status == 200 and [c["text"] for c in answer["choices"]] == [expected_text(p, 8) for p in prompts]
    assert not prefill.received(COMPLETIONS)
    await machine.unharmed(prefill, decode)


@MODES
async def test_a_client_that_leaves_decode_frees_prefills_kv(machine: Machine, read_mode: bool) -> None:
    prefill, decode = await machine.pair(connector="moriio", read_mode=read_mode)
    decode.faults.hold("forward")
    request = asyncio.create_task(machine.post(COMPLETIONS, REQUESTS[COMPLETIONS]))
    await soon(decode.wait_until(lambda s: bool(decode.received(COMPLETIONS))))
    request.cancel()
    await asyncio.gather(request, return_exceptions=True)
    decode.faults.release()
    await soon(prefill.wait_until(lambda s: not s["kv_waiting"]))
    await soon(machine.proxy.until_idle())
    await machine.unharmed(prefill, decode)


async def test_modes_do_not_mix(machine: Machine) -> None:
    engines = [await machine.engine("prefill", connector="moriio", read_mode=True)]
    engines.append(await machine.engine("decode", connector="moriio", read_mode=False))
    for engine in engines:
        await soon(machine.proxy.until_state(engine.http_address, State.READY))
    status, stats = await machine.get("/stats")
    assert status == 200 and "transfer_mode is READ, on decode WRITE" in json.dumps(stats["instances"])


async def test_older_engines_get_nothing(machine: Machine) -> None:
    """They would answer from KV that nobody has written, or end of params that they do not read."""
    prefill, decode = await machine.pair(connector="moriio", version="0.32.0")
    status, _, body = await machine.post(COMPLETIONS, REQUESTS[COMPLETIONS])
    assert status == 502 and "0.33 or newer" in body["error"]["message"]
    assert not prefill.received(COMPLETIONS) and not decode.received(COMPLETIONS)


@pytest.mark.parametrize("role", ["prefill", "decode"])
async def test_a_simulated_engine_ends_of_a_request_without_its_peer(http: aiohttp.ClientSession, role: str) -> None:
    engine = SimEngine(SimConfig(role=role, connector="moriio"))
    await engine.start()
    try:
        params = {"transfer_id": "x", "do_remote_decode": role == "prefill", "do_remote_prefill": role == "decode",
                  "remote_engine_id": None, "remote_block_ids": None}  # fmt: skip
        ask = {"model": "sim-model", "prompt": PROMPT, "max_tokens": 1, "kv_transfer_params": params}
        async with http.post(f"http://{engine.http_address}{COMPLETIONS}", json=ask) as answer:
            assert answer.status == 500
        assert "does not embed a peer zmq_address" in str(engine.state()["dead"])
    finally:
        await engine.stop()


async def test_a_simulated_write_waits_for_prefill(http: aiohttp.ClientSession) -> None:
    """Both legs at once, as vLLM's example proxy sends them: decode waits until prefill has computed."""
    prefill, decode = (SimEngine(SimConfig(role=role, connector="moriio")) for role in ("prefill", "decode"))
    await prefill.start()
    await decode.start()
    try:
        port = int(prefill.kv_address.rpartition(":")[2])
        peer = {"transfer_id": "x", "remote_host": "127.0.0.1", "remote_handshake_port": port,
                "remote_notify_port": port, "remote_engine_id": None, "remote_block_ids": None}  # fmt: skip
        ask = {"model": "sim-model", "prompt": PROMPT, "max_tokens": 8}

        async def post(engine: SimEngine, body: dict[str, Any]) -> dict[str, Any]:
            async with http.post(f"http://{engine.http_address}{COMPLETIONS}", json=body) as answer:
                assert answer.status == 200
                return await answer.json()

        waiting = asyncio.create_task(
            post(decode, {**ask, "kv_transfer_params": {**peer, "do_remote_prefill": True, "do_remote_decode": False}})
        )
        await soon(decode.wait_until(lambda s: bool(s["kv_waiting"])))
        assert len(encode(PROMPT)) > 1 and not waiting.done()
        await post(prefill, {**ask, "max_tokens": 1, "kv_transfer_params": {**peer, "do_remote_decode": True}})
        assert text_of(await soon(waiting)) == RIGHT[COMPLETIONS]
    finally:
        await decode.stop()
        await prefill.stop()


# -- the example of CONTRIBUTING.md


def test_only_a_protocol_whose_engines_do_not_ping_is_named_in_the_configuration(monkeypatch) -> None:
    silent = moriio.PROTOCOL._replace(kind=KvKind("silent"), read=never_announced)
    monkeypatch.setattr(table, "PROTOCOLS", (silent, *table.PROTOCOLS))
    table.check_instances(load(["--prefill", "http://a:1,silent b:2,NIXL c:3 d:4,e:5"], {}))
    for name in ("moriio", "disagg_kv", "p2p_nccl", "other"):
        with pytest.raises(ConfigError, match=rf"^DECODE_INSTANCES: .*\(silent, nixl\).* not '{name}'$"):
            table.check_instances(load(["--decode", f"http://a:1,{name}"], {}))


def test_contributing_shows_what_is_tested_here() -> None:
    text = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = text.partition("## Add a KV connector")[2].partition("\n## ")[0]
    shown = section.partition("```python\n")[2].partition("```")[0]
    # By its path: a compiled module has no source.
    path = Path(__file__).parents[2] / "disagg_proxy/connectors/moriio.py"
    source = iter(path.read_text(encoding="utf-8").splitlines())
    lines = [line.strip() for line in shown.splitlines() if line.strip() not in ("", "...")]
    assert len(lines) > 15
    missing = [line for line in lines if not any(line == other.strip() for other in source)]
    assert missing == [], "these lines are there, in this order"
