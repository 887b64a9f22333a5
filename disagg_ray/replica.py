"""What one Serve replica owns: an engine or a proxy, from its port to its end. Knows nothing of Ray.

An engine that stops is drained at every proxy first, so that no request fails with it.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from disagg_machine import vllm_facts
from disagg_machine.commands import Command
from disagg_machine.vllm_facts import VllmFacts
from disagg_ray import claims, commands, scaling
from disagg_ray.claims import Claim
from disagg_ray.commands import Node, authority
from disagg_ray.process import Ended, Process
from disagg_ray.proxies import Proxies, get_text, request
from disagg_ray.settings import Cluster

log = logging.getLogger(__name__)

_PACKAGES = Path(__file__).parents[1]
ROOT = "" if _PACKAGES.name in ("site-packages", "dist-packages") else str(_PACKAGES)
"""The checkout, for the processes' Pythons. Empty where this is installed: in another environment, such as vLLM's, it
must be installed too, because the packages around this one are not that environment's."""

_PORT_TAKEN = ("address already in use", "eaddrinuse")
_TRIES = 5
_POLL = 0.1
_HEALTH_TIMEOUT = 10.0
_READY_TIMEOUT = 5.0
_PORT_WAIT = 15.0
"""Seconds that a proxy waits for the ports of its predecessor, besides stop_timeout."""


class Unhealthy(Exception):
    """The process runs but does not answer."""


class Part:
    """One process of the cluster on this node.

    Args:
        environ: of the replica.
    """

    role: str
    health_path: str

    def __init__(self, cluster: Cluster, node: Node, environ: Mapping[str, str] = os.environ) -> None:
        self.cluster, self.node, self.environ = cluster, node, environ
        self.proxies = Proxies.of(commands.proxy_addresses(cluster, node.proxies), node.secret)
        self.process: Process | None = None
        self._claims: list[Claim] = []
        self._stopped = False

    @property
    def http_address(self) -> str:
        """Where it answers, ``HOST:PORT``."""
        raise NotImplementedError

    def _launch(self, command: Command, port: int) -> Process:
        hosts = [self.node.host, *self.node.proxies]
        environment = commands.environment(command, self.environ, hosts, ROOT)
        name = f"{self.role} {authority(self.node.host, port)}"
        path = Path(self.cluster.run_dir) / "logs" / f"{self.role}-{self.node.host}-{port}.log"
        keep = [claim.fd for claim in self._claims]
        process = Process(name, command.words, environment, path, self.cluster.stop_timeout, keep)
        self._claims[0].record(process.pid)
        return process

    def _until_ready(self, process: Process) -> None:
        """
        Raises:
            Ended: the process has.
            Unhealthy: it did not answer within start_timeout.
        """
        deadline = time.monotonic() + self.cluster.start_timeout
        url = f"http://{self.http_address}{self.health_path}"
        while request("GET", url, seconds=_READY_TIMEOUT)[0] != 200:
            process.check()
            if time.monotonic() > deadline:
                raise Unhealthy(f"{process.name} did not answer within start_timeout, see {process.log}")
            time.sleep(_POLL)
        process.check()

    def check(self) -> None:
        """
        Raises:
            Ended: the process has.
            Unhealthy: it does not answer its health check.
        """
        if self._stopped or self.process is None:
            return
        self.process.check()
        status, _ = request("GET", f"http://{self.http_address}{self.health_path}", seconds=_HEALTH_TIMEOUT)
        if status != 200:
            raise Unhealthy(f"{self.process.name} answers {self.health_path} with {status or 'nothing'}")

    def stop(self) -> None:
        """End the process, and give its ports back. May be repeated."""
        self._stopped = True
        if self.process is not None:
            self.process.stop()
        while self._claims:
            self._claims.pop().release()


