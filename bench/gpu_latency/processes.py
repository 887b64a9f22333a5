"""The processes of one run: prefill, decode, the proxy, and how each is started, seen to be ready, and ended.

The flags are those of test_single_machine.sh (disagg_machine/commands.py), which says why each is there.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from disagg_report.load_client import Broken, LoadClient, Response

ROOT = Path(__file__).parents[2]
SERVED = "m"
HOST = "127.0.0.1"
_LOADED = 'source="external_kv_transfer"'

Connector = Literal["p2p_nccl", "own"]


class NotReady(Exception):
    """A process ended, or did not become ready in time."""


@dataclass(frozen=True)
class Machine:
    """How the engines are to run.

    Attributes:
        eager: as ENFORCE_EAGER of the script: auto (1 with p2p_nccl, 0 with own), 0, 1, prefill.
        kv_buffer: bytes on decode for KV that has arrived; p2p_nccl only, 0 for own.
        per_token: bytes of KV of one prompt token.
        arguments: further ones for both engines; they come last and win.
    """

    model: str
    connector: Connector
    engines: Literal["vllm", "sim"]
    python: str
    out: Path
    per_token: int
    eager: str = "auto"
    kv_buffer: int = 8_000_000_000
    max_model_len: int = 10_000
    memory: float = 0.6
    dtype: str = "bfloat16"
    arguments: tuple[str, ...] = ()
    proxy_arguments: tuple[str, ...] = ()


def free_port() -> int:
    """A port that was free a moment ago; vLLM wants a number."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


