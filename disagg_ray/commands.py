"""Command line and environment of every process of a cluster. Pure; those of engines are disagg_machine's.

Secrets are in files or in the environment, never in a command line.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from disagg_kv.secret import SECRET_FILE_VARIABLE
from disagg_machine import commands as machine
from disagg_machine import settings as machine_settings
from disagg_machine.commands import Command
from disagg_machine.layout import Place
from disagg_machine.vllm_facts import VllmFacts
from disagg_proxy.config.table import SETTINGS
from disagg_ray import keys
from disagg_ray.settings import Cluster

DIVIDED = ("MAX_IN_FLIGHT", "PREFILL_MAX_IN_FLIGHT", "DECODE_MAX_IN_FLIGHT", "KV_BUFFER_BYTES")
"""Limits of the proxy that hold for an engine or for all of them, so several proxies share them (docs/workers.md)."""


@dataclass(frozen=True)
class Node:
    """What a replica knows of the node that it runs on.

    Attributes:
        host: the node's address in the cluster; engines listen on it and announce it.
        secret, secret_file: the shared secret and where it is.
        proxies: hosts of all proxies.
    """

    host: str
    secret: str
    secret_file: str
    proxies: tuple[str, ...]


def authority(host: str, port: int) -> str:
    """``HOST:PORT``, with brackets around an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def proxy_addresses(cluster: Cluster, hosts: Iterable[str]) -> tuple[str, ...]:
    """Where the proxies on these nodes answer, each ``HOST:PORT``."""
    chosen = cluster.proxy.host
    wildcard = chosen in ("", "0.0.0.0", "::")
    return tuple(authority(host if wildcard else chosen, cluster.proxy.port) for host in hosts)


# -- the proxy


def proxy(cluster: Cluster, node: Node, python: str) -> Command:
    """One proxy."""
    settings = cluster.proxy
    variables = {
        "DECODE_MAX_IN_FLIGHT": cluster.settings.get("MAX_NUM_SEQS", "256"),
        "SHUTDOWN_GRACE": str(max(1.0, cluster.stop_timeout - 3)),
        **settings.settings,
        "HTTP_PROXY_HOST": settings.host or node.host,
        "HTTP_PROXY_PORT": str(settings.port),
        "PROXY_HOST": node.host,
        "PROXY_PORT": str(settings.registration_port),
        "ALLOW_REGISTER": "proven",
        SECRET_FILE_VARIABLE: node.secret_file,
        "ADMIN_KEY": keys.derived(node.secret, keys.ADMIN),
        "ENGINE_API_KEY": keys.derived(node.secret, keys.ENGINE),
        "PYTHONUNBUFFERED": "1",
    }
    if settings.settings.get("API_KEYS_FILE"):
        # Clients have keys, so /stats needs one too.
        variables["API_KEY"] = keys.derived(node.secret, keys.MONITORING)
    variables |= divided(variables, len(node.proxies))
    return Command((python, "-m", "disagg_proxy"), variables)


def divided(variables: Mapping[str, str], proxies: int) -> dict[str, str]:
    """One proxy's part of each limit; 0 stays "no limit", and every proxy may use at least one slot."""
    found: dict[str, str] = {}
    for setting in SETTINGS:
        if setting.env in DIVIDED and (limit := setting.read(variables.get(setting.env, "0"))):
            found[setting.env] = str(max(1, int(str(limit)) // proxies))
    return found


# -- engines


def engine(
    cluster: Cluster,
    node: Node,
    role: str,
    http: int,
    kv: int,
    *,
    python: str,
    environ: Mapping[str, str],
    vllm: VllmFacts | None,
) -> Command:
    """One prefill or decode engine.

    Args:
        http, kv: its ports; of KV the first of as many as it has GPUs.
        python: the Python that has this project.
        environ: of the replica; CUDA_VISIBLE_DEVICES in it are the GPUs that Ray has given to it.
        vllm: None for a simulated engine.
    """
    gpus = tuple(filter(None, environ.get("CUDA_VISIBLE_DEVICES", "").split(","))) if vllm is not None else ()
    place = Place(role, role, http, kv, gpus)
    settings = _settings(cluster, node, role)
    variables = {
        SECRET_FILE_VARIABLE: node.secret_file,
        "VLLM_API_KEY": keys.derived(node.secret, keys.ENGINE),
    }
    if vllm is None:
        command = machine.simulated(settings, place, python)
        variables["PYTHONUNBUFFERED"] = "1"
    else:
        extra: dict[str, object] = {
            "host_ip": node.host,
            "listen": node.host,
            "proxies": list(registration(cluster, node)),
            "peers": list(cluster.network.peers),
        }
        command = machine.own_connector(settings, vllm, place, "", environ, extra=extra)
    mine = {name: value for name, value in command.environment.items() if name != "PYTHONPATH"}
    return replace(command, environment={**mine, **cluster.environment, **cluster.network.nccl, **variables})


def registration(cluster: Cluster, node: Node) -> tuple[str, ...]:
    """Registration ports of all proxies."""
    return tuple(authority(host, cluster.proxy.registration_port) for host in node.proxies)


def _settings(cluster: Cluster, node: Node, role: str) -> machine_settings.Settings:
    """The script's settings for one engine."""
    words = list(cluster.role(role).args)
    if cluster.role(role).tensor_parallel > 1:
        # Never Ray's executor: the engine's workers are in the process group that ends with the replica.
        words = ["--distributed-executor-backend", "mp", *words]
    args = shlex.join(words)
    given = {
        **cluster.settings,
        "MODEL": cluster.model,
        "ENGINE": cluster.engine,
        "KV_CONNECTOR": "own",
        "ENGINE_HOST": node.host,
        "RUN_DIR": f"{cluster.run_dir}/machine",
        f"EXTRA_{role.upper()}_ARGS": args,
    }
    if cluster.engine == "sim":
        proxies = ",".join(registration(cluster, node))
        given["EXTRA_SIM_ARGS"] = f"--connector disagg_kv --proxy {proxies} {args}".rstrip()
    return machine_settings.load(given, Path("/"), Path("/"))


def environment(command: Command, environ: Mapping[str, str], hosts: Sequence[str], root: str) -> dict[str, str]:
    """All of a process's environment: that of the replica without Ray's, and without an internet proxy for ``hosts``.

    Args:
        root: folder that is added to PYTHONPATH; empty where nothing is.
    """
    kept = {name: value for name, value in environ.items() if not name.startswith(("RAY_", "SERVE_"))}
    before = kept.get("no_proxy") or kept.get("NO_PROXY") or ""
    direct = ",".join(dict.fromkeys(filter(None, [*before.split(","), "127.0.0.1", "localhost", "::1", *hosts])))
    path = ":".join(dict.fromkeys(filter(None, [root, *kept.get("PYTHONPATH", "").split(":")])))
    return {**kept, "PYTHONPATH": path, "no_proxy": direct, "NO_PROXY": direct, **command.environment}