class Engine(Part):
    """A prefill or decode engine."""

    health_path = "/health"

    def __init__(self, cluster: Cluster, node: Node, role: str, environ: Mapping[str, str] = os.environ) -> None:
        super().__init__(cluster, node, environ)
        self.role = role
        self.http = self.kv = 0
        self._before = scaling.Figures()

    @property
    def http_address(self) -> str:
        """Where it answers, ``HOST:PORT``."""
        return authority(self.node.host, self.http)

    def start(self) -> None:
        """Return when it answers.

        Raises:
            Ended, Unhealthy, NoPort: it does not run; the text says why.
        """
        claims.sweep(self.cluster.run_dir, self.node.host)
        facts = self._vllm()
        taken: list[Claim] = []
        try:
            for last in range(_TRIES - 1, -1, -1):
                self._claim_ports()
                try:
                    self.process = self._launch(self._command(facts), self.http)
                    self._until_ready(self.process)
                    break
                except Ended as error:
                    # Somebody took a port between the bind test and the engine's own bind.
                    if not last or not any(words in str(error).lower() for words in _PORT_TAKEN):
                        raise
                    taken += self._claims
                    self._claims = []
        except BaseException:
            self.stop()
            raise
        finally:
            for claim in taken:
                claim.release()
        # An engine that had this address before may have been drained; this is another one.
        self.proxies.undrain(self.http_address)

    def _vllm(self) -> VllmFacts | None:
        if self.cluster.engine == "sim":
            return None
        python = self.cluster.python or sys.executable
        facts = vllm_facts.of_python(python, vllm_facts.runs_in(self.environ))
        if facts is None:
            raise Ended(f"python: {python} on {self.node.host} has no vLLM")
        return facts

    def _claim_ports(self) -> None:
        cluster, host = self.cluster, self.node.host
        width = cluster.role(self.role).tensor_parallel
        self._claims.append(http := claims.claim(cluster.run_dir, host, "http", cluster.ports["http"]))
        self._claims.append(kv := claims.claim(cluster.run_dir, host, "kv", cluster.ports["kv"], width))
        self.http, self.kv = http.port, kv.port

    def _command(self, facts: VllmFacts | None) -> Command:
        return commands.engine(
            self.cluster, self.node, self.role, self.http, self.kv,
            python=sys.executable, environ=self.environ, vllm=facts,
        )  # fmt: skip

    def drain_and_stop(self) -> None:
        """Stop when its requests have ended, at most ``drain_timeout`` later."""
        if self._stopped:
            return
        self._stopped = True
        if self.process is not None and not self.proxies.drain(self.http_address, self.cluster.drain_timeout):
            log.warning("%s is stopped with requests: drain_timeout is over", self.process.name)
        self.stop()

    def figures(self) -> dict[str, float]:
        """What the scaling policy of its role needs, measured since the last call (:mod:`disagg_ray.scaling`).

        Empty while no proxy answers: nothing is known then, which is no reason to scale.
        """
        key = self.proxies.monitoring_key
        texts = [text for url in self.proxies.urls if (text := get_text(f"{url}/metrics", key))]
        if not texts:
            return {}
        now = scaling.read_metrics(texts)
        before, self._before = self._before, now
        if self.role == "prefill":
            return {"pressure": scaling.prefill_pressure(now, before, self.cluster.slo)}
        slots = int(self.cluster.settings.get("MAX_NUM_SEQS", "256"))
        latency = scaling.decode_latency(now, before, self.cluster.slo)
        return {"load": scaling.decode_load(now, slots), "latency": latency}


class ProxyServer(Part):
    """A proxy, on ports of the cluster file."""

    role = "proxy"
    health_path = "/livez"

    @property
    def http_address(self) -> str:
        """Where it answers, ``HOST:PORT``."""
        return commands.proxy_addresses(self.cluster, [self.node.host])[0]

    def start(self) -> None:
        """Return when it answers. Its predecessor on the same ports may still be finishing requests.

        Raises:
            Ended, Unhealthy, NoPort: it does not run; the text says why.
        """
        settings = self.cluster.proxy
        base = claims.folder(self.cluster.run_dir)
        claims.sweep(self.cluster.run_dir, self.node.host)
        deadline = time.monotonic() + self.cluster.stop_timeout + _PORT_WAIT
        while (claim := claims.claim_port(base, self.node.host, "proxy", settings.port)) is None or not (
            claims.may_bind(settings.host or self.node.host, settings.port)
            and claims.may_bind(self.node.host, settings.registration_port)
        ):
            if claim is not None:
                claim.release()
            if time.monotonic() > deadline:
                ports = f"{settings.port} or {settings.registration_port}"
                raise claims.NoPort(f"proxy.port, proxy.registration_port: {ports} is taken on {self.node.host}")
            time.sleep(_POLL)
        self._claims.append(claim)
        try:
            command = commands.proxy(self.cluster, self.node, sys.executable)
            self.process = self._launch(command, settings.port)
            self._until_ready(self.process)
        except BaseException:
            self.stop()
            raise
