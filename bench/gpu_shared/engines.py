"""The processes of one run, and the requests to them."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

ROOT = Path(__file__).parents[2]
HOST = "127.0.0.1"
_NUMBERS = itertools.count()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


@dataclass(frozen=True)
class Options:
    """What all engines have in common."""

    model: str
    out: Path
    simulated: bool = False
    eager: bool = False
    kv_cache: str = "10G"
    utilization: str = "0.2"
    arguments: tuple[str, ...] = ()


@dataclass
class Process:
    """One child in a process group of its own, with its log."""

    name: str
    command: list[str]
    environment: dict[str, str]
    out: Path
    popen: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with (self.out / f"{self.name}.log").open("ab") as log:
            self.popen = subprocess.Popen(
                self.command, env={**os.environ, **self.environment}, stdout=log, stderr=log, start_new_session=True
            )

    @property
    def alive(self) -> bool:
        return self.popen is not None and self.popen.poll() is None

    def kill(self) -> None:
        """End the whole group with SIGKILL."""
        if self.popen is not None:
            try:
                os.killpg(self.popen.pid, signal.SIGKILL)
                self.popen.wait(20)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                pass


@dataclass
class Engine:
    """One engine.

    Attributes:
        role: prefill, decode, or plain (without a connector).
        proxy: the proxy's registration port; 0: it does not announce itself, and requests go to it directly.
        transport: of the connector.
    """

    name: str
    role: str
    gpu: str
    options: Options
    transport: str = "auto"
    proxy: int = 0
    port: int = field(default_factory=free_port)
    kv_port: int = field(default_factory=free_port)
    process: Process = field(init=False)

    def __post_init__(self) -> None:
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
        environment = {
            "PYTHONPATH": path, "CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": self.gpu,
            "VLLM_HOST_IP": HOST, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1",
            "VLLM_USE_FLASHINFER_SAMPLER": "0", "DISAGG_KV_TRACE": str(self.trace), "AIDS_FILE": str(self.aids),
            "PYTHONUNBUFFERED": "1",
        }  # fmt: skip
        command = self._simulated() if self.options.simulated else self._vllm()
        self.process = Process(self.name, command, environment, self.options.out)

    @property
    def trace(self) -> Path:
        return self.options.out / f"{self.name}.trace"

    @property
    def aids(self) -> Path:
        return self.options.out / f"{self.name}.aids"

    @property
    def kv_address(self) -> str:
        return f"{HOST}:{self.kv_port}"

    def _vllm(self) -> list[str]:
        options = self.options
        command = [
            sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", options.model, "--served-model-name", "m",
            "--host", HOST, "--port", str(self.port), "--dtype", "bfloat16", "--max-model-len", "10000",
            "--max-num-batched-tokens", "8192", "--max-num-seqs", "64", "--kv-cache-memory-bytes", options.kv_cache,
            "--gpu-memory-utilization", options.utilization, "--enable-prompt-tokens-details",
        ]  # fmt: skip
        if options.eager:
            command.append("--enforce-eager")
        else:
            command += ["--compilation-config", '{"cudagraph_capture_sizes":[1,2,4,8,16,32]}']
        if self.role != "plain":
            command += ["--kv-transfer-config", json.dumps(self._transfer_config())]
        return [*command, *options.arguments]

    def _transfer_config(self) -> dict[str, Any]:
        extra: dict[str, Any] = {"transport": self.transport}
        if self.proxy:
            extra |= {"proxy_ip": HOST, "proxy_port": self.proxy, "http_port": self.port}
        return {
            "kv_connector": "DisaggKVConnector", "kv_connector_module_path": "bench.gpu_shared.checked",
            "kv_role": "kv_producer" if self.role == "prefill" else "kv_consumer", "kv_port": self.kv_port,
            "kv_load_failure_policy": "recompute", "kv_connector_extra_config": extra,
        }  # fmt: skip

    def _simulated(self) -> list[str]:
        role = "prefill" if self.role == "prefill" else "decode"
        command = [
            sys.executable, "-m", "disagg_sim", "--role", role, "--connector", "disagg_kv", "--host", HOST, "--port",
            str(self.port), "--kv-port", str(self.kv_port), "--model", "m",
        ]  # fmt: skip
        return [*command, *(["--proxy", f"{HOST}:{self.proxy}"] if self.proxy else [])]


def proxy_process(options: Options, port: int, registration: int) -> Process:
    command = [sys.executable, "-m", "disagg_proxy", "serve", "--http-host", HOST, "--http-port", str(port),
               "--zmq-host", HOST, "--zmq-port", str(registration)]  # fmt: skip
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    return Process("proxy", command, {"PYTHONPATH": path}, options.out)


@dataclass(frozen=True)
class Answer:
    """What a client saw. Times are wall clock, as in the traces; ``status`` is 0 where the connection broke."""

    status: int
    start: float
    first: float = 0.0
    end: float = 0.0
    text: str = ""
    logprobs: tuple[float, ...] = ()

    @property
    def ttft(self) -> float:
        return self.first - self.start


class Client:
    """Requests to engines and the proxy."""

    def __init__(self, http: aiohttp.ClientSession) -> None:
        self._http = http

    async def ready(self, port: int, deadline: float, process: Process, path: str = "/health") -> bool:
        """Wait until GET ``path`` answers 200; False if the process ends or ``deadline`` (monotonic) passes."""
        while time.monotonic() < deadline and process.alive:
            try:
                async with self._http.get(f"http://{HOST}:{port}{path}") as answer:
                    if answer.status == 200:
                        return True
            except (aiohttp.ClientError, asyncio.TimeoutError):
                pass
            await asyncio.sleep(0.5)
        return False

    async def complete(self, port: int, prompt: list[int], tokens: int, **more: Any) -> Answer:
        """One streamed completion; greedy, with the logprob of each token."""
        body = {"model": "m", "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True,
                "stream": True, "logprobs": 1, **more}  # fmt: skip
        start, first, text, logprobs = time.time(), 0.0, "", list[float]()
        try:
            async with self._http.post(f"http://{HOST}:{port}/v1/completions", json=body) as answer:
                if answer.status != 200:
                    return Answer(answer.status, start, text=(await answer.text())[:300])
                async for line in answer.content:
                    if not line.startswith(b"data: {"):
                        continue
                    first = first or time.time()
                    for choice in json.loads(line[6:]).get("choices", ()):
                        text += choice["text"]
                        logprobs += (choice.get("logprobs") or {}).get("token_logprobs") or []
        except (aiohttp.ClientError, asyncio.TimeoutError) as error:
            return Answer(0, start, first, time.time(), f"{type(error).__name__}: {error}")
        return Answer(200, start, first, time.time(), text, tuple(logprobs))

    async def pair(self, prefill: Engine, decode: Engine, prompt: list[int], tokens: int) -> Answer:
        """Both legs at once, without the proxy; decode's answer."""
        name = f"direct-{next(_NUMBERS)}"
        other = asyncio.create_task(self.complete(prefill.port, prompt, 1, kv_transfer_params={"transfer_id": name}))
        params = {"transfer_id": name, "from": prefill.kv_address}
        answer = await self.complete(decode.port, prompt, tokens, kv_transfer_params=params)
        await other
        return answer

    async def metrics(self, engine: Engine) -> dict[str, float]:
        """Tokens loaded from prefill, share of the KV cache in use, requests that run or wait."""
        async with self._http.get(f"http://{HOST}:{engine.port}/metrics") as answer:
            text = await answer.text()
        found = {}
        for name, pattern in (
            ("loaded", r'^vllm:prompt_tokens_by_source_total\{.*source="external_kv_transfer".*\} (\S+)$'),
            ("usage", r"^vllm:kv_cache_usage_perc\{.*\} (\S+)$"),
            ("running", r"^vllm:num_requests_running\{.*\} (\S+)$"),
            ("waiting", r"^vllm:num_requests_waiting\{.*\} (\S+)$"),
        ):
            found[name] = sum(float(value) for value in re.findall(pattern, text, re.M))
        return found

    async def get(self, port: int, path: str) -> dict[str, Any]:
        async with self._http.get(f"http://{HOST}:{port}{path}") as answer:
            result: dict[str, Any] = await answer.json()
            return result
