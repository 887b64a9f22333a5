"""The Serve application: ``build`` for ``serve run``, ``serve deploy``, a KubeRay RayService and ``cluster up``.

Serve starts, health-checks, replaces, scales and updates the replicas. No request passes through its handles, so its
HTTP proxies need not run.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ray
from ray import serve

from disagg_ray import keys, scaling, store
from disagg_ray.commands import Node
from disagg_ray.replica import Engine, ProxyServer
from disagg_ray.settings import HEAD, ROLES, Cluster, ClusterFileError, Role, parse, version

_HEALTH_PERIOD = 3.0
_HEALTH_TIMEOUT = 30.0
_SLACK = 30.0
"""Seconds that a replica may take to stop besides drain_timeout and stop_timeout."""

_HEAD_RESOURCE = "node:__internal_head__"
_PIN = 0.001
"""Amount of a node's own resource that ties a replica to it."""


def build(args: Mapping[str, Any]) -> Any:
    """The application of a cluster file.

    Args:
        args: the content of the file.

    Raises:
        ClusterFileError: a bad key or value.
    """
    raw = dict(args)
    cluster = parse(raw)
    store.save(cluster.name, raw)
    engines = [_engine_deployment(cluster, raw, role) for role in ROLES]
    first, *further = cluster.proxy.nodes
    others = [_proxy_deployment(cluster, node).bind(raw) for node in further]
    return _proxy_deployment(cluster, first).bind(raw, *engines, *others)


def _engine_deployment(cluster: Cluster, raw: Mapping[str, Any], name: str) -> Any:
    role = cluster.role(name)
    options: dict[str, Any] = {}
    resources: dict[str, Any] = {"num_cpus": 1, "resources": dict(role.resources)}
    if cluster.needs_gpus:
        resources["num_gpus"] = role.tensor_parallel
    options["ray_actor_options"] = resources
    options["graceful_shutdown_timeout_s"] = cluster.drain_timeout + cluster.stop_timeout + _SLACK
    if role.per_node:
        options["max_replicas_per_node"] = role.per_node
    if role.autoscale is None:
        options["num_replicas"] = role.count
    else:
        options["autoscaling_config"] = _autoscaling(role, name)
    return _deployment(cluster, EngineReplica, name, options).bind(name, dict(raw))


def _autoscaling(role: Role, name: str) -> dict[str, Any]:
    scale = role.autoscale
    assert scale is not None
    return {
        "min_replicas": scale.min,
        "initial_replicas": min(max(role.count, scale.min), scale.max),
        "max_replicas": scale.max,
        "upscale_delay_s": scale.up_s,
        "downscale_delay_s": scale.down_s,
        "metrics_interval_s": min(10.0, max(1.0, scale.up_s / 3)),
        "look_back_period_s": max(3.0, scale.up_s),
        "policy": {"policy_function": f"{__name__}:{name}_policy"},
    }


def proxy_name(node: str) -> str:
    """The deployment of the proxy on a node of the cluster file."""
    return "proxy" if node == HEAD else f"proxy-{node.replace(':', '-')}"


def _proxy_deployment(cluster: Cluster, node: str) -> Any:
    resource = _HEAD_RESOURCE if node == HEAD else f"node:{node}"
    options = {
        "num_replicas": 1,
        "graceful_shutdown_timeout_s": cluster.stop_timeout + _SLACK,
        "ray_actor_options": {"num_cpus": 0, "resources": {resource: _PIN}},
    }
    return _deployment(cluster, ProxyReplica, proxy_name(node), options)


def _deployment(cluster: Cluster, replica: type[Any], name: str, options: Mapping[str, Any]) -> Any:
    made = serve.deployment(
        replica,
        name=name,
        health_check_period_s=_HEALTH_PERIOD,
        health_check_timeout_s=_HEALTH_TIMEOUT,
        graceful_shutdown_wait_loop_s=0.5,
        **options,
    )
    # Without a version Serve replaces every replica at each deployment (ray 2.56 - 2.60, serve/_private/client.py).
    return made.options(version=version(cluster, name if name in ROLES else "proxy"), _internal=True)


# -- replicas


def this_node(cluster: Cluster) -> Node:
    """The node of the calling worker.

    Raises:
        ClusterFileError: the secret cannot be read here.
    """
    host = ray.util.get_node_ip_address()
    try:
        return Node(host, keys.secret(cluster), keys.secret_file(cluster), proxy_hosts(cluster))
    except ClusterFileError as error:
        raise ClusterFileError(f"node {host}: {error}") from None


def proxy_hosts(cluster: Cluster) -> tuple[str, ...]:
    """Addresses of the proxies' nodes."""
    return tuple(_head_address() if node == HEAD else node for node in cluster.proxy.nodes)


def _head_address() -> str:
    for node in ray.nodes():
        if node["Alive"] and _HEAD_RESOURCE in node["Resources"]:
            return str(node["NodeManagerAddress"])
    raise ClusterFileError("proxy.nodes: this Ray cluster has no head node")


class EngineReplica:
    """One engine. Serve calls ``check_health``, ``record_autoscaling_stats``, and ``__del__`` when it is to stop."""

    def __init__(self, role: str, raw: dict[str, Any]) -> None:
        cluster = parse(raw)
        self._part = Engine(cluster, this_node(cluster), role)
        self._part.start()

    def check_health(self) -> None:
        """Raises when the engine has ended or does not answer."""
        self._part.check()

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Figures for the policy of its role."""
        return self._part.figures()

    def __del__(self) -> None:
        if part := getattr(self, "_part", None):
            part.drain_and_stop()


class ProxyReplica:
    """One proxy. The first one names the other deployments, which makes them one application."""

    def __init__(self, raw: dict[str, Any], *_others: object) -> None:
        cluster = parse(raw)
        self._part = ProxyServer(cluster, this_node(cluster))
        self._part.start()

    def check_health(self) -> None:
        """Raises when the proxy has ended or does not answer."""
        self._part.check()

    def __del__(self) -> None:
        if part := getattr(self, "_part", None):
            part.stop()


# -- scaling policies, called by Serve's controller


def prefill_policy(context: Any) -> tuple[int, dict[str, Any]]:
    """How many prefills there should be."""
    count, pressure = context.target_num_replicas, _highest(context, "pressure")
    return count if pressure is None else scaling.wanted(count, pressure), {}


def decode_policy(context: Any) -> tuple[int, dict[str, Any]]:
    """How many decodes there should be."""
    count = context.target_num_replicas
    load, latency = _highest(context, "load"), _highest(context, "latency")
    if load is None or latency is None:
        return count, {}
    return scaling.wanted(count, scaling.decode_pressure(load, latency, count)), {}


def _highest(context: Any, name: str) -> float | None:
    """The highest value that a replica reported over the last look-back period; None without one."""
    values = (context.aggregated_metrics or {}).get(name) or {}
    return max(map(float, values.values()), default=None)
