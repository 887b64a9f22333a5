"""The body of ``GET /health``: the one definition of "can serve", which /stats, /metrics and the page share."""

from __future__ import annotations

from typing import Any

from disagg_proxy.cluster.instance import Role
from disagg_proxy.cluster.unavailable import missing_roles, why_no_pair
from disagg_proxy.telemetry.proxy_state import ProxyState


def health_report(proxy: ProxyState) -> dict[str, Any]:
    """Whether requests can be served now, and what is missing otherwise. Without addresses, because it is public."""
    registry = proxy.registry
    pairs = proxy.selection.ready_pairs()
    alone = proxy.selection.ready_alone() if proxy.config.decode_alone else 0
    # Decodes serve alone only where there is no pair, not even a busy one.
    serves = pairs or (alone and not proxy.selection.ready_pairs(busy=True))
    missing = missing_roles(registry)
    if not pairs and not missing:
        missing = [why_no_pair(registry)]
    stalled = proxy.not_serving() if serves else ""
    if stalled:
        missing = [stalled, *missing]
    shutdown = proxy.shutdown.begun.is_set()
    if shutdown:
        missing = ["the proxy is shutting down", *missing]
    known = registry.instances()
    return {
        "status": "stopping" if shutdown else "not_serving" if stalled else "ok" if serves else "unavailable",
        "pairs": pairs,
        "decodes_that_serve_alone": alone,
        **{
            role.value: {"ready": len(registry.able(role)), "known": sum(i.serves(role) for i in known)}
            for role in Role
        },
        "missing": missing,
    }