@dataclass
class Process:
    """One child in a process group of its own, writing to one log."""

    name: str
    command: list[str]
    environment: dict[str, str]
    log: Path
    port: int
    popen: subprocess.Popen[bytes] | None = None
    client: LoadClient = field(init=False)

    def __post_init__(self) -> None:
        self.client = LoadClient(f"http://{HOST}:{self.port}")

    def start(self) -> None:
        with self.log.open("wb") as out:
            self.popen = subprocess.Popen(
                self.command, env={**os.environ, **self.environment}, stdout=out, stderr=out, start_new_session=True
            )

    async def wait(self, path: str, ready: Any, deadline: float) -> None:
        """Until GET ``path`` gives an answer of which ``ready`` says yes; ``deadline`` is a ``time.monotonic``.

        Raises:
            NotReady: with the end of the log.
        """
        why = "it did not answer"
        while time.monotonic() < deadline:
            if self.popen is None or self.popen.poll() is not None:
                why = f"it ended with {self.popen and self.popen.returncode}"
                break
            with suppress(Broken, asyncio.TimeoutError, ValueError):
                answer = await asyncio.wait_for(self.client.get(path), 3)
                why = f"{path} said {answer.status} {bytes(answer.body[:300])!r}"
                if ready(answer):
                    return
            await asyncio.sleep(0.25)
        tail = self.log.read_bytes()[-3000:].decode(errors="replace")
        raise NotReady(f"{self.name} is not ready: {why}\n{tail}")

    def kill(self) -> None:
        """End it and all that it started, however deep it is in a forward pass."""
        if self.popen is not None:
            with suppress(ProcessLookupError):
                os.killpg(self.popen.pid, signal.SIGKILL)

    def gone(self, deadline: float) -> bool:
        """Wait until no process of the group is left, so that its GPU memory is free; whether that is so."""
        if self.popen is None:
            return True
        with suppress(subprocess.TimeoutExpired):
            self.popen.wait(max(0.1, deadline - time.monotonic()))
        while _lives(self.popen.pid):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.1)
        return True

    def cpu_seconds(self) -> float:
        """Processor time of the process itself so far; 0 where the kernel does not say."""
        if self.popen is None:
            return 0.0
        try:
            fields = Path(f"/proc/{self.popen.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return 0.0
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _lives(group: int) -> bool:
    """Whether a process of the group is left; one that waits to be reaped holds no memory."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _, pgrp = path.read_text().rpartition(")")[2].split()[:3]
            if int(pgrp) == group and state not in "ZX":
                return True
    return False


class Stack:
    """Prefill, decode and proxy of one run.

    Args:
        gpus: of prefill and of decode, as in CUDA_VISIBLE_DEVICES.
    """

    def __init__(self, machine: Machine, gpus: tuple[str, str] = ("0", "1")) -> None:
        self.machine = machine
        self._zmq = free_port()
        self._kv = {role: free_port() for role in ("prefill", "decode")}
        machine.out.mkdir(parents=True, exist_ok=True)
        self.prefill = self._engine("prefill", gpus[0])
        self.decode = self._engine("decode", gpus[1])
        self.proxy = self._proxy()
        self.engines = [self.prefill, self.decode]
        self.proxies = [self.proxy]

    @property
    def processes(self) -> list[Process]:
        """All of them, proxies first."""
        return [*self.proxies, *self.engines]

    @property
    def kv_addresses(self) -> tuple[str, str]:
        """Where KV leaves prefill and where it enters decode."""
        return f"{HOST}:{self._kv['prefill']}", f"{HOST}:{self._kv['decode']}"

    async def start(self, deadline: float) -> None:
        """Everything at the same time, until each proxy knows a pair.

        Raises:
            NotReady: something did not come up.
        """
        for process in self.processes:
            process.start()
        # A proxy that lacks a package says so at once, not after the engines' minute.
        for proxy in self.proxies:
            await proxy.wait("/livez", lambda answer: answer.status == 200, min(deadline, time.monotonic() + 30))
        waits = [asyncio.ensure_future(self._answers(one, deadline)) for one in self.engines]
        try:
            await asyncio.gather(*waits)
        finally:
            for wait in waits:
                wait.cancel()
            await asyncio.gather(*waits, return_exceptions=True)
        for proxy in self.proxies:
            await proxy.wait("/health", _knows_a_pair, min(deadline, time.monotonic() + 30))

    async def _answers(self, engine: Process, deadline: float) -> None:
        await engine.wait("/health", lambda answer: answer.status == 200, deadline)

    def alive(self) -> bool:
        """Whether no process has ended."""
        return all(one.popen is not None and one.popen.poll() is None for one in self.processes)

    def stop(self) -> None:
        """End everything, and wait until it has."""
        for process in self.processes:
            process.client.close()
            process.kill()
        deadline = time.monotonic() + 15
        for process in self.processes:
            if not process.gone(deadline):
                print(f"{process.name} (group {process.popen and process.popen.pid}) did not end", file=sys.stderr)

    async def loaded_tokens(self) -> float:
        """Prompt tokens whose KV decode got from prefill so far, by its own count."""
        answer = await asyncio.wait_for(self.decode.client.get("/metrics"), 10)
        lines = answer.body.decode().splitlines()
        found = (line for line in lines if line.startswith("vllm:prompt_tokens_by_source_total") and _LOADED in line)
        return float(next(found, "0 0").rsplit(" ", 1)[1])

    # -- commands

    def _process(self, name: str, command: list[str], environment: dict[str, str], port: int) -> Process:
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
        log = self.machine.out / f"{name}.log"
        return Process(name, command, {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **environment}, log, port)

    def _proxy(self) -> Process:
        port, machine = free_port(), self.machine
        command = [
            sys.executable, "-m", "disagg_proxy", "--http-host", HOST, "--http-port", str(port), "--zmq-host", HOST,
            "--zmq-port", str(self._zmq), "--decode-max-in-flight", "256",
        ]  # fmt: skip
        if machine.connector == "p2p_nccl":
            command += ["--kv-buffer-bytes", str(machine.kv_buffer), "--kv-bytes-per-token", str(machine.per_token)]
        return self._process("proxy", [*command, *machine.proxy_arguments], {}, port)

    def _engine(self, role: str, gpu: str) -> Process:
        port = free_port()
        if self.machine.engines == "sim":
            return self._process(role, self._sim(role, port), {}, port)
        environment = {
            "CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": gpu, "VLLM_HOST_IP": HOST,
            "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1",
            "VLLM_USE_FLASHINFER_SAMPLER": "0",
        }  # fmt: skip
        if self.machine.connector == "p2p_nccl":
            environment["VLLM_DISABLE_REQUEST_ID_RANDOMIZATION"] = "1"
        return self._process(role, self._vllm(role, port), environment, port)

    def _sim(self, role: str, port: int) -> list[str]:
        connector = "p2p_nccl" if self.machine.connector == "p2p_nccl" else "disagg_kv"
        return [
            self.machine.python, "-m", "disagg_sim", "--role", role, "--host", HOST, "--port", str(port),
            "--kv-port", str(self._kv[role]), "--proxy", f"{HOST}:{self._zmq}", "--model", SERVED,
            "--connector", connector, "--max-model-len", str(self.machine.max_model_len),
            "--kv-buffer-bytes", str(self.machine.kv_buffer or 8_000_000_000),
            "--kv-bytes-per-token", str(self.machine.per_token), *self.machine.arguments,
        ]  # fmt: skip

    def _vllm(self, role: str, port: int) -> list[str]:
        machine, p2p = self.machine, self.machine.connector == "p2p_nccl"
        command = [
            machine.python, "-m", "vllm.entrypoints.cli.main", "serve", machine.model, "--served-model-name", SERVED,
            "--host", HOST, "--port", str(port), "--dtype", machine.dtype, "--max-model-len",
            str(machine.max_model_len), "--max-num-batched-tokens", str(machine.max_model_len), "--max-num-seqs", "256",
            "--gpu-memory-utilization", str(machine.memory),
        ]  # fmt: skip
        eager = {"auto": p2p, "prefill": role == "prefill"}.get(machine.eager, machine.eager == "1")
        if eager:
            command += ["--enforce-eager"]
        elif p2p and role == "prefill":
            command += ["--compilation-config", '{"cudagraph_mode":"PIECEWISE"}']
        if p2p:
            command += ["--no-enable-chunked-prefill" if role == "prefill" else "--no-enable-prefix-caching"]
        config = self._p2p_config(role, port) if p2p else self._own_config(role, port)
        return [*command, "--kv-transfer-config", json.dumps(config), *machine.arguments]

    def _p2p_config(self, role: str, port: int) -> dict[str, Any]:
        produces = role == "prefill"
        return {
            "kv_connector": "P2pNcclConnector", "kv_role": "kv_producer" if produces else "kv_consumer",
            "kv_buffer_size": "1e1" if produces else str(float(self.machine.kv_buffer)),
            "kv_port": str(self._kv[role]),
            "kv_connector_extra_config": {
                "proxy_ip": HOST, "proxy_port": str(self._zmq), "http_port": str(port), "send_type": "PUT_ASYNC",
                "nccl_num_channels": "16", "mem_pool_size_gb": "1" if produces else "4",
            },
        }  # fmt: skip

    def _own_config(self, role: str, port: int) -> dict[str, Any]:
        produces = role == "prefill"
        return {
            "kv_connector": "DisaggKVConnector", "kv_connector_module_path": "disagg_kv.connector",
            "kv_role": "kv_producer" if produces else "kv_consumer", "kv_port": self._kv[role],
            **({} if produces else {"kv_load_failure_policy": "recompute"}),
            "kv_connector_extra_config": {"proxy_ip": HOST, "proxy_port": self._zmq, "http_port": port},
        }  # fmt: skip


def _knows_a_pair(answer: Response) -> bool:
    return answer.status == 200 and int(answer.json()["pairs"]) > 0
