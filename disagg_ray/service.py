"""A running Ray cluster as the commands use it: its nodes, the Serve application on it, its proxies."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.context import _get_global_client
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from disagg_ray import app, keys, preflight, store
from disagg_ray.app import proxy_hosts
from disagg_ray.commands import proxy_addresses
from disagg_ray.preflight import Host, Report
from disagg_ray.proxies import Proxies
from disagg_ray.settings import ROLES, Cluster, parse
from disagg_ray.status import Deployment, View, unknown_on

_POLL = 0.5
_LOOK_TIMEOUT = 180.0
"""Seconds for the checks of one node: its vLLM is imported."""


class NoCluster(Exception):
    """No Ray cluster answers; the text says how to start one."""


class NotRunning(Exception):
    """No such application runs."""


def connect(address: str) -> None:
    """Join a running Ray cluster.

    Raises:
        NoCluster: there is none.
    """
    try:
        ray.init(address=address, namespace="disagg_ray", log_to_driver=False, logging_level="error")
    except (ConnectionError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise NoCluster(f"no Ray cluster at {address!r}: {reason} (start one with `ray start --head`)") from None


def hosts() -> list[Host]:
    """The nodes that are alive."""
    return [
        Host(
            node["NodeID"], node["NodeManagerAddress"], "node:__internal_head__" in node["Resources"], node["Resources"]
        )
        for node in ray.nodes()
        if node["Alive"]
    ]


def reports(cluster: Cluster, raw: Mapping[str, Any], nodes: Sequence[Host]) -> dict[str, Report]:
    """What each node says of itself, by node id. Nodes on which nothing may run are left out."""
    engines = {host.node_id for name in ROLES for host in preflight.hosts_of(cluster, cluster.role(name), nodes)}
    proxies = {host.node_id for host in preflight.proxy_hosts_of(cluster, nodes).values() if host is not None}
    look = ray.remote(num_cpus=0, max_retries=0)(_look)
    sent = {
        host.node_id: look.options(scheduling_strategy=NodeAffinitySchedulingStrategy(host.node_id, soft=False)).remote(
            dict(raw), host.address, host.node_id in engines, host.node_id in proxies
        )
        for host in nodes
        if host.node_id in engines | proxies
    }
    found: dict[str, Report] = {}
    for node_id, answer in sent.items():
        try:
            found[node_id] = ray.get(answer, timeout=_LOOK_TIMEOUT)
        except (RayError, TimeoutError) as error:
            reason = str(error).strip().splitlines()[-1:] or [type(error).__name__]
            found[node_id] = Report(error=f"cannot be checked: {reason[0][:300]}")
    return found


def _look(raw: dict[str, Any], address: str, engines: bool, proxy: bool) -> Report:
    return preflight.look(parse(raw), address, engines, proxy)


def names() -> list[str]:
    """Applications of this package that run here."""
    running = serve.status().applications if _running_serve() else {}
    return sorted(name for name in store.load_all() if name in running)


def _running_serve() -> bool:
    return _get_global_client(raise_if_no_controller_running=False) is not None


def raw_of(name: str = "") -> dict[str, Any]:
    """The cluster file of a running application.

    Args:
        name: empty where only one runs.

    Raises:
        NotRunning: it does not, or the name is needed.
    """
    running = names()
    if name and name not in running:
        raise NotRunning(f"{name!r} does not run here ({', '.join(running) or 'nothing does'})")
    if not running:
        raise NotRunning("nothing runs here: start it with `disagg-proxy cluster up FILE`")
    if not name and len(running) > 1:
        raise NotRunning(f"several run here, choose one with --name: {', '.join(running)}")
    return store.load_all()[name or running[0]]


def deploy(raw: Mapping[str, Any]) -> None:
    """Start an application, or change the one of that name: in place, or replica by replica. Does not wait."""
    serve.start(proxy_location="Disabled")
    target = serve.RunTarget(target=app.build(raw), name=str(raw["name"]), route_prefix=None)
    serve.run_many([target], wait_for_applications_running=False)


def delete(name: str) -> None:
    """Stop an application; returns when its replicas have. Serve itself ends with the last application."""
    # Serve's own wait ends after 60 s, a drain may take longer.
    serve.delete(name, _blocking=False)
    while name in serve.status().applications:
        time.sleep(_POLL)
    store.remove(name)
    if not serve.status().applications:
        serve.shutdown()


def proxies(cluster: Cluster) -> Proxies:
    """The application's proxies.

    Raises:
        ClusterFileError: the secret cannot be read on this node.
    """
    return Proxies.of(proxy_addresses(cluster, proxy_hosts(cluster)), keys.secret(cluster, os.environ))


def deployments(name: str) -> tuple[str, str, list[Deployment]]:
    """Status and message of the application, and its deployments."""
    there = serve.status().applications.get(name)
    if there is None:
        return "NOT_STARTED", "", []
    found = [
        Deployment(
            one,
            str(it.status.value),
            it.message or "",
            {str(state): count for state, count in it.replica_states.items()},
        )
        for one, it in there.deployments.items()
    ]
    return str(there.status.value), there.message or "", found


def view(name: str, raw: Mapping[str, Any]) -> View:
    """Everything that `status` shows."""
    cluster = parse(raw)
    nodes = hosts()
    app_status, _, found = deployments(name)
    seen = View(name, app_status, nodes, found, _replicas(name), proxies(cluster).instances())
    # Where all engines are known to the proxies, their secret is the right one: no node need be looked at.
    wanted = {*unknown_on(seen), *proxy_hosts(cluster)} if unknown_on(seen) else set()
    looked = reports(cluster, raw, [host for host in nodes if host.address in wanted])
    return replace(seen, problems=preflight.problems(cluster, nodes, looked, running=True))


def _replicas(name: str) -> list[tuple[str, str]]:
    """Role and node address of each running replica of an engine."""
    client = _get_global_client(raise_if_no_controller_running=False)
    details = client.get_serve_details() if client is not None else {}
    found = details.get("applications", {}).get(name, {}).get("deployments", {})
    return [
        (role, replica["node_ip"])
        for role in ROLES
        for replica in found.get(role, {}).get("replicas", ())
        if replica["state"] == "RUNNING"
    ]
