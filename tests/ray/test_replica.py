"""What a replica owns, with real proxies and simulated engines as processes, and without Ray."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from disagg_ray import claims, keys, scaling
from disagg_ray.claims import NoPort
from disagg_ray.commands import Node
from disagg_ray.process import Ended
from disagg_ray.proxies import Proxies, request
from disagg_ray.replica import Engine, Part, ProxyServer, Unhealthy
from disagg_ray.settings import Cluster, Proxy, Role
from tests.ports import hold_port

SECRET = "the shared secret"
LIMIT = 120.0


def until(true: Callable[[], Any], what: str) -> Any:
    """Wait for something that other processes do."""
    deadline = time.monotonic() + LIMIT
    while not (found := true()):
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(0.02)
    return found


class Machine:
    """A node with an address of its own, a proxy on it, and the engines of a test."""

    def __init__(self, cluster: Cluster, stack: ExitStack) -> None:
        pid = os.getpid()
        self.host = f"127.{1 + pid // 250 % 250}.{pid % 250}.1"
        port, registration = hold_port(stack, self.host), hold_port(stack, self.host)
        settings = {"PROBE_INTERVAL": "0.3", "INSTANCE_EXPIRY": "5"}
        args = ("--ping-seconds", "0.2", "--time-per-output-token", "0.01")
        self.cluster = replace(
            cluster,
            proxy=Proxy((self.host,), self.host, port, registration, settings),
            prefill=Role(args=args),
            decode=Role(args=args),
            start_timeout=LIMIT,
            drain_timeout=LIMIT,
            stop_timeout=10.0,
        )
        self.node = Node(self.host, SECRET, cluster.secret_file, (self.host,))
        self.url = f"http://{self.host}:{port}"
        self.parts: list[Part] = []
        stack.callback(self.stop)
        self.proxy = ProxyServer(self.cluster, self.node)
        self.parts.append(self.proxy)
        self.proxy.start()

    def engine(self, role: str, node: Node | None = None) -> Engine:
        engine = Engine(self.cluster, node or self.node, role)
        self.parts.append(engine)
        engine.start()
        return engine

    def stop(self) -> None:
        for part in self.parts:
            part.stop()

    def seen(self) -> dict[str, dict[str, Any]]:
        """The engines that the proxy knows, by address."""
        (instances,) = Proxies.of([self.proxy.http_address], SECRET).instances().values()
        return {one["http_address"]: one for one in instances or ()}

    def until_ready(self, *engines: Engine) -> None:
        for engine in engines:
            until(lambda one=engine: self.seen().get(one.http_address, {}).get("state") == "ready", engine.http_address)

    def complete(self, tokens: int = 4) -> int:
        body = json.dumps({"model": "Qwen3-4B", "prompt": "San Francisco is a", "max_tokens": tokens}).encode()
        sent = urllib.request.Request(f"{self.url}/v1/completions", body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(sent, timeout=LIMIT) as answer:
                answer.read()
                return int(answer.status)
        except OSError as error:
            return int(getattr(error, "code", 0))


@pytest.fixture
def machine(cluster: Cluster) -> Iterator[Machine]:
    with ExitStack() as stack:
        yield Machine(cluster, stack)


def test_engines_prove_themselves_and_serve(machine: Machine) -> None:
    prefill, decode = machine.engine("prefill"), machine.engine("decode")
    machine.until_ready(prefill, decode)
    assert machine.complete() == 200
    for part in machine.parts:
        part.check()
    assert request("GET", f"http://{decode.http_address}/v1/models")[0] == 401, "past the proxy a key is needed"
    key = keys.derived(SECRET, keys.ENGINE)
    assert request("GET", f"http://{decode.http_address}/v1/models", key)[0] == 200


def test_an_engine_with_another_secret_is_not_used(machine: Machine, tmp_path: Path) -> None:
    (tmp_path / "other").write_text("another\n")
    engine = machine.engine("decode", replace(machine.node, secret="another", secret_file=str(tmp_path / "other")))
    dropped = until(lambda: request("GET", f"{machine.url}/stats")[1]["discovery"]["dropped"], "its pings are dropped")
    assert set(dropped) == {"unproven"} and engine.http_address not in machine.seen()


def test_an_engine_that_stops_fails_no_request(machine: Machine) -> None:
    stays, leaves = machine.engine("decode"), machine.engine("decode")
    machine.until_ready(stays, leaves)
    end, statuses = threading.Event(), []

    def send() -> None:
        while not end.is_set():
            statuses.append(machine.complete(40))

    threads = [threading.Thread(target=send) for _ in range(4)]
    for thread in threads:
        thread.start()
    until(lambda: machine.seen()[leaves.http_address]["in_flight"], "it has requests")
    leaves.drain_and_stop()
    after = len(statuses)
    until(lambda: len(statuses) >= after + 4, "the other one goes on")
    end.set()
    for thread in threads:
        thread.join()
    assert set(statuses) == {200}
    assert leaves.process is not None and not Path(f"/proc/{leaves.process.pid}").exists()


def test_a_new_engine_on_a_drained_address_gets_requests(machine: Machine) -> None:
    first = machine.engine("decode")
    machine.until_ready(first)
    first.drain_and_stop()
    second = machine.engine("decode")
    assert second.http_address == first.http_address, "its port was given back"
    machine.until_ready(second)
    assert not machine.seen()[second.http_address]["draining"] and machine.complete() == 200


def test_a_dead_engine_fails_its_health_check(machine: Machine) -> None:
    engine = machine.engine("prefill")
    assert engine.process is not None
    os.kill(engine.process.pid, signal.SIGKILL)
    until(lambda: engine.process._keeper.poll() is not None, "its keeper has ended")  # type: ignore[union-attr]
    with pytest.raises(Ended, match=r"prefill 127.* ended with signal 9"):
        engine.check()
    engine.stop()
    engine.check()


def test_a_stopped_engine_fails_its_health_check(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = machine.engine("prefill")
    assert engine.process is not None
    monkeypatch.setattr("disagg_ray.replica._HEALTH_TIMEOUT", 0.2)
    os.kill(engine.process.pid, signal.SIGSTOP)
    with pytest.raises(Unhealthy, match="answers /health with nothing"):
        engine.check()


def test_an_engine_that_does_not_start_says_why(machine: Machine) -> None:
    machine.cluster = replace(machine.cluster, prefill=Role(args=("--max-num-seqs", "0")))
    with pytest.raises(Ended, match=r"prefill 127.* ended with exit code 2.*max_num_seqs must be at least 1"):
        machine.engine("prefill")
    assert [path.name for path in claims.folder(machine.cluster.run_dir).glob("http-*")] == []


def test_a_port_that_is_taken_in_between_is_left_to_its_owner(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bind test has passed, and then another program was faster than the engine."""
    first, last = machine.cluster.ports["http"]
    monkeypatch.setattr(claims, "may_bind", lambda host, port: True)
    with socket.socket() as intruder:
        intruder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        intruder.bind((machine.host, first))
        intruder.listen()
        intruder.setblocking(False)
        monkeypatch.setattr("disagg_ray.replica._READY_TIMEOUT", 0.1)
        engine = machine.engine("decode")
        assert first < engine.http <= last
        machine.until_ready(engine)


def test_a_second_proxy_waits_and_then_names_the_ports(machine: Machine) -> None:
    second = ProxyServer(replace(machine.cluster, stop_timeout=0.1), machine.node)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("disagg_ray.replica._PORT_WAIT", 0.2)
        with pytest.raises(NoPort, match=r"proxy.port, proxy.registration_port: \d+ or \d+ is taken on 127"):
            second.start()
    machine.proxy.stop()
    successor = ProxyServer(machine.cluster, machine.node)
    machine.parts.append(successor)
    successor.start()
    assert request("GET", f"{machine.url}/livez")[0] == 200


def test_figures_for_scaling_come_from_the_proxies(machine: Machine) -> None:
    prefill, decode = machine.engine("prefill"), machine.engine("decode")
    machine.until_ready(prefill, decode)
    assert decode.figures() == {"load": 0.0, "latency": 0.0}
    running = threading.Thread(target=machine.complete, args=(400,))
    running.start()
    until(lambda: decode.figures()["load"] == 1 / 256, "one request of 256")
    running.join()
    assert prefill.figures() == {"pressure": 0.0} and scaling.wanted(2, 0.0) == 1
    machine.proxy.stop()
    assert prefill.figures() == {}, "nothing is known, so nothing is changed"
