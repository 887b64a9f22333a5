"""Prefill and decode on two real GPUs, started by the project's own script, and a plain engine to compare with.

Needs two GPUs, vLLM (0.21.0 was used) and GPU_TEST_MODEL, a model directory or name; docs/testing.md has the command.
Figures go to the file named by GPU_RESULTS, one JSON object a line.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
MODEL = os.environ.get("GPU_TEST_MODEL", "")
SERVED = "gpu-test"
CHUNK = 4096
_PLAIN_START_SECONDS = 240


def _why_not() -> str | None:
    if shutil.which("nvidia-smi") is None:
        return "there is no nvidia-smi: no NVIDIA GPUs here"
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False).stdout
    if listed.count("GPU ") < 2:
        return f"two GPUs are needed, nvidia-smi lists {listed.count('GPU ')}"
    if importlib.util.find_spec("vllm") is None:
        return "vllm is not installed in this Python"
    return None if MODEL else "GPU_TEST_MODEL is not set"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = _why_not()
    for item in items:
        if "tests/gpu/" in item.nodeid:
            item.add_marker(pytest.mark.gpu)
            item.add_marker(pytest.mark.timeout(500))
            if reason:
                item.add_marker(pytest.mark.skip(reason=reason))


def free_port() -> int:
    """A port that was free a moment ago; the script wants numbers."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Machine:
    """The running script: its settings and the URLs of what it started."""

    def __init__(self, folder: Path, settings: dict[str, str]) -> None:
        self.ports = {name: free_port() for name in ("HTTP_PROXY_PORT", "PREFILL_HTTP_PORT", "DECODE_HTTP_PORT")}
        self.environment = {
            **os.environ,
            "ENGINE": "vllm",
            "MODEL": MODEL,
            "SERVED_MODEL_NAME": SERVED,
            "PYTHON": sys.executable,
            "RUN_DIR": str(folder / "run"),
            "LOG_DIR": os.environ.get("GPU_LOGS", str(folder / "logs")),
            "MAX_MODEL_LEN": "10000",
            "PREFILL_GPU_MEMORY_UTILIZATION": "0.4",
            "DECODE_GPU_MEMORY_UTILIZATION": "0.4",
            "PROXY_COMPILED": "0",
            "HTTP_PROXY_HOST": "127.0.0.1",
            "EXTRA_PREFILL_ARGS": "--enable-auto-tool-choice --tool-call-parser hermes",
            "EXTRA_DECODE_ARGS": "--enable-auto-tool-choice --tool-call-parser hermes",
            **{name: str(port) for name, port in self.ports.items()},
            **settings,
        }
        self.proxy = f"http://127.0.0.1:{self.ports['HTTP_PROXY_PORT']}"
        self.prefill = f"http://127.0.0.1:{self.ports['PREFILL_HTTP_PORT']}"
        self.decode = f"http://127.0.0.1:{self.ports['DECODE_HTTP_PORT']}"

    def script(self, *words: str, timeout: float = 400) -> str:
        """Run one command of the script; its output, or a failed test."""
        done = subprocess.run(
            [str(ROOT / "test_single_machine.sh"), *words],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        assert done.returncode == 0, f"{words} exited {done.returncode}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
        return done.stdout + done.stderr

    def get(self, url: str) -> str:
        """Text of one GET."""
        with urllib.request.urlopen(url, timeout=30) as answer:
            return str(answer.read().decode())

    def stats(self) -> Any:
        """The proxy's /stats."""
        return json.loads(self.get(self.proxy + "/stats"))


@pytest.fixture(scope="session")
def record() -> Callable[..., None]:
    """Write down one figure."""
    target = os.environ.get("GPU_RESULTS")

    def write(name: str, **figures: Any) -> None:
        line = json.dumps({"name": name, **figures})
        print(line)
        if target:
            with open(target, "a", encoding="utf-8") as out:
                out.write(line + "\n")

    return write


@pytest.fixture(scope="session")
def machine(tmp_path_factory: pytest.TempPathFactory, record: Callable[..., None]) -> Iterator[Machine]:
    """P on GPU 0, D on GPU 1, prefill in chunks of 4096 tokens."""
    found = Machine(tmp_path_factory.mktemp("gpu"), {"MAX_NUM_BATCHED_TOKENS": str(CHUNK), "CHUNKED_PREFILL": "on"})
    begun = time.monotonic()
    try:
        found.script("all", "--no-supervise")
        record("all", seconds=round(time.monotonic() - begun, 1))
        yield found
    finally:
        found.script("stop")


@pytest.fixture(scope="session")
def plain(machine: Machine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of an undivided engine beside P on GPU 0, which is why it starts after it."""
    port = free_port()
    log = tmp_path_factory.mktemp("plain") / "plain.log"
    command = [
        sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", MODEL, "--served-model-name", SERVED,
        "--host", "127.0.0.1", "--port", str(port), "--enforce-eager", "--max-model-len", "10000",
        "--max-num-batched-tokens", str(CHUNK), "--gpu-memory-utilization", "0.3",
    ]  # fmt: skip
    with log.open("wb") as out:
        process = subprocess.Popen(command, env={**os.environ, "CUDA_VISIBLE_DEVICES": "0"}, stdout=out, stderr=out)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(_PLAIN_START_SECONDS):
            if process.poll() is not None:
                break
            try:
                machine.get(url + "/health")
                break
            except (urllib.error.URLError, ConnectionError):
                time.sleep(1)
        if process.poll() is not None:
            pytest.fail(f"the plain engine ended:\n{log.read_text()[-3000:]}")
        yield url
    finally:
        process.terminate()
        process.wait(60)
