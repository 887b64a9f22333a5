"""compose.yaml: its settings are those of the code, and the simulated machine that it describes serves."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from contextlib import ExitStack
from typing import Any

import pytest

from disagg_machine import table
from disagg_proxy.config.table import SETTINGS
from disagg_sim import expected_text
from tests.command import ROOT, Run, engine_process
from tests.ports import hold_port

yaml = pytest.importorskip("yaml")

FOLDER = ROOT / "deploy/docker"
TEXT = (FOLDER / "compose.yaml").read_text()
DEFAULTS = {setting.env: setting.default for setting in SETTINGS}


def composed(**environ: str) -> dict[str, Any]:
    """The file with its variables filled in, as `docker compose` does."""
    filled = re.sub(r"\$\{(\w+):-([^}]*)\}", lambda match: environ.get(match[1]) or match[2], TEXT)
    assert "$" not in filled
    found: dict[str, Any] = yaml.safe_load(filled)
    return found


SERVICES: dict[str, dict[str, Any]] = composed()["services"]


def seconds(text: str) -> int:
    assert text.endswith("s")
    return int(text[:-1])


def test_simulated_engines_are_what_runs_without_a_profile() -> None:
    assert "COMPOSE_PROFILES=sim" in (FOLDER / ".env").read_text().splitlines()
    profiles = {name: one["profiles"] for name, one in SERVICES.items()}
    assert profiles == {"proxy": ["sim"], "prefill": ["sim"], "decode": ["sim"], "machine": ["gpu"]}


@pytest.mark.parametrize("name", SERVICES)
def test_every_service(name: str) -> None:
    service = SERVICES[name]
    known = {*DEFAULTS, *table.BY_ENV, "VLLM_API_KEY", "HF_TOKEN"}
    assert set(service.get("environment", {})) <= known
    assert (ROOT / service["build"]["dockerfile"]).is_file()
    assert (FOLDER / service["build"]["context"]).resolve() == ROOT
    assert service["init"] is True and service["cap_drop"] == ["ALL"] and service["restart"] == "unless-stopped"
    assert service["security_opt"] == ["no-new-privileges:true"]
    # What has no key is open to this machine only; the container's side is the default port.
    for port in service.get("ports", ()):
        assert port == f"127.0.0.1:10001:{DEFAULTS['HTTP_PROXY_PORT']}"
    if name != "machine":
        assert service["read_only"] is True


def test_containers_get_the_time_that_a_shutdown_takes() -> None:
    assert seconds(SERVICES["proxy"]["stop_grace_period"]) >= float(DEFAULTS["SHUTDOWN_GRACE"]) + 5
    stop = int(table.BY_ENV["STOP_TIMEOUT"].default)
    assert seconds(SERVICES["machine"]["stop_grace_period"]) >= 30 + 2 * stop + 5


def test_ports_of_the_engines_are_the_defaults_of_the_machine() -> None:
    for role in ("prefill", "decode"):
        words = SERVICES[role]["command"]
        for flag, setting in (("--port", "HTTP_PORT"), ("--kv-port", "KV_PORT")):
            assert words[words.index(flag) + 1] == table.BY_ENV[f"{role.upper()}_{setting}"].default
        address = SERVICES[role]["networks"]["engines"]["ipv4_address"]
        assert words[words.index("--host") + 1] == address
        assert (
            SERVICES[role]["healthcheck"]["test"][-1] == f"http://{address}:{words[words.index('--port') + 1]}/health"
        )
        proxy = SERVICES["proxy"]["networks"]["engines"]["ipv4_address"]
        assert words[words.index("--proxy") + 1] == f"{proxy}:{DEFAULTS['PROXY_PORT']}"


def test_every_variable_is_in_the_documentation() -> None:
    page = (ROOT / "docs/deployment.md").read_text()
    for name in set(re.findall(r"\$\{(\w+):-", TEXT)):
        assert f"`{name}`" in page, name


PORTS = {"10001": 10, "30001": 10, "20003": 11, "21001": 11, "20005": 12, "22001": 12}
"""Ports of the containers, with the last number of their addresses."""


async def test_the_simulated_machine_serves_and_its_health_checks_agree(run: Run, http) -> None:
    """Its commands with their addresses, as processes on loopback addresses instead of containers."""
    with ExitStack() as hold:
        subnet = "127.30.240"
        ports = {port: str(hold_port(hold, f"{subnet}.{last}")) for port, last in PORTS.items()}
        text = json.dumps(composed(SUBNET=subnet, API_KEY="sesame", ENGINE_API_KEY="back")["services"])
        services = json.loads(re.sub(rf"\b({'|'.join(ports)})\b", lambda match: ports[match[1]], text))
        host = services["proxy"]["networks"]["engines"]["ipv4_address"]
        settings = dict(services["proxy"]["environment"])
        # The kernel sends from 127.0.0.1 whatever the destination on loopback is.
        settings["ALLOW_REGISTER"] += ",127.0.0.1"
        hosts = {
            "HTTP_PROXY_HOST": host,
            "HTTP_PROXY_PORT": ports["10001"],
            "PROXY_HOST": host,
            "PROXY_PORT": ports["30001"],
        }
        command = await (await run("serve", **{**settings, **hosts})).until_ready()
        words = {role: services[role]["command"] for role in ("prefill", "decode")}
        assert all(one[:3] == ["sim", "--role", role] for role, one in words.items())
        key = ("--api-key", services["prefill"]["environment"]["VLLM_API_KEY"])
        async with (
            engine_process("prefill", None, *words["prefill"][3:], *key, "--ping-seconds", "0.1"),
            engine_process("decode", None, *words["decode"][3:], *key, "--ping-seconds", "0.1"),
        ):
            await command.until_serving()
            body = {"model": "sim-model", "prompt": "a b c", "max_tokens": 4, "temperature": 0}
            sent = {"Authorization": "Bearer sesame"}
            async with http.post(command.url + "/v1/completions", json=body, headers=sent) as answer:
                assert (await answer.json())["choices"][0]["text"] == expected_text("a b c", 4)
            for role in ("prefill", "decode"):
                test = services[role]["healthcheck"]["test"]
                assert test[:3] == ["CMD", "python", "/opt/healthcheck.py"]
                done = subprocess.run([sys.executable, FOLDER / "healthcheck.py", *test[3:]], capture_output=True)
                assert done.returncode == 0, done.stdout
        assert await command.end(signal.SIGTERM) == 0


def test_it_is_read_the_same_by_json() -> None:
    """Nothing in it is of a type that only YAML has, such as a date or a number in base 60."""
    assert json.loads(json.dumps(composed())) == composed()
