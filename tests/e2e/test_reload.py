"""A reload in a running proxy: every setting that says so changes what is used, without touching what runs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from disagg_proxy.config.table import SETTINGS
from tests.conftest import Proxy, soon
from tests.e2e.test_policies import SYSTEMS, chat, engines, served
from tests.simulated import REQUESTS, Machine

COMPLETIONS = "/v1/completions"


def reload(proxy: Proxy, **changes: Any) -> None:
    """Have all parts take these settings, as SIGHUP does with those of the file."""
    proxy.services.reloads.run(replace(proxy.services.config, **changes))


def limits(name: str) -> Callable[[Proxy], Any]:
    """What client connections use; Quart's routes have their own copy of two."""
    return lambda proxy: getattr(proxy.server.config.http_protocol_class.limits, name)


def admission(name: str) -> Callable[[Proxy], Any]:
    return lambda proxy: getattr(proxy.services.admission_queue._limits, name)


def shared(name: str) -> Callable[[Proxy], Any]:
    """What is read from the current configuration where it is used, by connectors and coordinator."""
    return lambda proxy: getattr(proxy.services.coordinator._engines.config, name)


def app(proxy: Proxy) -> Any:
    return proxy.server.config.app.config


USED: dict[str, tuple[Any, list[Callable[[Proxy], Any]]]] = {
    "allow_register": (
        ("203.0.113.9",), [lambda p: ("203.0.113.9",) * p.services.discovery.listener.allow.permits("203.0.113.9")],
    ),
    "instance_expiry": (7.0, [lambda p: p.services.registry._expiry, lambda p: p.services.registry.hung_after / 3]),
    "probe_interval": (7.0, [lambda p: p.services.discovery._prober._interval]),
    "connect_timeout": (
        7.0,
        [
            lambda p: p.services.upstream.connect_timeout,
            lambda p: p.services.kv_control.timeout,
            lambda p: p.services.discovery._liveness.connect_timeout,
        ],
    ),
    "prefill_timeout": (
        7.0,
        [
            shared("prefill_timeout"),
            lambda p: p.services.coordinator._connectors["p2p_nccl"]._current_timeouts().seconds,
        ],
    ),
    "decode_timeout": (7.0, [shared("decode_timeout"), lambda p: p.services.config.decode_timeout]),
    "freeze_after_min": (
        7.0, [lambda p: p.services._stall_detector._shortest, lambda p: p.services._stall_detector.serving._shortest],
    ),
    "freeze_after_max": (
        7.0, [lambda p: p.services._stall_detector._longest, lambda p: p.services._stall_detector.serving._longest],
    ),
    "body_timeout": (7.0, [limits("body_timeout"), lambda p: app(p)["BODY_TIMEOUT"]]),
    "header_timeout": (7.0, [limits("header_timeout")]),
    "send_timeout": (7.0, [limits("send_timeout")]),
    "shutdown_grace": (7.0, [lambda p: p.services.shutdown.remaining, lambda p: p.services.config.shutdown_grace]),
    "max_body_bytes": (700, [limits("max_body_bytes"), lambda p: app(p)["MAX_CONTENT_LENGTH"]]),
    "max_header_bytes": (700, [limits("max_header_bytes")]),
    "max_tries": (7, [shared("max_tries")]),
    "max_in_flight": (7, [admission("in_flight")]),
    "prefill_max_in_flight": (7, [admission("prefill")]),
    "decode_max_in_flight": (7, [admission("decode"), lambda p: p.services.roles._controller.limits.in_flight]),
    "kv_buffer_bytes": (7000, [lambda p: p.services.config.kv_buffer_bytes]),
    "kv_bytes_per_token": (7, [lambda p: p.services.config.kv_bytes_per_token]),
    "decode_alone": (False, [shared("decode_alone"), lambda p: p.services.config.decode_alone]),
    "decode_alone_below": (7, [shared("decode_alone_below"), lambda p: 7 * p.services.sizes._learns]),
    "placement": ("elastic", [lambda p: "elastic" * (p.services.selection.chooser is not None)]),
    "slo_ttft_ms": (7.0, [lambda p: 1000 * p.services.elastic.goals.ttft]),
    "slo_tpot_ms": (7.0, [lambda p: 1000 * p.services.elastic.goals.tpot]),
    "roles": ("auto", [lambda p: "auto" * p.services.roles.automatic]),
    "max_queue": (7, [admission("queue")]),
    "queue_timeout": (7.0, [admission("queue_timeout")]),
    "prefill_policy": ("session", [lambda p: p.services.selection._prefill_policy.name]),
    "decode_policy": ("session", [lambda p: p.services.selection._decode_policy.name]),
    "session_header": ("X-Seven", [limits("session_header")]),
    "load_bound": (7.0, [lambda p: p.services.selection._bound]),
    "enable_profiling": (True, [lambda p: p.services.config.enable_profiling]),
}  # fmt: skip
"""Setting -> another value, and where a running proxy uses it."""

ELSEWHERE = {"log_level", "log_format", "api_keys_file"}
"""Of the process, not of its services: tests/test_reload.py; the keys: tests/keys/test_key_table.py."""


def test_every_setting_that_can_be_reloaded_is_here() -> None:
    assert USED.keys() | ELSEWHERE == {setting.name for setting in SETTINGS if setting.reload}


