"""The simulated overlay as processes: two proxies, engines that prove themselves, probes, and the drain hooks."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import re
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from disagg_sim import expected_text
from tests.command import Command, EngineProcess, Run, engine_process
from tests.deploy.kubernetes import FOLDER, container, environment, words, workloads
from tests.ports import hold_port

HOOK = FOLDER / "base/drain.py"
ADMIN = {"Authorization": "Bearer a"}
ROLES = ("prefill", "decode")
NAMES = ("disagg-proxy-0.disagg-registration", "disagg-proxy-1.disagg-registration")


@dataclass
class Pods:
    """Addresses of the pods on loopback, and their ports in the place of those in the manifests."""

    folder: Path
    ports: dict[str, str]
    addresses: dict[str, str] = field(default_factory=dict)

    def placed(self, text: str) -> str:
        """With these addresses and ports."""
        for name in NAMES:
            text = text.replace(name, self.addresses[name])
        text = text.replace("/etc/disagg", str(self.folder))
        return re.sub(rf"\b({'|'.join(self.ports)})\b", lambda match: self.ports[match[1]], text)

    def environment(self, part: str, address: str) -> dict[str, str]:
        keys = {"admin-key": "a", "engine-api-key": "e", "api-key": "k", "status.podIP": address}
        found = environment(container(workloads("sim")[part]), keys)
        return {name: self.placed(value) for name, value in found.items()}

    def words(self, part: str, address: str) -> list[str]:
        one = container(workloads("sim")[part])
        return [
            self.placed(word) for word in words(one, environment(one, {"status.podIP": address, "engine-api-key": "e"}))
        ]

    def hook(self, role: str) -> dict[str, str]:
        """The environment of an engine's hooks."""
        return {
            **self.environment(role, self.addresses[role]),
            "ENGINE_PORT": self.ports["8000"],
            "PROXY_HTTP_PORT": self.ports["10001"],
            "ADMIN_KEY_FILE": str(self.folder / "admin-key"),
            "PROXY_SERVICE": self.addresses[NAMES[0]],
        }


@pytest.fixture
def pods(tmp_path: Path) -> AsyncIterator[Pods]:
    with ExitStack() as hold:
        subnet = f"127.{40 + os.getpid() % 200}.{os.getpid() >> 8 & 255}"
        addresses = {name: f"{subnet}.{number}" for number, name in enumerate((*NAMES, *ROLES), 10)}
        # The same port at every address, as in pods; taken at the first one.
        ports = {}
        for port, holders in {"10001": NAMES, "30001": NAMES, "8000": ROLES, "21001": ROLES}.items():
            ports[port] = str(hold_port(hold, addresses[holders[0]]))
            hold_port(hold, addresses[holders[1]], int(ports[port]))
        (tmp_path / "kv-secret").write_text("shared\n")
        (tmp_path / "admin-key").write_text("a\n")
        yield Pods(tmp_path, ports, addresses)


@dataclass
class Service:
    """What runs."""

    pods: Pods
    proxies: list[Command]
    engines: dict[str, EngineProcess]


@pytest.fixture
async def service(pods: Pods, run: Run) -> AsyncIterator[Service]:
    proxies = []
    for name in NAMES:
        address = pods.addresses[name]
        listen = {"HTTP_PROXY_HOST": address, "HTTP_PROXY_PORT": pods.ports["10001"]}
        listen |= {"PROXY_HOST": address, "PROXY_PORT": pods.ports["30001"]}
        given = {**pods.environment("proxy", address), **listen}
        proxies.append(await (await run(*pods.words("proxy", address), **given)).until_ready())
    async with AsyncExitStack() as stack:
        engines = {}
        for role in ROLES:
            command, *flags = pods.words(role, pods.addresses[role])
            assert command == "sim"
            stack.enter_context(variables(pods.environment(role, pods.addresses[role])))
            one = engine_process(role, None, *flags, "--ping-seconds", "0.1", "--time-per-output-token", "0")
            engines[role] = await stack.enter_async_context(one)
        for proxy in proxies:
            await proxy.until_serving()
        yield Service(pods, proxies, engines)


