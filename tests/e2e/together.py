"""What the tests of engines with this project's own connector share."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from disagg_sim import SimEngine, encode, expected_chat_text, expected_text
from tests.conftest import soon
from tests.simulated import Machine, text_of

OWN = {"connector": "disagg_kv"}
PROMPT = " ".join(f"word{n}" for n in range(20))
TOKENS = len(encode(PROMPT))
CHAT = [{"role": "user", "content": PROMPT}]
COMPLETIONS, RESPONSES = "/v1/completions", "/v1/responses"
ASK: dict[str, Any] = {"model": "sim-model", "prompt": PROMPT, "max_tokens": 8}
REQUESTS: dict[str, dict[str, Any]] = {
    COMPLETIONS: ASK,
    "/v1/chat/completions": {"model": "sim-model", "messages": CHAT, "max_tokens": 8},
    "/v1/messages": {"model": "sim-model", "messages": CHAT, "max_tokens": 8},
    RESPONSES: {"model": "sim-model", "input": PROMPT, "max_output_tokens": 8},
}
RIGHT = {
    path: expected_text(PROMPT, 8) if "prompt" in body else expected_chat_text(CHAT, 8)
    for path, body in REQUESTS.items()
}
ROUTES = pytest.mark.parametrize("path", REQUESTS)
settings = pytest.mark.settings
in_turn = settings(prefill_policy="round_robin", decode_policy="round_robin", probe_interval=60.0)


def external(engine: SimEngine) -> int:
    return int(engine.state()["tokens_by_source"]["external_kv_transfer"])


def computed(engine: SimEngine) -> int:
    return int(engine.state()["tokens_by_source"]["local_compute"])


def transfers(engine: SimEngine, path: str = COMPLETIONS) -> list[dict[str, str]]:
    return [request.json.get("kv_transfer_params") for request in engine.received(path)]


async def clean(machine: Machine, *engines: SimEngine) -> None:
    """Nothing is in flight, held or waited for."""
    await soon(machine.proxy.until_idle())
    await machine.unharmed(*engines)
    for engine in engines:
        assert engine.state().get("kv_wants", 0) == 0
    for instance in machine.proxy.services.registry.instances():
        assert (instance.in_flight, instance.kv_waiting) == (0, 0), instance


async def asked(machine: Machine, body: dict[str, Any] | None = None) -> asyncio.Task[Any]:
    return asyncio.create_task(machine.post(COMPLETIONS, body or ASK))


async def right(answer: Any) -> None:
    status, _, body = await soon(answer)
    assert status == 200, body
    assert text_of(body) == RIGHT[COMPLETIONS]


async def meets(prefill: SimEngine, decode: SimEngine) -> None:
    """Decode's WANT has come to prefill."""
    await soon(decode.wait_until(lambda s: s["kv_waiting"] and s["kv_links"]))
    await soon(prefill.wait_until(lambda s: s["kv_wants"] > 0))


async def has_request(engine: SimEngine) -> None:
    await engine.wait_until(lambda s: bool(engine.received(COMPLETIONS)))
