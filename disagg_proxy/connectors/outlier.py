"""Passive outlier detection: what the end of a leg says of its instance, whether it failed and must be probed."""

from __future__ import annotations

from disagg_proxy.cluster.instance import Instance
from disagg_proxy.cluster.lease import Lease
from disagg_proxy.cluster.registry import Registry
from disagg_proxy.errors import EngineError, EngineUnreachable, ProxyError
from disagg_proxy.openai.fields import MESSAGES, Route


def is_failure(route: Route, status: int) -> bool:
    """Whether an instance that answers ``status`` failed, so that another one may do better."""
    # vLLM 0.17 and newer answer /v1/messages with 500 also to a client's mistake.
    return status >= 500 and not (route is MESSAGES and status == 500)


def end_lease(registry: Registry, lease: Lease, route: Route, status: int) -> None:
    """Give back a place after an answer with ``status``.

    Every version of vLLM answers some malformed requests with 500, and a client could have a healthy instance left
    alone that way. So a 500 has the instance looked at, which finds a dead engine, but trips no breaker.
    """
    lease.end(failed=is_failure(route, status), certain=status != 500)
    if status == 500:
        registry.look_again(lease.instance)


def blame(registry: Registry, instance: Instance, error: ProxyError) -> None:
    """A refused connection takes the instance out at once; one that only timed out may come from a busy server."""
    if isinstance(error, EngineUnreachable) and error.refused:
        registry.lost_contact(instance, "its HTTP port cannot be reached")
    elif isinstance(error, EngineError):
        registry.look_again(instance)