def variables(given: dict[str, str]) -> ExitStack:
    """Environment variables for processes that are started meanwhile."""
    stack = ExitStack()
    patch = pytest.MonkeyPatch()
    for name, value in given.items():
        patch.setenv(name, value)
    stack.callback(patch.undo)
    return stack


async def hook(action: str, environ: dict[str, str]) -> tuple[int, str]:
    """Exit code and standard error of a hook, in a bare Python."""
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-I", "-S", str(HOOK), action, env=environ, stderr=asyncio.subprocess.PIPE
    )
    _, written = await asyncio.wait_for(child.communicate(), 60)
    assert child.returncode is not None
    return child.returncode, written.decode()


async def instances(http: Any, proxy: Command) -> dict[str, dict[str, Any]]:
    async with http.get(f"{proxy.url}/admin/instances", headers=ADMIN) as answer:
        body = await answer.json()
    listed = body["instances"] if isinstance(body, dict) else body
    return {one["http_address"]: one for one in listed}


async def test_both_proxies_serve_engines_that_proved_the_secret(service: Service, http: Any) -> None:
    body = {"model": "sim-model", "prompt": "a b c", "max_tokens": 4, "temperature": 0}
    for proxy in service.proxies:
        async with http.post(f"{proxy.url}/v1/completions", json=body, headers={"Authorization": "Bearer k"}) as answer:
            assert (await answer.json())["choices"][0]["text"] == expected_text("a b c", 4)
        for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
            path = container(workloads("sim")["proxy"])[probe]["httpGet"]["path"]
            async with http.get(proxy.url + path) as answer:
                assert answer.status == 200
    for role, engine in service.engines.items():
        for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
            path = container(workloads("sim")[role])[probe]["httpGet"]["path"]
            async with http.get(f"http://{engine.http_address}{path}") as answer:
                assert answer.status == 200


async def test_a_pod_is_drained_before_it_stops_and_undrained_when_one_starts(service: Service, http: Any) -> None:
    first = service.proxies[0]
    address = service.engines["prefill"].http_address
    assert not (await instances(http, first))[address]["draining"]
    assert await hook("drain", service.pods.hook("prefill")) == (0, "")
    drained = (await instances(http, first))[address]
    assert drained["draining"] and drained["idle"]
    assert await hook("undrain", service.pods.hook("prefill")) == (0, "")
    assert not (await instances(http, first))[address]["draining"]


async def test_a_hook_passes_over_what_does_not_know_the_engine(service: Service) -> None:
    environ = {**service.pods.hook("prefill"), "ENGINE_PORT": "1"}
    assert await hook("drain", environ) == (0, "")
    code, written = await hook("drain", {**environ, "ADMIN_KEY_FILE": str(service.pods.folder / "kv-secret")})
    assert code == 1 and "401" in written


async def test_a_hook_without_proxies_ends(pods: Pods) -> None:
    """Ports are held: nobody listens there."""
    assert (await hook("undrain", pods.hook("decode")))[0] == 0
    code, written = await hook("drain", pods.hook("decode"))
    assert code == 1 and "ConnectionRefusedError" in written
    nowhere = {**pods.hook("decode"), "ADMIN_KEY_FILE": "/nonexistent"}
    assert [(await hook(action, nowhere))[0] for action in ("drain", "undrain")] == [1, 0]


@pytest.fixture(scope="module")
def drain() -> ModuleType:
    spec = importlib.util.spec_from_file_location("drain", HOOK)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_a_hook_sends(drain: ModuleType) -> None:
    environ = {"POD_IP": "10.8.0.7", "DRAIN_SECONDS": "30"}
    assert drain.target("drain", environ) == "/admin/drain?instance=10.8.0.7:8000&wait=30"
    assert drain.target("undrain", environ) == "/admin/undrain?instance=10.8.0.7:8000"
    assert drain.target("undrain", {"POD_IP": "fd00::7"}) == "/admin/undrain?instance=[fd00::7]:8000"
    assert json.loads(json.dumps(drain.seconds({}))) == 300
