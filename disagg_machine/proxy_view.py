"""What the proxy says of this machine's engines (its /stats and /health)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from disagg_machine import net
from disagg_machine.messages import text
from disagg_machine.settings import Settings
from disagg_machine.ui import plain_line


@dataclass(frozen=True, slots=True)
class Engine:
    """One engine as the proxy sees it: requests so far and in flight, state, and whether it must be restarted."""

    requests: int
    in_flight: int
    state: str
    reason: str
    restart_wanted: bool

    @property
    def words(self) -> str:
        """Its state for people."""
        return plain_line(text("status_flying", self.state, self.in_flight, self.reason))


@dataclass(frozen=True, slots=True)
class ProxyView:
    """This machine's engines by HTTP port; empty when the proxy cannot be asked.

    Attributes:
        answered: whether the proxy answered.
        compiled: whether its hot path is native code; None from an older one, which does not say.
        refused: whether it answered 401: it has an API_KEY, which the settings do not have or have wrong.
    """

    engines: Mapping[int, Engine] = field(default_factory=dict)
    answered: bool = False
    refused: bool = False
    compiled: bool | None = None

    def requests(self, port: int) -> int | None:
        """Requests that went to the engine on ``port`` so far; None when the proxy does not know it."""
        engine = self.engines.get(port)
        return None if engine is None else engine.requests

    def frozen(self, port: int) -> str:
        """Why the engine is frozen; empty when it is not."""
        engine = self.engines.get(port)
        return engine.reason if engine is not None and engine.state == "frozen" else ""

    def wanted(self, port: int) -> str:
        """Why the proxy wants the engine restarted; empty when it does not."""
        engine = self.engines.get(port)
        return engine.reason if engine is not None and engine.restart_wanted else ""


def get(settings: Settings, path: str) -> net.Answer | None:
    """The proxy's answer to a GET; None when there is none."""
    return net.http_get(net.reach(settings.http_proxy_host), settings.http_proxy_port, path, settings.api_key)


def ask(settings: Settings) -> ProxyView:
    """What the proxy knows now."""
    answer = get(settings, "/stats")
    if answer is None or not answer.ok:
        return ProxyView(refused=answer is not None and answer.status == 401)
    return read(answer.body, settings.engine_host)


def key_problem(settings: Settings) -> str:
    """The message for a proxy that refuses the key: none is given, or a wrong one."""
    return "key_wrong" if settings.api_key else "key_missing"


def read(body: str, engine_host: str) -> ProxyView:
    """The engines of one answer of /stats. Engines of other machines may have the same ports: they are left out."""
    found: dict[int, Engine] = {}
    compiled = None
    try:
        stats = json.loads(body)
        compiled = stats.get("compiled")
        for instance in stats["instances"]:
            host, _, port = str(instance["http_address"]).rpartition(":")
            if host.strip("[]") in hosts(engine_host):
                found[int(port)] = Engine(
                    int(instance["requests_total"]),
                    int(instance["in_flight"]),
                    str(instance["state"]),
                    plain_line(" ".join(str(instance.get("reason") or "-").split())),
                    instance.get("restart_wanted") is True,
                )
    except (ValueError, KeyError, TypeError, AttributeError):
        return ProxyView(found, answered=True)
    return ProxyView(found, answered=True, compiled=compiled)


def hosts(engine_host: str) -> set[str]:
    """Names under which the proxy may know an engine of this machine."""
    return {engine_host, net.reach(engine_host), announced_host(engine_host)}


def announced_host(engine_host: str) -> str:
    """The address under which this project's connector announces an engine; it resolves no names."""
    host = net.reach(engine_host)
    return "127.0.0.1" if host == "localhost" else host


@dataclass(frozen=True, slots=True)
class Health:
    """The proxy's /health.

    Attributes:
        status: HTTP status.
        pairs: pairs that can serve.
        ready: ready engines by role.
        missing: what keeps every pair from serving, empty when requests can be served.
    """

    status: int
    pairs: int
    ready: Mapping[str, int]
    missing: str


def health(settings: Settings) -> tuple[net.Answer | None, Health | None]:
    """The answer to /health, and what it says; None for either that is not there."""
    answer = get(settings, "/health")
    return answer, None if answer is None else read_health(answer)


def read_health(answer: net.Answer) -> Health | None:
    """What an answer of /health says; None when it is not the proxy's."""
    try:
        value: dict[str, Any] = json.loads(answer.body)
        ready = {role: int(value.get(role, {}).get("ready", 0)) for role in ("prefill", "decode")}
        missing = "" if answer.ok else plain_line("; ".join(map(str, value.get("missing", []))))
        return Health(answer.status, int(value["pairs"]), ready, missing)
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