@pytest.mark.parametrize("name", USED)
async def test_a_reload_reaches_where_the_setting_is_used(machine: Machine, name: str) -> None:
    value, places = USED[name]
    assert value not in [place(machine.proxy) for place in places]
    reload(machine.proxy, **{name: value})
    assert [place(machine.proxy) for place in places] == [value] * len(places)


async def test_the_size_of_the_buffer_in_tokens_follows_both_settings(machine: Machine) -> None:
    reload(machine.proxy, kv_buffer_bytes=7000, kv_bytes_per_token=7)
    assert admission("kv_tokens")(machine.proxy) == 1000
    assert machine.proxy.services.sizes._trusts


async def until(condition: Callable[[], bool]) -> None:
    async def poll() -> None:
        while not condition():
            await asyncio.sleep(0)

    await soon(poll())


@pytest.mark.settings(decode_max_in_flight=1)
async def test_a_higher_limit_admits_what_waits_already(machine: Machine, pair) -> None:
    _, decode = pair
    decode.faults.hold("schedule")
    queue, instance = machine.proxy.services.admission_queue, machine.proxy.instance(decode.http_address)
    requests = [asyncio.ensure_future(machine.post(COMPLETIONS, REQUESTS[COMPLETIONS])) for _ in range(3)]
    await until(lambda: queue.waiting == 2)
    reload(machine.proxy, decode_max_in_flight=2)
    await until(lambda: queue.waiting == 1 and instance.in_flight == 2)
    reload(machine.proxy, decode_max_in_flight=0)
    await until(lambda: queue.waiting == 0 and instance.in_flight == 3)
    decode.faults.release()
    assert [(await soon(request))[0] for request in requests] == [200] * 3


@pytest.mark.settings(decode_max_in_flight=1, queue_timeout=0.1)
async def test_what_waits_keeps_its_timeout_and_its_message(machine: Machine, pair) -> None:
    pair[1].faults.hold("schedule")
    first = asyncio.ensure_future(machine.post(COMPLETIONS, REQUESTS[COMPLETIONS]))
    await until(lambda: machine.proxy.instance(pair[1].http_address).in_flight == 1)
    second = asyncio.ensure_future(machine.post(COMPLETIONS, REQUESTS[COMPLETIONS]))
    await until(lambda: machine.proxy.services.admission_queue.waiting == 1)
    reload(machine.proxy, queue_timeout=60.0)
    status, _, body = await soon(second)
    assert status == 429 and "within 0.1 s (QUEUE_TIMEOUT)" in body["error"]["message"]
    pair[1].faults.release()
    assert (await soon(first))[0] == 200


@pytest.mark.settings(prefill_timeout=60.0)
async def test_a_shorter_prefill_timeout_is_not_delayed_by_longer_ones(machine: Machine, pair) -> None:
    prefill, _ = pair
    prefill.faults.hold("schedule")
    before = asyncio.ensure_future(machine.post(COMPLETIONS, REQUESTS[COMPLETIONS]))
    await until(lambda: len(prefill.received(COMPLETIONS)) == 1)
    reload(machine.proxy, prefill_timeout=0.1, max_tries=1)
    status, _, _ = await machine.post(COMPLETIONS, REQUESTS[COMPLETIONS])
    assert status == 504 and not before.done()
    prefill.faults.release()
    assert (await soon(before))[0] == 200


async def test_a_kept_connection_whose_head_is_known_meets_the_new_limits(machine: Machine, pair, dial) -> None:
    wire = await dial(machine.proxy.url)
    for _ in range(2):
        wire.post(COMPLETIONS, REQUESTS[COMPLETIONS])
        assert (await wire.answer())[0] == 200
    heads = machine.proxy.server.config.http_protocol_class
    assert len(heads.heads) == 1
    reload(machine.proxy, max_body_bytes=10)
    assert len(heads.heads) == 0
    wire.post(COMPLETIONS, REQUESTS[COMPLETIONS])
    status, _, body = await wire.answer()
    assert status == 413 and b"10 bytes" in body


@pytest.mark.settings(prefill_policy="round_robin", decode_policy="round_robin")
async def test_another_policy_places_the_next_requests(machine: Machine) -> None:
    prefills, _ = await engines(machine)

    async def ask(question: str) -> None:
        status, _, body = await machine.post("/v1/chat/completions", chat(SYSTEMS[0], question))
        assert status == 200, body

    for _ in range(3):
        await ask("In turn?")
    assert served(prefills, "In turn?") == [1, 1, 1]
    reload(machine.proxy, prefill_policy="prefix_aware")
    for _ in range(3):
        await ask("By prefix?")
    assert sorted(served(prefills, "By prefix?")) == [0, 0, 3]


async def test_what_runs_is_not_touched(machine: Machine, pair) -> None:
    _, decode = pair
    decode.faults.hold("schedule", after=3)
    request = asyncio.ensure_future(machine.post(COMPLETIONS, REQUESTS[COMPLETIONS]))
    await soon(decode.wait_until(lambda state: state["held_at"] == "schedule"))
    reload(machine.proxy, max_in_flight=1, max_body_bytes=10, prefill_policy="session", allow_register=("203.0.113.9",))
    decode.faults.release()
    assert (await soon(request))[0] == 200
