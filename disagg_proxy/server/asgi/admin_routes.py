"""The operator's routes: one instance out for maintenance, and back. How they are used: docs/admin.md.

They exist only with an ADMIN_KEY, which the guard asks for.
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

_LONGEST_WAIT = 3600.0
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
        instance, seconds = _named(services.registry), _wait()
        await services.drain(instance, True)
        if seconds:
            settled = changes.until(lambda: services.idle(instance) or not instance.draining)
            await first_of(settled, services.shutdown.begun.wait(), seconds=seconds)
        return json_response(instance_report(instance, services, await services.overview()))

    @blueprint.post("/admin/undrain")
    async def undrain() -> Response:
        instance = _named(services.registry)
        await services.drain(instance, False)
        return json_response(instance_report(instance, services, await services.overview()))

    return blueprint


def _named(registry: Registry) -> Instance:
    """The instance that the query names.

    Raises:
        BadRequest: none is named, or several.
        UnknownInstance: there is no such instance.
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


def _wait() -> float:
    """Seconds that the query asks to wait until the instance is idle.

    Raises:
        BadRequest: it is no number of seconds.
    """
    raw = request.args.get("wait", "0")
    try:
        seconds = float(raw)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds <= _LONGEST_WAIT:
        raise BadRequest(f"wait must be a number of seconds up to {_LONGEST_WAIT:.0f}, not {raw!r}.", param="wait")
    return seconds


class _Changes:
    """Waits for what comes about on instances."""

    def __init__(self, registry: Registry) -> None:
        self._waiting: set[asyncio.Event] = set()
        registry.watch(changed=lambda _: self._wake(), freed=self._wake)

    def _wake(self) -> None:
        for event in self._waiting:
            event.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Return when ``condition`` holds."""
        event = asyncio.Event()
        self._waiting.add(event)
        try:
            while not condition():
                event.clear()
                await event.wait()
        finally:
            self._waiting.discard(event)
