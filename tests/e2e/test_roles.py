"""Roles at run time: simulated engines of both roles behind a proxy, moved by load and by hand."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from disagg_proxy.cluster.assignment import Cause
from disagg_proxy.cluster.instance import Role, State
from disagg_proxy.placement.roles import InstanceFigures
from disagg_sim import SimEngine, expected_text
from tests.conftest import soon
from tests.e2e.together import ASK, COMPLETIONS, OWN, clean, right
from tests.simulated import Machine, events, text_of, text_of_events

BOTH = {**OWN, "kv_both": True}
ADMIN = "sk-admin"
P, D = Role.PREFILL, Role.DECODE
ALL = {"prefill_policy": "round_robin", "decode_policy": "round_robin", "probe_interval": 60.0, "admin_key": ADMIN}

automatic = pytest.mark.settings(**ALL, roles="auto")
announced = pytest.mark.settings(**ALL)


class Fleet:
    """Engines of both roles, and the decisions of their proxy, which the test makes one by one on its own clock."""

    def __init__(self, machine: Machine, engines: list[SimEngine]) -> None:
        self.machine = machine
        self.engines = engines
        self.services = machine.proxy.services
        self.time = 0.0
        self.load: dict[Role, dict[str, Any]] = {P: {}, D: {}}
        self._read = self.services.roles.figures
        self.services.roles.figures = self._figures

    def _figures(self, now: float) -> list[InstanceFigures]:
        quiet = {"read_at": now, "prefill_wait": 0.0, "running": 0, "kv_usage": 0.0}
        return [replace(one, **{**quiet, **self.load.get(one.role, {})}) for one in self._read(now)]

    def decide(self, seconds: int = 1) -> None:
        for _ in range(seconds):
            self.time += 1
            self.services.roles.step(self.time)

    def instance(self, engine: SimEngine):
        return self.machine.proxy.instance(engine.http_address)

    @property
    def roles(self) -> list[Role | None]:
        return [self.instance(engine).assigned_role for engine in self.engines]

    def having(self, role: Role) -> list[SimEngine]:
        return [engine for engine in self.engines if self.instance(engine).assigned_role is role]

    def log(self) -> list[str]:
        return [event.text for event in self.services.event_log.events if event.kind == "role"]


async def fleet(machine: Machine, count: int) -> Fleet:
    await machine.proxy.services.roles.stop()
    engines = [await machine.engine("decode", **BOTH) for _ in range(count)]
    for engine in engines:
        await soon(machine.proxy.until_state(engine.http_address, State.READY))
    return Fleet(machine, engines)


def legs(engine: SimEngine, since: int = 0) -> list[str]:
    """Which legs an engine has got: prefill, decode, or alone."""
    params = [request.json.get("kv_transfer_params") for request in engine.received(COMPLETIONS)[since:]]
    return ["alone" if one is None else "decode" if "from" in one else "prefill" for one in params]


async def post_role(machine: Machine, body: Any, key: str = ADMIN, query: str = "") -> tuple[int, Any]:
    headers = {"Authorization": f"Bearer {key}"}
    async with machine.http.post(machine.proxy.url + "/admin/role" + query, json=body, headers=headers) as answer:
        return answer.status, await answer.json()


async def by_hand(machine: Machine, engine: SimEngine, role: str) -> dict[str, Any]:
    status, body = await soon(post_role(machine, {"instance": engine.http_address, "role": role}))
    assert (status, body["http_address"]) == (200, engine.http_address)
    return body


async def answered(machine: Machine, count: int) -> None:
    prompts = [f"{ASK['prompt']} number {number}" for number in range(count)]
    answers = await asyncio.gather(*(soon(machine.post(COMPLETIONS, {**ASK, "prompt": p})) for p in prompts))
    assert [text_of(body) for _, _, body in answers] == [expected_text(prompt, 8) for prompt in prompts]


# -- by load


@automatic
async def test_each_engine_gets_a_role_and_legs_of_that_role(machine: Machine) -> None:
    here = await fleet(machine, 4)
    here.decide()
    assert here.roles.count(P) == here.roles.count(D) == 2
    await answered(machine, 8)
    for engine in here.engines:
        assert set(legs(engine)) == {"prefill" if engine in here.having(P) else "decode"}
    await clean(machine, *here.engines)


@automatic
async def test_a_move_in_the_middle_of_streams_fails_no_request(machine: Machine) -> None:
    here = await fleet(machine, 3)
    here.decide()
    assert len(here.having(D)) == 2
    for engine in here.having(D):
        engine.faults.hold("schedule")
    stream = {**ASK, "stream": True, "max_tokens": 60}
    streams = [asyncio.create_task(machine.send(COMPLETIONS, stream)) for _ in range(4)]
    for engine in here.having(D):
        await soon(engine.wait_until(lambda state: state["running"] + state["waiting"] == 2))
        engine.faults.step(passages=2)
    here.load = {P: {"prefill_wait": 2.0, "running": 1}, D: {"kv_usage": 0.2}}
    decodes = here.having(D)
    here.decide(20)
    (moved,) = set(decodes) & set(here.having(P))
    assert here.log()[-1] == (
        "prefill from now on: prompts wait 2000 ms for prefill, and decode has capacity (20 % full)"
    )
    (left,) = here.having(D)
    before = len(legs(moved)), len(legs(left))
    assert here.instance(moved).in_flight == 2, "its streams"
    for engine in decodes:
        engine.faults.release()
    await answered(machine, 6)
    assert set(legs(moved, before[0])) == {"prefill"} and set(legs(left, before[1])) == {"decode"}
    for sent in streams:
        status, _, raw = await soon(sent)
        assert status == 200 and text_of_events(events(raw)) == expected_text(ASK["prompt"], 60)
    await clean(machine, *here.engines)
    assert machine.proxy.services.stats.outcomes == {"ok": 10} and not machine.proxy.services.stats.failovers


@pytest.mark.settings(**ALL, placement="elastic")
async def test_elastic_placement_assigns_roles_too(machine: Machine) -> None:
    here = await fleet(machine, 3)
    here.decide()
    assert here.roles.count(P) == 1 and here.roles.count(D) == 2
    for _ in range(5):
        await answered(machine, 8)
    await clean(machine, *here.engines)


@automatic
async def test_moves_are_shown(machine: Machine) -> None:
    here = await fleet(machine, 4)
    here.decide()
    here.load = {P: {"prefill_wait": 0.5, "running": 1}, D: {"kv_usage": 0.1}}
    here.decide(20)
    _, stats = await machine.get("/stats")
    shown = {one["http_address"]: one for one in stats["instances"]}
    (moved,) = (one for one in shown.values() if one["role_moves"])
    assert (moved["roles"], moved["assigned_role"]) == (["prefill", "decode"], "prefill")
    assert moved["assigned_role_reason"].startswith("prompts wait 500 ms for prefill")
    assert moved["assigned_role_age_s"] >= 0
    async with machine.http.get(machine.proxy.url + "/metrics") as answer:
        lines = (await answer.text()).splitlines()
    counted = [line for line in lines if line.startswith("disagg_proxy_instance_role_moves_total")]
    assert sorted(line.rsplit(" ", 1)[1] for line in counted) == ["0.0", "0.0", "0.0", "1.0"]
    view = await machine.proxy.services.page_view()
    assert [e["text"] for e in view["events"] if e["kind"] == "role"] == here.log() and len(here.log()) == 5


@automatic
async def test_engines_that_show_no_figures_keep_their_first_roles(machine: Machine) -> None:
    here = await fleet(machine, 3)
    here.load = {P: {"prefill_wait": 9.0, "running": None}}
    here.decide()
    first = here.roles
    here.decide(200)
    assert here.roles == first and None not in first


@automatic
async def test_the_engine_that_was_moved_is_killed(machine: Machine) -> None:
    here = await fleet(machine, 3)
    here.decide()
    (prefill,) = here.having(P)
    await machine.kill(prefill)
    await answered(machine, 4)
    here.decide(5)
    (instead,) = (engine for engine in here.having(P) if engine is not prefill)
    assert here.instance(instead).assignment.cause is Cause.MISSING
    await answered(machine, 4)
    await machine.kill(instead)
    await right(machine.post(COMPLETIONS, ASK))
    for killed in (prefill, instead):
        await machine.restart(killed)
    here.decide(5)
    await answered(machine, 4)
    assert not machine.proxy.services.stats.outcomes.keys() - {"ok"}


@automatic
async def test_a_drained_engine_counts_as_away_and_keeps_its_role(machine: Machine) -> None:
    here = await fleet(machine, 3)
    here.decide()
    (prefill,) = here.having(P)
    machine.proxy.services.registry.drain(here.instance(prefill))
    before = len(legs(prefill))
    await answered(machine, 4)
    here.decide(5)
    assert len(here.having(P)) == 2 and here.instance(prefill).assigned_role is P
    await answered(machine, 4)
    assert len(legs(prefill)) == before
    await by_hand(machine, prefill, "decode")
    assert here.instance(prefill).draining and len(legs(prefill)) == before
    machine.proxy.services.registry.drain(here.instance(prefill), False)
    await answered(machine, 6)
    assert set(legs(prefill, before)) == {"decode"}
    await clean(machine, *here.engines)


async def test_without_the_setting_nothing_is_assigned(machine: Machine) -> None:
    here = await fleet(machine, 2)
    assert not here.services.roles.automatic
    await answered(machine, 4)
    assert here.roles == [None, None] and here.log() == []


@automatic
async def test_a_reload_ends_what_it_assigned(machine: Machine) -> None:
    here = await fleet(machine, 3)
    here.decide()
    config = here.services.config
    await by_hand(machine, here.engines[0], "decode")
    here.services.reloads.run(replace(config, roles="placement"))
    here.decide()
    assert here.roles == [D, None, None]
    assert here.log()[-1] == "prefill and decode from now on: roles are not assigned any more (ROLES)"
    here.services.reloads.run(replace(config, roles="placement", placement="elastic", slo_ttft_ms=400.0))
    here.decide()
    assert here.roles.count(P) == 1 and None not in here.roles
    here.load = {P: {"prefill_wait": 0.22, "running": 1}, D: {"kv_usage": 0.1}}
    here.decide(20)
    assert here.roles.count(P) == 2, "half of the time to first token"


# -- by hand


@announced
async def test_a_role_by_hand_stays_until_auto(machine: Machine) -> None:
    here = await fleet(machine, 2)
    first, second = here.engines
    for query in (False, True):
        for _ in range(2):
            if query:
                where = f"?instance={first.http_address}&role=prefill"
                status, body = await post_role(machine, {}, query=where)
            else:
                status, body = await post_role(machine, {"instance": first.http_address, "role": "prefill"})
            assert (status, body["assigned_role"], body["assigned_role_reason"]) == (
                200,
                "prefill",
                "set by an operator",
            )
    assert here.log() == ["prefill from now on: set by an operator"], "repeating it changes nothing"
    await answered(machine, 4)
    assert set(legs(first)) == {"prefill"} and set(legs(second)) == {"decode"}
    await machine.kill(first)
    here.engines[0] = first = await machine.restart(first)
    assert here.instance(first).assigned_role is P
    await answered(machine, 4)
    assert set(legs(first)) == {"prefill"}
    body = await by_hand(machine, first, "auto")
    assert (body["assigned_role"], body["assigned_role_reason"]) == (None, "set to auto by an operator")
    assert (await by_hand(machine, first, "auto"))["assigned_role"] is None
    assert here.log()[1:] == ["prefill and decode from now on: set to auto by an operator"]
    await answered(machine, 8)
    assert "decode" in legs(first)


@automatic
async def test_the_proxy_moves_no_engine_that_an_operator_has_set(machine: Machine) -> None:
    here = await fleet(machine, 3)
    here.decide()
    decodes = here.having(D)
    for engine in decodes:
        await by_hand(machine, engine, "decode")
    here.load = {P: {"prefill_wait": 2.0, "running": 1}, D: {"kv_usage": 0.1}}
    here.decide(100)
    assert here.having(D) == decodes
    assert (await by_hand(machine, decodes[1], "auto"))["assigned_role"] == "decode", "it keeps its role for now"
    here.decide(50)
    assert here.having(D) == decodes[:1]


@announced
async def test_mistakes_are_named(machine: Machine) -> None:
    prefill, decode = await machine.pair(**OWN)
    both = await machine.engine("decode", **BOTH)
    await soon(machine.proxy.until_state(both.http_address, State.READY))
    where = both.http_address
    for body, param in (
        ({"role": "prefill"}, "instance"),
        ({"instance": where}, "role"),
        ({"instance": where, "role": "both"}, "role"),
        ({"instance": where, "role": None}, "role"),
        ({"instance": prefill.http_address, "role": "prefill"}, "instance"),
        ({"instance": decode.http_address, "role": "auto"}, "instance"),
        (["x"], None),
    ):
        status, answer = await post_role(machine, body)
        assert (status, answer["error"]["param"]) == (400, param), body
    status, answer = await post_role(machine, {"instance": where, "role": "decode"}, query="?role=prefill")
    assert (status, answer["error"]["param"]) == (400, "role"), "given twice"
    status, answer = await post_role(machine, {"instance": "127.0.0.1:1", "role": "decode"})
    assert (status, answer["error"]["code"]) == (404, "instance_not_found")
    assert (await post_role(machine, {"instance": where, "role": "decode"}, key="x"))[0] == 401
    async with machine.http.post(
        machine.proxy.url + "/admin/role", data=b"{", headers={"Authorization": f"Bearer {ADMIN}"}
    ) as answer:
        assert answer.status == 400
    assert machine.proxy.instance(where).assignment is None


async def test_without_an_admin_key_there_is_no_such_route(machine: Machine) -> None:
    assert (await post_role(machine, {"instance": "127.0.0.1:1", "role": "auto"}))[0] == 404
