"""Policies as a client sees them: which engine got what."""

from __future__ import annotations

from typing import Any

import pytest

from disagg_proxy.cluster.instance import State
from disagg_sim import SimEngine
from tests.simulated import Machine

settings = pytest.mark.settings
SYSTEMS = [f"Assistant number {n}. " * 90 for n in range(6)]


async def engines(machine: Machine, count: int = 3) -> tuple[list[SimEngine], list[SimEngine]]:
    prefills = [await machine.engine("prefill") for _ in range(count)]
    decodes = [await machine.engine("decode") for _ in range(count)]
    for engine in (*prefills, *decodes):
        await machine.proxy.until_state(engine.http_address, State.READY)
    return prefills, decodes


def served(engines: list[SimEngine], text: str) -> list[int]:
    """How many generation requests with ``text`` in them each engine got."""
    return [sum(r.method == "POST" and text.encode() in r.body for r in engine.requests) for engine in engines]


def chat(system: str, *said: str) -> dict[str, Any]:
    turns = [{"role": "user" if at % 2 == 0 else "assistant", "content": text} for at, text in enumerate(said)]
    return {"model": "sim-model", "max_tokens": 2, "messages": [{"role": "system", "content": system}, *turns]}


async def test_by_default_the_same_prefix_goes_to_one_prefill_and_hits_its_cache(machine: Machine) -> None:
    prefills, decodes = await engines(machine)
    for question in range(3):
        for system in SYSTEMS:
            status, _, body = await machine.post("/v1/chat/completions", chat(system, f"Question {question}?"))
            assert status == 200, body
    for system in SYSTEMS:
        assert sorted(served(prefills, system[:40])) == [0, 0, 3]
    assert sum(any(served(prefills, s[:40])[at] for s in SYSTEMS) for at in range(3)) > 1
    await machine.unharmed(*prefills, *decodes)


async def test_a_conversation_stays_through_every_route(machine: Machine) -> None:
    prefills, _ = await engines(machine)
    system, said = SYSTEMS[0], ["First question?"]
    for _ in range(4):
        status, _, body = await machine.post("/v1/chat/completions", chat(system, *said))
        assert status == 200, body
        said += [body["choices"][0]["message"]["content"], "And then?"]
    messages = {**chat(system, *said), "system": system}
    messages["messages"] = messages["messages"][1:]
    assert (await machine.post("/v1/messages", messages))[0] == 200
    assert sorted(served(prefills, "First question?")) == [0, 0, 5]


async def test_token_ids_and_texts_stay_too(machine: Machine) -> None:
    prefills, _ = await engines(machine)
    for prompt in (list(range(300, 900)), SYSTEMS[1]):
        before = [len(engine.requests) for engine in prefills]
        for rest in range(4):
            more = [rest] if isinstance(prompt, list) else str(rest)
            body = {"model": "sim-model", "prompt": prompt + more, "max_tokens": 2}
            assert (await machine.post("/v1/completions", body))[0] == 200
        got = [
            sum(r.method == "POST" for r in engine.requests[start:])
            for engine, start in zip(prefills, before, strict=True)
        ]
        assert sorted(got) == [0, 0, 4]


@settings(prefill_policy="round_robin", decode_policy="round_robin")
async def test_round_robin_spreads_the_same_prefix(machine: Machine) -> None:
    prefills, _ = await engines(machine)
    for question in range(6):
        await machine.post("/v1/chat/completions", chat(SYSTEMS[0], f"Question {question}?"))
    assert served(prefills, SYSTEMS[0][:40]) == [2, 2, 2]


@settings(prefill_policy="session", decode_policy="session", session_header="X-Talk")
async def test_a_session_sticks_by_header_or_user(machine: Machine) -> None:
    prefills, decodes = await engines(machine)
    for name in range(8):
        for turn in range(3):
            question = chat("", f"[{name}] question {turn}?")
            named = {"X-Talk": f"talk {name}"} if name % 2 else {}
            # A header goes before the body's user.
            question["user"] = f"user {turn}" if name % 2 else f"user {name}"
            assert (await machine.post("/v1/chat/completions", question, **named))[0] == 200
    for side in (prefills, decodes):
        for name in range(8):
            assert sorted(served(side, f"[{name}]")) == [0, 0, 3]
        assert sum(any(served(side, f"[{name}]")[at] for name in range(8)) for at in range(3)) > 1


async def test_when_the_one_with_the_prefix_dies_another_takes_over_and_keeps_it(machine: Machine) -> None:
    prefills, _ = await engines(machine)
    await machine.post("/v1/chat/completions", chat(SYSTEMS[0], "One?"))
    first = served(prefills, "One?").index(1)
    await machine.kill(prefills[first])
    for _ in range(3):
        assert (await machine.post("/v1/chat/completions", chat(SYSTEMS[0], "Two?")))[0] == 200
    assert sorted(served(prefills, "Two?")) == [0, 0, 3] and not served(prefills, "Two?")[first]
