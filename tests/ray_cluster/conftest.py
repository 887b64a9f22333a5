"""Ray clusters on this machine: each node has a loopback address of its own, real Ray processes and no GPU.

Needs Ray (tests/cluster_ray makes an environment with it); the tests are skipped without.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from disagg_machine import proc
from disagg_ray.proxies import Proxies
from tests.ports import hold_port

ROOT = Path(__file__).parents[2]
SECRET = "the secret of this cluster"
LIMIT = 600.0
"""Seconds until a state must have come; how fast it does is no subject of these tests."""


def until(true: Callable[[], Any], what: str) -> Any:
    """Wait for a state of other processes. Returns what is true of it."""
    deadline = time.monotonic() + LIMIT
    while not (found := true()):
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(0.1)
    return found


def gone(pid: int) -> bool:
    stat = proc.read_stat(pid)
    return stat is None or not stat.runs


def parent(pid: int) -> int:
    """PID of a process's parent."""
    text = Path(f"/proc/{pid}/stat").read_text()
    return int(text[text.rindex(")") + 2 :].split()[1])


def patient(get_node: Callable[..., Any]) -> Callable[..., Any]:
    """`ray._private.services.get_node` for a busy machine: a Node gives up after 30 s otherwise (Ray 2.60)."""

    def wrapped(*args: Any, **options: Any) -> Any:
        deadline = time.monotonic() + 60
        while True:
            try:
                return get_node(*args, **options)
            except RuntimeError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)

    return wrapped


