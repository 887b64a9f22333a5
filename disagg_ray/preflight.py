"""Checks of every node before anything starts: one line for each problem, with the node and the setting.

:func:`look` runs on the node, :func:`problems` decides; neither knows Ray.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from disagg_machine import vllm_facts
from disagg_machine.messages import text
from disagg_proxy import __version__
from disagg_ray import claims, keys
from disagg_ray.settings import HEAD, ROLES, Cluster, ClusterFileError, Role


@dataclass(frozen=True)
class Host:
    """A node as Ray describes it.

    Attributes:
        node_id: Ray's id.
        address: in the cluster.
        head: whether it is the head node.
        resources: all of its resources, free or not.
    """

    node_id: str
    address: str
    head: bool
    resources: Mapping[str, float]


@dataclass(frozen=True)
class Report:
    """What a node says of itself.

    Attributes:
        version: of this project.
        error: what already went wrong there, as a whole line.
        engines: whether engines may run there; without, only the secret and the proxy's ports were looked at.
        fingerprint: of its secret.
        model: whether the model's folder is there; True for a name.
        vllm: version of vLLM; empty without one, and with simulated engines.
        vllm_problem: why this vLLM cannot serve.
        http, kv: free ports of the ranges.
        proxy_taken: ports of the proxy that something listens on.
    """

    version: str = __version__
    error: str = ""
    engines: bool = False
    fingerprint: str = ""
    model: bool = True
    vllm: str = ""
    vllm_problem: str = ""
    http: int = 0
    kv: int = 0
    proxy_taken: tuple[int, ...] = ()


def look(cluster: Cluster, address: str, engines: bool, proxy: bool, environ: Mapping[str, str] = os.environ) -> Report:
    """The report of this node.

    Args:
        engines, proxy: what may run on it.
    """
    try:
        fingerprint = keys.fingerprint(keys.secret(cluster, environ))
        claims.folder(cluster.run_dir)
    except (ClusterFileError, OSError) as error:
        return Report(error=str(error))
    taken: tuple[int, ...] = ()
    if proxy:
        ports = (cluster.proxy.port, cluster.proxy.registration_port)
        taken = tuple(port for port in ports if not claims.may_bind(address, port))
    if not engines:
        return Report(fingerprint=fingerprint, proxy_taken=taken)
    vllm = problem = ""
    if cluster.engine == "vllm":
        python = cluster.python or sys.executable
        facts = vllm_facts.of_python(python, vllm_facts.runs_in(environ))
        vllm = facts.version if facts else ""
        why = vllm_facts.problem(facts, "own", address) if facts else ()
        problem = text(*why) if why else ""
    return Report(
        engines=True,
        fingerprint=fingerprint,
        # Only a path can be missing; a name is downloaded.
        model=not cluster.model.startswith("/") or cluster.engine == "sim" or Path(cluster.model).is_dir(),
        vllm=vllm,
        vllm_problem=problem,
        http=_free(address, cluster.ports["http"]),
        kv=_free(address, cluster.ports["kv"]),
        proxy_taken=taken,
    )


def _free(address: str, ports: tuple[int, int]) -> int:
    """Free ports of a range, counted up to the number that one node can need."""
    found = 0
    for port in range(ports[0], ports[1] + 1):
        found += claims.may_bind(address, port)
        if found == 64:
            break
    return found


def hosts_of(cluster: Cluster, role: Role, hosts: Sequence[Host]) -> list[Host]:
    """The nodes on which engines of a role may run."""
    wanted = dict(role.resources)
    if cluster.needs_gpus:
        wanted["GPU"] = role.tensor_parallel
    return [host for host in hosts if all(host.resources.get(name, 0) >= amount for name, amount in wanted.items())]


def proxy_hosts_of(cluster: Cluster, hosts: Sequence[Host]) -> dict[str, Host | None]:
    """The node of each entry of ``proxy.nodes``; None where it is not there."""
    by_name = {name: host for host in hosts for name in (host.address, *([HEAD] if host.head else []))}
    return {name: by_name.get(name) for name in cluster.proxy.nodes}


def problems(
    cluster: Cluster, hosts: Sequence[Host], reports: Mapping[str, Report], running: bool = False
) -> list[str]:
    """Why this cluster cannot start, one line each; empty when it can.

    Args:
        reports: by node id.
        running: the application runs already and is updated, so its ports are its own.
    """
    found: list[str] = []
    placed = proxy_hosts_of(cluster, hosts)
    found += [f"proxy.nodes: {name} is no node of this Ray cluster" for name, host in placed.items() if host is None]
    for name in ROLES:
        found += _capacity(cluster, name, hosts)
    known = (reports.get(host.node_id) for host in placed.values() if host is not None)
    reference = next((report.fingerprint for report in known if report is not None), "")
    for host in hosts:
        if (report := reports.get(host.node_id)) is not None:
            found += [f"node {host.address}: {line}" for line in _of_node(cluster, report, reference, running)]
    if cluster.needs_gpus and not found:
        most = sum(_most(cluster.role(name)) * cluster.role(name).tensor_parallel for name in ROLES)
        there = sum(host.resources.get("GPU", 0) for host in hosts)
        if most > there:
            found.append(f"prefill.count, decode.count: need {most} GPUs, the cluster has {there:g}")
    return found


def _most(role: Role) -> int:
    return role.autoscale.min if role.autoscale else role.count


def _capacity(cluster: Cluster, name: str, hosts: Sequence[Host]) -> list[str]:
    role = cluster.role(name)
    able = hosts_of(cluster, role, hosts)
    if not able:
        needs = {**role.resources, **({"GPU": role.tensor_parallel} if cluster.needs_gpus else {})}
        key = "tensor_parallel" if cluster.needs_gpus and not role.resources else "resources"
        wanted = ", ".join(f"{resource}: {amount:g}" for resource, amount in needs.items())
        return [f"{name}.{key}: no node has {wanted}"]
    if role.per_node and _most(role) > role.per_node * len(able):
        return [f"{name}.per_node: {_most(role)} engines do not fit on {len(able)} nodes with {role.per_node} on each"]
    return []


def _of_node(cluster: Cluster, report: Report, reference: str, running: bool) -> list[str]:
    if report.error:
        return [report.error]
    found = []
    if report.version != __version__:
        found.append(f"has disagg-proxy {report.version}, this is {__version__}: install the same version on all nodes")
    if reference and report.fingerprint != reference:
        found.append("secret_file: its secret is not that of the proxies")
    if not report.model:
        found.append(f"model: {cluster.model} is not there")
    if report.vllm_problem:
        found.append(f"python: {report.vllm_problem}")
    if report.engines and cluster.engine == "vllm" and not report.vllm:
        found.append(f"python: {cluster.python or sys.executable} has no vLLM")
    for kind, count in (("http", report.http), ("kv", report.kv)):
        if report.engines and not count:
            first, last = cluster.ports[kind]
            found.append(f"ports.{kind}: no port of {first}-{last} is free")
    if report.proxy_taken and not running:
        ports = ", ".join(map(str, report.proxy_taken))
        found.append(f"proxy.port, proxy.registration_port: {ports} is taken")
    return found
