"""The operator's routes: drain an instance for maintenance, and put it back. Usage: docs/admin.md.

They exist only if ADMIN_KEY is set, and require it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from quart import Blueprint, Response, request

from disagg_proxy.address import parse_address
from disagg_proxy.cluster.instance import Instance
from disagg_proxy.cluster.registry import Registry
from disagg_proxy.errors import BadRequest, UnknownInstance
from disagg_proxy.runtime.shutdown import first_of
from disagg_proxy.server.asgi.error_responses import json_response
from disagg_proxy.services import Services
from disagg_proxy.telemetry.stats_report import instance_report, instance_reports

_MAX_WAIT = 3600.0
"""Seconds."""


def admin_routes(services: Services) -> Blueprint:
    """Drain, undrain, and the state of all instances."""
    blueprint = Blueprint("admin", __name__)
    changes = _Changes(services.registry)

    @blueprint.get("/admin/instances")
    async def instances() -> Response:
        overview = await services.overview()
        return json_response({"instances": instance_reports(services, overview)})

    @blueprint.post("/admin/drain")
    async def drain() -> Response:
        instance, seconds = _requested_instance(services.registry), _requested_wait()
        await services.drain(instance, True)
        if seconds:
            settled = changes.until(lambda: services.idle(instance) or not instance.draining)
            await first_of(settled, services.shutdown.begun.wait(), seconds=seconds)
        return json_response(instance_report(instance, services, await services.overview()))

    @blueprint.post("/admin/undrain")
    async def undrain() -> Response:
        instance = _requested_instance(services.registry)
        await services.drain(instance, False)
        return json_response(instance_report(instance, services, await services.overview()))

    return blueprint


def _requested_instance(registry: Registry) -> Instance:
    """The instance in the query string.

    Raises:
        BadRequest: no instance, or more than one.
        UnknownInstance: no instance has this address.
    """
    given = request.args.getlist("instance")
    if len(given) != 1 or not given[0]:
        raise BadRequest("Name one instance, as /stats shows its http_address: ?instance=HOST:PORT.", param="instance")
    known = registry.instances()
    try:
        key = parse_address(given[0]).netloc
    except ValueError:
        key = ""
    for instance in known:
        if instance.key == key:
            return instance
    raise UnknownInstance(given[0], [i.http.text for i in known])


def _requested_wait() -> float:
    """Seconds to wait until the instance is idle, from the query string.

    Raises:
        BadRequest: not a number, or out of range.
    """
    raw = request.args.get("wait", "0")
    try:
        seconds = float(raw)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds <= _MAX_WAIT:
        raise BadRequest(f"wait must be a number of seconds up to {_MAX_WAIT:.0f}, not {raw!r}.", param="wait")
    return seconds


class _Changes:
    """Waits until a condition on instances holds."""

    def __init__(self, registry: Registry) -> None:
        self._waiting: set[asyncio.Event] = set()
        registry.watch(changed=lambda _: self._notify(), freed=self._notify)

    def _notify(self) -> None:
        for event in self._waiting:
            event.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until ``condition`` holds; it is checked after each change of an instance."""
        event = asyncio.Event()
        self._waiting.add(event)
        try:
            while not condition():
                event.clear()
                await event.wait()
        finally:
            self._waiting.discard(event)