class RayCluster:
    """A Ray cluster, and the application on it.

    Attributes:
        net: the first three numbers of its addresses, so that test runs do not meet.
        raw: the cluster file as it was last written.
        patience: seconds that one command may take.
    """

    def __init__(self, folder: Path, hold: ExitStack, proxy_node: int = 1) -> None:
        from ray._private import services

        pid = os.getpid()
        self.net = f"127.{1 + pid // 250 % 250}.{pid % 250}"
        self.folder = folder
        (folder / "secret").write_text(SECRET)
        self.nodes: dict[str, Any] = {}
        self.patience = LIMIT
        self._hold = hold
        # A short path, because sockets are in it; Ray also writes outside its configured folder.
        self._temporary = tempfile.mkdtemp(prefix="ray-")
        hold.callback(shutil.rmtree, self._temporary, ignore_errors=True)
        ray_settings = {"RAY_TMPDIR": self._temporary, "RAY_USAGE_STATS_ENABLED": "0"}
        # Workers that nobody needs yet would only take CPU time.
        ray_settings |= {"RAY_prestart_worker_first_driver": "0", "RAY_enable_worker_prestart": "0"}
        # A busy machine is no reason to give a worker or a node up.
        ray_settings["RAY_worker_register_timeout_seconds"] = f"{LIMIT:.0f}"
        ray_settings["RAY_agent_register_timeout_ms"] = f"{1000 * LIMIT:.0f}"
        hold.enter_context(mock.patch.dict(os.environ, ray_settings, PYTHONPATH=str(ROOT)))
        os.mkdir(f"{self._temporary}/ray")
        hold.enter_context(mock.patch.object(services, "get_node", patient(services.get_node)))
        self.ray: Any = None
        self.proxy_host = self.address(proxy_node)
        self.proxy_port, self.registration_port = (hold_port(hold, self.proxy_host) for _ in range(2))
        self.raw: dict[str, Any] = {
            "name": "tested",
            "model": "sim-model",
            "engine": "sim",
            "secret_file": str(folder / "secret"),
            "run_dir": str(folder / "run"),
            "proxy": {
                "nodes": [self.proxy_host],
                "host": self.proxy_host,
                "port": self.proxy_port,
                "registration_port": self.registration_port,
                "settings": {"PROBE_INTERVAL": 0.5, "INSTANCE_EXPIRY": 3},
            },
            "prefill": {"count": 1, "resources": {"p": 1}, "args": ["--ping-seconds", "0.3"]},
            "decode": {
                "count": 2,
                "resources": {"d": 1},
                "args": ["--ping-seconds", "0.3", "--time-per-output-token", "0.02"],
            },
            "start_timeout": 60,
            "drain_timeout": 60,
            "stop_timeout": 5,
            "settings": {"MAX_NUM_SEQS": 8},
        }

    def address(self, number: int) -> str:
        """Address of a node."""
        return f"{self.net}.{number}"

    @property
    def gcs(self) -> str:
        """Address of the cluster."""
        return str(self.ray.address)

    @property
    def url(self) -> str:
        """The proxy."""
        return f"http://{self.proxy_host}:{self.proxy_port}"

    @property
    def proxies(self) -> Proxies:
        return Proxies.of([f"{self.proxy_host}:{self.proxy_port}"], SECRET)

    def add_node(self, number: int, resources: dict[str, float], cpus: int = 2, **environment: str) -> None:
        """A further node; the first is the head."""
        options: dict[str, Any] = {
            "node_ip_address": self.address(number),
            "num_cpus": cpus,
            "resources": resources,
            "object_store_memory": 80 * 2**20,
            "include_dashboard": False,
            "env_vars": environment,
        }
        from ray.cluster_utils import Cluster

        for left in range(4, -1, -1):
            if not self.nodes:
                self.ray = Cluster(initialize_head=False)
                options["temp_dir"] = f"{self._temporary}/ray"
                options["gcs_server_port"] = hold_port(self._hold, self.address(number))
            try:
                self.nodes[self.address(number)] = self.ray.add_node(**options)
                return
            except Exception:
                # On a busy machine the raylet dies while it waits for its agents, whose limit cannot be set (Ray 2.60).
                if not left:
                    raise

    def remove_node(self, number: int) -> None:
        """A node loses power: nothing on it says goodbye."""
        self.ray.remove_node(self.nodes.pop(self.address(number)), allow_graceful=False)

    def run(self, *words: str, code: int = 0) -> str:
        """Run `disagg-proxy cluster`. Returns all that it printed."""
        command = [sys.executable, "-m", "disagg_proxy", "cluster", "--address", self.gcs, *words]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=self.patience)
        output = done.stdout + done.stderr
        assert done.returncode == code, output
        return output

    def up(self, code: int = 0, **changes: Any) -> str:
        """Run `up` with the cluster file, changed first."""
        self.raw = {**self.raw, **changes}
        path = self.folder / "cluster.yaml"
        path.write_text(json.dumps(self.raw))  # JSON is YAML
        return self.run("up", str(path), code=code)

    # -- what runs

    def processes(self) -> dict[str, int]:
        """PIDs of engines and proxies by `KIND-ADDRESS-PORT`, from their claims."""
        found = {}
        for path in (self.folder / "run/claims").glob("*"):
            with suppress(FileNotFoundError):
                fields = path.read_text().split()
                if fields and not gone(int(fields[0])):
                    found[path.name] = int(fields[0])
        return found

    def pid(self, engine: str) -> int:
        """PID of an engine by `ADDRESS:PORT`."""
        return self.processes()[f"http-{engine.replace(':', '-')}"]

    def engines(self, role: str = "", state: str = "ready") -> list[str]:
        """Engines that the proxy uses, each `ADDRESS:PORT`."""
        (instances,) = self.proxies.instances().values()
        return sorted(
            one["http_address"]
            for one in instances or ()
            if role in ("", one["role"]) and one["state"] == state and not one["draining"]
        )

    def until_ready(self, prefill: int, decode: int) -> None:
        """Wait until exactly that many engines serve."""
        until(
            lambda: (len(self.engines("prefill")), len(self.engines("decode"))) == (prefill, decode),
            f"{prefill} prefills and {decode} decodes are ready",
        )

    def complete(self, tokens: int = 4) -> int:
        """Status of one completion; 0 when the connection failed."""
        body = {"model": "sim-model", "prompt": "San Francisco is a", "max_tokens": tokens}
        sent = urllib.request.Request(
            f"{self.url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(sent, timeout=LIMIT) as answer:
                answer.read()
                return int(answer.status)
        except urllib.error.HTTPError as error:
            with error:
                return error.code
        except OSError:
            return 0

    def close(self) -> None:
        """End everything, also what a failed test has left."""
        import ray

        ray.shutdown()
        left = set(self.processes().values())
        if self.nodes:
            self.ray.shutdown()
        try:
            for pid in left:
                until(lambda pid=pid: gone(pid), f"process {pid} ends with its node")
        finally:
            for pid in left:
                if not gone(pid):
                    os.killpg(pid, signal.SIGKILL)


class Load:
    """Requests, one after the other from each client, until the block ends.

    Attributes:
        statuses: of every request that ended.
    """

    def __init__(self, cluster: RayCluster, clients: int = 2, tokens: int = 4) -> None:
        self.statuses: list[int] = []
        self._cluster, self._tokens = cluster, tokens
        self._end = threading.Event()
        self._threads = [threading.Thread(target=self._run) for _ in range(clients)]

    def _run(self) -> None:
        # A pause, because all of the cluster shares this machine's cores.
        while not self._end.wait(0.1):
            self.statuses.append(self._cluster.complete(self._tokens))

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        self.more()
        return self

    def more(self, count: int = 20) -> None:
        """Wait until that many further requests have ended."""
        goal = len(self.statuses) + count
        until(lambda: len(self.statuses) >= goal, f"{count} more requests end")

    def __exit__(self, *_: object) -> None:
        self._end.set()
        for thread in self._threads:
            thread.join()

    @property
    def failed(self) -> list[int]:
        """Statuses of those that were not answered with 200."""
        return [status for status in self.statuses if status != 200]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayCluster]:
    """Three nodes with room for three prefills and three decodes; nothing runs yet."""
    pytest.importorskip("ray", reason="Ray is not installed: tests/cluster_ray")
    with ExitStack() as hold:
        made = RayCluster(tmp_path_factory.mktemp("cluster"), hold)
        try:
            made.add_node(1, {"p": 1, "d": 1})
            made.add_node(2, {"p": 1, "d": 1})
            made.add_node(3, {"p": 1, "d": 1})
            yield made
        finally:
            made.close()
