"""Real vLLM engines without a GPU as processes of a test: start, stop, kill, ask."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import aiohttp

PYTHON, MODEL = os.environ.get("VLLM_CPU_PYTHON"), os.environ.get("VLLM_CPU_MODEL")
ROOT = Path(__file__).parents[2]
_START_SECONDS = 500
ENVIRONMENT = {
    "TORCHDYNAMO_DISABLE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}
"""Of every engine on vllm-cpu."""
_ENVIRONMENT = {**ENVIRONMENT, "VLLM_HOST_IP": "127.0.0.1", "PYTHONPATH": str(ROOT)}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Engine:
    """One ``vllm serve``. ``role`` "" is an engine without a connector.

    Args:
        transfer: its --kv-transfer-config, where it is not this project's connector with ``extra`` for settings.
        environment: more variables.
        model: folder of its model, where it is not VLLM_CPU_MODEL.
    """

    def __init__(
        self,
        name: str,
        role: str,
        folder: Path,
        *arguments: str,
        transfer: dict[str, Any] | None = None,
        environment: dict[str, str] | None = None,
        model: str | Path | None = MODEL,
        **extra: Any,
    ) -> None:
        self.name, self.role, self.folder, self.arguments, self.extra = name, role, folder, arguments, extra
        self.transfer, self.environment, self.model = transfer, environment or {}, model
        self.port, self.kv_port = free_port(), free_port()
        self.fault = folder / f"{name}.fault"
        self.log = folder / f"{name}.log"
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def kv_address(self) -> str:
        return f"127.0.0.1:{self.kv_port}"

    def start(self) -> None:
        command = [
            str(PYTHON), "-m", "vllm.entrypoints.cli.main", "serve", str(self.model), "--served-model-name", "tiny",
            "--host", "127.0.0.1", "--port", str(self.port), "--enforce-eager", "--max-model-len", "1024",
            "--dtype", "float32", "--max-num-seqs", "16", "--kv-cache-memory-bytes", "64M", "--block-size", "32",
            *self.arguments,
        ]  # fmt: skip
        if self.role:
            config = self.transfer or {
                "kv_connector": "DisaggKVConnector", "kv_connector_module_path": "tests.kv_real.faulty",
                "kv_role": self.role, "kv_port": self.kv_port, "kv_load_failure_policy": "recompute",
                "kv_connector_extra_config": {"min_load_tokens": 1, **self.extra},
            }  # fmt: skip
            command += ["--kv-transfer-config", json.dumps(config)]
        environment = {**os.environ, **_ENVIRONMENT, **self.environment, "FAULT_FILE": str(self.fault)}
        with self.log.open("ab") as out:
            self.process = subprocess.Popen(command, env=environment, stdout=out, stderr=out, start_new_session=True)

    async def ready(self) -> None:
        deadline = time.monotonic() + _START_SECONDS
        async with aiohttp.ClientSession() as http:
            while time.monotonic() < deadline:
                assert self.process is not None and self.process.poll() is None, self.tail()
                try:
                    async with http.get(f"http://127.0.0.1:{self.port}/health") as answer:
                        if answer.status == 200:
                            return
                except aiohttp.ClientError:
                    pass
                await asyncio.sleep(0.5)
        raise AssertionError(f"{self.name} did not start:\n{self.tail()}")

    def kill(self) -> None:
        """As kill -9 of the whole engine."""
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(30)

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(30)
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self.process.pid, signal.SIGKILL)

    def tail(self) -> str:
        return self.log.read_text()[-4000:]

    async def post(self, body: dict[str, Any], path: str = "/v1/completions", **params: str) -> dict[str, Any]:
        """The answer's JSON; AssertionError unless it is a 200. ``params`` become kv_transfer_params."""
        message = {"model": "tiny", "temperature": 0, **body}
        if params:
            message["kv_transfer_params"] = {name.rstrip("_"): value for name, value in params.items()}
        timeout = aiohttp.ClientTimeout(400)
        url = f"http://127.0.0.1:{self.port}{path}"
        async with aiohttp.ClientSession(timeout=timeout) as http, http.post(url, json=message) as answer:
            assert answer.status == 200, await answer.text()
            result: dict[str, Any] = await answer.json()
            return result

    async def tokens_by_source(self) -> dict[str, float]:
        """vllm:prompt_tokens_by_source_total."""
        return {
            match[1]: float(match[2])
            for match in re.finditer(
                r'^vllm:prompt_tokens_by_source_total\{.*source="(\w+)".*\} (\S+)$', await self.metrics(), re.M
            )
        }

    async def metrics(self) -> str:
        async with aiohttp.ClientSession() as http, http.get(f"http://127.0.0.1:{self.port}/metrics") as answer:
            return await answer.text()

    async def number(self, name: str) -> float:
        """Value of a metric of one line."""
        match = re.search(rf"^{re.escape(name)}\{{.*\}} (\S+)$", await self.metrics(), re.M)
        assert match is not None, name
        return float(match[1])
