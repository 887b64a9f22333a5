"""Roles with several workers: all follow one decision."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import Any

from disagg_proxy.cluster.assignment import Assignment, Cause
from disagg_proxy.cluster.instance import Role
from disagg_proxy.workers.shared_load import RowIndex
from disagg_proxy.workers.shared_table import FlagColumn
from disagg_sim import SimConfig, SimEngine, expected_text
from tests.conftest import soon
from tests.workers.conftest import ASK, Door, Fleet, until
from tests.workers.test_parts import Two

KEY = {"Authorization": "Bearer sk-admin"}
RIGHT = expected_text(ASK["prompt"], 8)
P, D = Role.PREFILL, Role.DECODE


# -- the flags


def shown(two: Two) -> list[Assignment | None]:
    for flags, decode in zip(two.flags, two.decodes, strict=True):
        flags.apply_role(decode)
    return [decode.assignment for decode in two.decodes]


def test_the_newest_assignment_holds_in_all_workers() -> None:
    two = Two()
    assert shown(two) == [None, None]
    two.flags[0].assign(two.decodes[0], Assignment(P, Cause.PREFILL_WAITS, 100.0, 0.5, 0.25))
    assert not two.flags[1].role_applied_by_all(two.decodes[1])
    assert shown(two) == [Assignment(P, Cause.PREFILL_WAITS, 100.0, 0.5, 0.25)] * 2
    assert two.flags[0].role_applied_by_all(two.decodes[0])
    two.flags[1].assign(two.decodes[1], Assignment(D, Cause.FIRST, 100.0))
    assert shown(two) == [Assignment(D, Cause.FIRST, 100.001)] * 2, "later, although within the same millisecond"
    two.flags[0].assign(two.decodes[0], Assignment(None, Cause.AUTO, 90.0))
    assert [a and a.cause for a in shown(two)] == [Cause.AUTO] * 2


def test_an_assignment_is_applied_once() -> None:
    two = Two()
    two.flags[0].assign(two.decodes[0], Assignment(P, Cause.FIRST, 100.0))
    shown(two)
    wakeups, versions = two.wakeups, [world.registry.version for world in two.worlds]
    shown(two)
    assert (two.wakeups, [world.registry.version for world in two.worlds]) == (wakeups, versions)


def test_an_assignment_survives_the_worker_that_made_it() -> None:
    two = Two()
    two.flags[0].assign(two.decodes[0], Assignment(P, Cause.BY_HAND, 100.0))
    two.table.retire(0)
    two.flags[1].apply_role(two.decodes[1])
    assert two.decodes[1].assignment == Assignment(P, Cause.BY_HAND, 100.0)


def test_the_slot_of_an_engine_with_a_role_by_hand_is_kept() -> None:
    two = Two()
    slots = RowIndex(two.table)
    assert [slots.slot_of(key) for key in ("prefill", "decode")] == [0, 1]
    two.flags[0].assign(two.decodes[0], Assignment(P, Cause.BY_HAND, 100.0))
    assert not slots.free("decode")
    two.flags[0].assign(two.decodes[0], Assignment(P, Cause.AUTO, 101.0))
    assert slots.free("decode")


def test_the_longest_wait_of_all_workers_counts() -> None:
    two = Two()
    for flags, decode, seconds in zip(two.flags, two.decodes, (0.25, 1.5), strict=True):
        flags.report_prefill_wait(decode, seconds)
    assert [flags.prefill_wait(decode) for flags, decode in zip(two.flags, two.decodes, strict=True)] == [1.5, 1.5]
    two.table.retire(1)
    assert two.flags[0].prefill_wait(two.decodes[0]) == 0.25
    assert two.table.newest(1, FlagColumn.PREFILL_WAIT) == 250


# -- processes


async def engines(proxy: Fleet, count: int) -> list[SimEngine]:
    started = []
    for _ in range(count):
        knobs: dict[str, Any] = {"proxy": proxy.zmq, "ping_seconds": 0.1, "connector": "disagg_kv", "kv_both": True}
        engine = SimEngine(SimConfig(role="decode", **knobs))
        await engine.start()
        proxy.stack.push_async_callback(engine.stop)
        await proxy.until_known(engine)
        started.append(engine)
    return started


async def roles(door: Door) -> dict[str, Any]:
    return {one["http_address"]: one["assigned_role"] for one in (await door.get("/stats"))["instances"]}


async def test_all_workers_follow_one_decision_and_an_operator(fleet) -> None:
    proxy = await fleet(2, ADMIN_KEY="sk-admin", ROLES="auto")
    both = await engines(proxy, 3)
    doors = await proxy.doors()

    async def decided() -> bool:
        found = [await roles(door) for door in doors]
        return found[0] == found[1] and None not in found[0].values()

    await until(decided)
    found = await roles(doors[0])
    assert sorted(found.values()) == ["decode", "decode", "prefill"]
    prefill = next(engine for engine in both if found[engine.http_address] == "prefill")
    stream = await (await proxy.door()).begin_stream(max_tokens=3000, ignore_eos=True)
    for number, role in ((0, "decode"), (1, "prefill"), (0, "auto")):
        body = {"instance": prefill.http_address, "role": role}
        status, report = await soon(doors[number].post("/admin/role", body, **KEY))
        expected = "prefill" if role == "auto" else role
        assert (status, report["assigned_role"]) == (200, expected)
        for door in doors:
            assert (await roles(door))[prefill.http_address] == expected
    answers = await soon(asyncio.gather(*(door.ask() for door in doors for _ in range(4))))
    assert {(status, body["choices"][0]["text"]) for status, body in answers} == {(200, RIGHT)}
    stream.close()
    events = [line for line in proxy.lines if "from now on" in line and "worker 0" in line and "INFO" in line]
    assert len(events) == 6, "three first ones and three by hand, logged by one worker"


async def test_a_new_worker_follows_earlier_roles(fleet) -> None:
    proxy = await fleet(2, ADMIN_KEY="sk-admin")
    both = await engines(proxy, 2)
    doors = await proxy.doors()
    for engine, role in zip(both, ("prefill", "decode"), strict=True):
        status, _ = await doors[0].post("/admin/role", {"instance": engine.http_address, "role": role}, **KEY)
        assert status == 200
    seen = len(proxy.lines)
    pids = await proxy.pids()
    os.kill(pids[0], signal.SIGKILL)
    await proxy.until_written("Worker 0 serves again", seen)
    fresh = (await proxy.doors())[0]
    for engine, role in zip(both, ("prefill", "decode"), strict=True):
        shown_now = await fresh.instance(engine)
        assert (shown_now["assigned_role"], shown_now["assigned_role_reason"]) == (role, "set by an operator")
    assert (await fresh.ask())[0] == 200
