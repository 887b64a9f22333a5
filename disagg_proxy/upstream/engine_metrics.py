"""Reads the /metrics of an engine: one rule for all who judge an engine by its own counters."""

from __future__ import annotations

from disagg_proxy.cluster.instance import Instance
from disagg_proxy.errors import ProxyError
from disagg_proxy.upstream.client import Upstream

_IDLE_TIMEOUT = 2.0
"""Seconds without a byte after which the engine does not answer."""


async def read_metrics(upstream: Upstream, instance: Instance, headers: bytes, path: str = "/metrics") -> bytes | None:
    """The text of /metrics; empty when the engine refuses it, None when it does not answer.

    Args:
        headers: header lines with the engine's key, where it has one.
        path: with a query where some metrics are wanted only.
    """
    try:
        answer = await upstream.request(
            "GET", instance, path, headers=headers, idle_timeout=_IDLE_TIMEOUT, leg=instance.role.value
        )
        complete = await answer.read_all()
    except ProxyError:
        return None
    return complete.body if complete.status == 200 else b""
