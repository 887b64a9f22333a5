"""``status``: nodes, replicas and engines, as lines of text. Pure; the engines are as the proxies see them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from disagg_ray.preflight import Host
from disagg_ray.settings import ROLES


@dataclass(frozen=True)
class Deployment:
    """One Serve deployment: its status, its message, and its replicas by state."""

    name: str
    status: str
    message: str = ""
    replicas: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class View:
    """All that is shown.

    Attributes:
        app: status of the application, as Serve says it.
        running: role and node address of each running engine replica; None where Serve does not say.
        proxies: engines by proxy URL, None for a proxy that does not answer.
        problems: lines of :func:`disagg_ray.preflight.problems`.
    """

    name: str
    app: str
    hosts: Sequence[Host]
    deployments: Sequence[Deployment]
    running: Sequence[tuple[str, str]]
    proxies: Mapping[str, list[dict[str, Any]] | None]
    problems: Sequence[str] = ()


def healthy(view: View) -> bool:
    """Whether everything that should serve does."""
    return view.app == "RUNNING" and not view.problems and not unknown_on(view) and None not in view.proxies.values()


def lines(view: View) -> Iterator[str]:
    """The report."""
    yield f"{view.name}: {view.app.lower()}"
    yield "nodes"
    for host in sorted(view.hosts, key=lambda one: (not one.head, one.address)):
        shown = ", ".join(f"{name} {host.resources[name]:g}" for name in ("CPU", "GPU") if name in host.resources)
        engines = Counter(role for role, address in view.running if address == host.address)
        runs = ", ".join(f"{count} {role}" for role, count in sorted(engines.items()))
        yield f"  {host.address}{' (head)' if host.head else ''}  {shown}{f'  runs {runs}' if runs else ''}"
    yield "replicas"
    for one in view.deployments:
        states = ", ".join(f"{count} {state.lower()}" for state, count in sorted(one.replicas.items()) if count)
        yield f"  {one.name}  {one.status.lower()}  {states or 'none'}"
        if one.message and one.status != "HEALTHY":
            yield f"    {' '.join(one.message.split())[:400]}"
    for url, instances in view.proxies.items():
        yield f"proxy {url}" if instances is not None else f"proxy {url} does not answer"
        for engine in sorted(instances or (), key=lambda one: (one["role"] != "prefill", one["http_address"])):
            drained = "  draining" if engine["draining"] else ""
            load = f"{engine['in_flight']} in flight"
            yield f"  {engine['role']} {engine['http_address']}  {engine['state']}{drained}  {load}  {engine['reason']}"
    for line in (*view.problems, *(line for _, line in _missing(view))):
        yield f"problem: {line}"


def unknown_on(view: View) -> set[str]:
    """Addresses of nodes whose engines run, but are not known to a proxy."""
    return {address for address, _ in _missing(view)}


def _missing(view: View) -> Iterator[tuple[str, str]]:
    """Those nodes, each with a line that says how many."""
    running = Counter(view.running)
    for url, instances in view.proxies.items():
        if instances is None:
            continue
        seen = Counter(
            (engine["role"], engine["http_address"].rpartition(":")[0].strip("[]"))
            for engine in instances
            if engine["state"] != "lost"
        )
        for (role, address), count in sorted(running.items()):
            if role in ROLES and count > seen[role, address]:
                yield address, f"node {address}: {count} {role} run, {url} knows {seen[role, address]}"
