"""The operator's routes: drain an instance for maintenance and put it back, and set its role. Usage: docs/admin.md.

They exist only if ADMIN_KEY is set, and require it.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from quart import Blueprint, Response, request

from disagg_proxy.address import parse_address
from disagg_proxy.cluster.instance import Instance, Role
from disagg_proxy.cluster.registry import Registry
from disagg_proxy.errors import BadRequest, UnknownInstance
from disagg_proxy.runtime.shutdown import first_of
from disagg_proxy.server.asgi.error_responses import json_response
from disagg_proxy.server.asgi.request import read_body
from disagg_proxy.services import Services
from disagg_proxy.telemetry.stats_report import instance_report, instance_reports

_MAX_WAIT = 3600.0
"""Seconds."""

_AUTO = "auto"
_ROLE_NAMES = (*(role.value for role in Role), _AUTO)


def admin_routes(services: Services) -> Blueprint:
    """Drain, undrain, roles, and the state of all instances."""
    blueprint = Blueprint("admin", __name__)
    changes = _Changes(services.registry)

    @blueprint.get("/admin/instances")
    async def instances() -> Response:
        overview = await services.overview()
        return json_response({"instances": instance_reports(services, overview)})

    @blueprint.post("/admin/drain")
    async def drain() -> Response:
        instance = _requested_instance(services.registry, request.args.getlist("instance"))
        seconds = _requested_wait()
        await services.drain(instance, True)
        if seconds:
            settled = changes.until(lambda: services.idle(instance) or not instance.draining)
            await first_of(settled, services.shutdown.begun.wait(), seconds=seconds)
        return json_response(instance_report(instance, services, await services.overview()))

    @blueprint.post("/admin/undrain")
    async def undrain() -> Response:
        instance = _requested_instance(services.registry, request.args.getlist("instance"))
        await services.drain(instance, False)
        return json_response(instance_report(instance, services, await services.overview()))

    @blueprint.post("/admin/role")
    async def role() -> Response:
        body = await _body()
        instance = _requested_instance(services.registry, _given("instance", body))
        await services.set_role(instance, _requested_role(instance, _given("role", body)))
        return json_response(instance_report(instance, services, await services.overview()))

    return blueprint


async def _body() -> Mapping[str, Any]:
    """The JSON object in the body; empty without a body.

    Raises:
        BadRequest: it is something else.
    """
    raw = await read_body()
    try:
        body = json.loads(raw) if raw else {}
    except (ValueError, RecursionError):
        body = None
    if not isinstance(body, dict):
        raise BadRequest('The body must be a JSON object such as {"instance": "HOST:PORT", "role": "prefill"}.')
    return body


def _given(name: str, body: Mapping[str, Any]) -> list[str]:
    """Every value of a parameter, in the query string and in the body."""
    return [*request.args.getlist(name), *([str(body[name])] if name in body else [])]


def _requested_role(instance: Instance, given: Sequence[str]) -> Role | None:
    """The role to be assigned; None for auto.

    Raises:
        BadRequest: none of the known ones, or one that the instance does not serve.
    """
    if len(given) != 1 or given[0] not in _ROLE_NAMES:
        raise BadRequest(f"role must be one of {', '.join(_ROLE_NAMES)}.", param="role")
    if not instance.kind.both_roles:
        raise BadRequest(
            f"{instance} has one role: only an engine with kv_role kv_both can be assigned another.", param="instance"
        )
    return None if given[0] == _AUTO else Role(given[0])


def _requested_instance(registry: Registry, given: Sequence[str]) -> Instance:
    """The instance with the only address in ``given``.

    Raises:
        BadRequest: no instance, or more than one.
        UnknownInstance: no instance has this address.
    """
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
