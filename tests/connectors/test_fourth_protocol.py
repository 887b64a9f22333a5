"""A fourth KV protocol is one module and one line of ``connectors/table.py``: the example of CONTRIBUTING.md, with
simulated engines that announce as vLLM's MoRIIOConnector does and move KV as NixlConnector does."""

from __future__ import annotations

import inspect
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import aiohttp
import msgpack
import pytest

from disagg_proxy.cluster.kv_kind import KvKind
from disagg_proxy.config import ConfigError, load
from disagg_proxy.connectors import table
from disagg_proxy.connectors.base import never_announced
from disagg_proxy.discovery.announcement import BadAnnouncement, decode
from disagg_sim.connectors.nixl import Nixl as SimulatedNixl
from tests.conftest import running_proxy, soon
from tests.connectors import moriio
from tests.e2e.together import computed, external
from tests.simulated import REQUESTS, RIGHT, Machine, text_of_events

PATH = "/v1/completions"
PING = {"type": "P", "http_address": "127.0.0.1:20003", "dp_size": 1, "tp_size": 1, "transfer_mode": "read"}
ADDRESS = "host:10.0.0.1,handshake:6301,notify:61005"


@pytest.fixture(autouse=True)
def _one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "PROTOCOLS", (moriio.PROTOCOL, *table.PROTOCOLS))


@pytest.fixture
async def machine(http: aiohttp.ClientSession) -> AsyncIterator[Machine]:
    async with running_proxy() as proxy, AsyncExitStack() as stack:
        yield Machine(proxy, stack, http)


@pytest.fixture
def announced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulated NIXL engines announce themselves as MoRIIO's do."""

    def announcement(engine: Any) -> dict[str, Any]:
        held = engine._prefill
        return {"zmq_address": f"host:127.0.0.1,handshake:{held._port},notify:{held._port}"}

    monkeypatch.setattr(SimulatedNixl, "announcement", announcement)


def test_its_announcements_are_read() -> None:
    found = decode([msgpack.dumps({**PING, "zmq_address": ADDRESS})])
    assert (found.kind, found.kv.text, found.kv.host, found.kv.port) == (moriio.KIND, ADDRESS, "10.0.0.1", 6301)


@pytest.mark.parametrize(
    "address",
    ["host:", "host:10.0.0.1", "host:10.0.0.1,handshake:0,notify:1", "host:a___b,handshake:1,notify:1", "host,x"],
)
def test_wrong_ones_are_refused(address: str) -> None:
    with pytest.raises(BadAnnouncement) as caught:
        decode([msgpack.dumps({**PING, "zmq_address": address})])
    assert caught.value.kind == "mistyped" and "zmq_address" in str(caught.value)


@pytest.mark.parametrize("protocol", [p.kind.protocol for p in table.PROTOCOLS])
def test_the_others_are_still_there(protocol: str) -> None:
    assert table.kind_named(protocol).protocol == protocol


async def test_a_request_is_served_by_it(machine: Machine, announced: None) -> None:
    prefill, decode = await machine.pair(connector="nixl")
    chunks = await machine.stream(PATH, REQUESTS[PATH])
    assert text_of_events(chunks) == RIGHT[PATH]
    assert external(decode) > 0 and computed(decode) == 1, "prefill's KV was used"
    (first,), (second,) = prefill.received(PATH), decode.received(PATH)
    request_id = first.headers["X-Request-Id"]
    assert request_id == second.headers["X-Request-Id"]
    kv = [machine.proxy.instance(engine.http_address).kv for engine in (prefill, decode)]
    assert all(address is not None and address.text in request_id for address in kv)
    assert request_id not in json.dumps(chunks), "clients see a public id"
    status, stats = await machine.get("/stats")
    assert status == 200 and {i["kv_protocol"] for i in stats["instances"]} == {"moriio"}
    await machine.unharmed(prefill, decode)


async def test_a_prefill_without_an_answer_is_a_failure_of_the_attempt(machine: Machine, announced: None) -> None:
    prefill, decode = await machine.pair(connector="nixl")
    prefill.faults.reset_next(path=PATH, times=2)
    status, _, body = await machine.post(PATH, REQUESTS[PATH])
    assert status == 502 and body["error"]["code"] == "engine_disconnected"
    assert not decode.received(PATH)
    await soon(machine.proxy.until_idle())
    assert [machine.proxy.instance(e.http_address).in_flight for e in (prefill, decode)] == [0, 0]


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
    source = iter(inspect.getsource(moriio).splitlines())
    lines = [line.strip() for line in shown.splitlines() if line.strip() not in ("", "...")]
    assert len(lines) > 20
    missing = [line for line in lines if not any(line == other.strip() for other in source)]
    assert missing == [], "these lines are there, in this order"
