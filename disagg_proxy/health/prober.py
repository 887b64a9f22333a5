"""Whether an instance really serves: an HTTP 200 from its /health and its /v1/models.

Pings start about 2 s before vLLM's HTTP server answers, and go on when it is stuck, so a ping alone admits nobody.
One task per instance; it ends when the instance is forgotten, or lost and not serving: one that merely stopped to ping
is probed on, to tell a hung process from one that has ended.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Mapping
from typing import Any

from disagg_proxy.cluster.instance import Instance, State
from disagg_proxy.cluster.registry import Registry
from disagg_proxy.errors import EngineDeadline, EngineError, EngineUnreachable
from disagg_proxy.runtime.within import within
from disagg_proxy.upstream import CompleteResponse, Upstream

log = logging.getLogger(__name__)

_TOLERATED_TIMEOUTS = 3
"""A busy API server may answer late; one that says no, or refuses, is believed at once."""

_FIRST_RETRY, _LAST_RETRY = 0.1, 2.0
"""Seconds between probes of an instance that is not ready: doubled from the first to the last."""


class _NotServing(Exception):
    """Why an instance may not serve; ``tolerable`` when it may only be busy, ``gone`` when its process has ended."""

    def __init__(self, reason: str, tolerable: bool = False, gone: bool = False) -> None:
        super().__init__(reason)
        self.tolerable = tolerable
        self.gone = gone


class Prober:
    """Looks after every instance of a registry.

    Args:
        interval: seconds between two looks at a ready instance.
        headers: lines that are sent along, such as the engines' key.
    """

    def __init__(self, registry: Registry, upstream: Upstream, interval: float, headers: bytes) -> None:
        self._registry = registry
        self._upstream = upstream
        self._interval = interval
        self._headers = headers
        self._tasks: dict[Instance, asyncio.Task[None]] = {}
        self._wake: dict[Instance, asyncio.Event] = {}
        self._began: dict[Instance, float] = {}
        """When each probe in flight was sent."""

    def start(self) -> None:
        """Begin with what the registry knows, and follow it."""
        self._registry.watch(probe_wanted=self.look_now)
        for instance in self._registry.instances():
            self.look_now(instance)

    async def stop(self) -> None:
        """End all probes."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def look_now(self, instance: Instance) -> None:
        """Probe it at once instead of at its next turn.

        A probe in flight is enough, unless the state of the instance has changed since it was sent: it may then wait
        for a process that is gone, or on a connection that is lost.
        """
        running = self._tasks.get(instance)
        if running is not None:
            if instance not in self._began or instance.changed_at < self._began[instance]:
                self._wake[instance].set()
                return
            running.cancel()
            del self._began[instance]
        self._wake[instance] = asyncio.Event()
        task = asyncio.get_running_loop().create_task(self._follow(instance), name=f"probe {instance}")
        self._tasks[instance] = task
        task.add_done_callback(lambda ended: self._forget(instance, ended))

    def _forget(self, instance: Instance, ended: asyncio.Task[None]) -> None:
        if self._tasks.get(instance) is ended:
            del self._tasks[instance], self._wake[instance]
            self._began.pop(instance, None)

    async def _follow(self, instance: Instance) -> None:
        retry = _FIRST_RETRY
        wake = self._wake[instance]
        while self._registry.knows(instance) and (instance.state is not State.LOST or instance.last_answer is not None):
            wake.clear()
            self._began[instance] = self._registry.now()
            await self.look(instance)
            self._began.pop(instance, None)
            if instance.state is State.READY:
                retry = _FIRST_RETRY
                pause = self._interval
            else:
                pause = min(retry, self._interval)
                retry = min(retry * 2, _LAST_RETRY)
            try:
                async with within(pause):
                    await wake.wait()
            except asyncio.TimeoutError:
                continue

    async def look(self, instance: Instance) -> None:
        """Probe it once and tell the registry."""
        try:
            await self._get(instance, "/health")
            models = _models(await self._get(instance, "/v1/models"))
        except _NotServing as refusal:
            instance.probe_failures += 1
            if not refusal.tolerable and instance.last_answer is not None:
                instance.last_answer = self._registry.now()
            if not refusal.tolerable or instance.probe_failures >= _TOLERATED_TIMEOUTS:
                self._registry.suspend(instance, str(refusal), gone=refusal.gone)
        else:
            self._registry.admit(instance, models)

    async def _get(self, instance: Instance, path: str) -> CompleteResponse:
        try:
            answer = await self._upstream.request(
                "GET", instance, path, headers=self._headers, idle_timeout=self._interval, leg=instance.role.value
            )
            whole = await answer.read_all()
        except EngineUnreachable as error:
            if error.refused:
                raise _NotServing("its HTTP port refuses connections", gone=True) from None
            raise _NotServing("its HTTP port cannot be reached", tolerable=True) from None
        except EngineDeadline:
            raise _NotServing(f"its {path} does not answer in time", tolerable=True) from None
        except EngineError:
            raise _NotServing(f"its {path} closes the connection", tolerable=True) from None
        if whole.status in (401, 403):
            raise _NotServing(f"its {path} answers {whole.status}: set ENGINE_API_KEY to the instances' key")
        if whole.status != 200:
            raise _NotServing(f"its {path} answers {whole.status}")
        return whole


def _models(answer: CompleteResponse) -> dict[str, Mapping[str, Any]]:
    """The list in an OpenAI /v1/models answer, by name and in its order."""
    try:
        cards = json.loads(answer.body)["data"]
        found = {card["id"]: card for card in cards if isinstance(card["id"], str)}
    except (ValueError, KeyError, TypeError, RecursionError):
        raise _NotServing("its /v1/models is not an OpenAI model list") from None
    if not found:
        raise _NotServing("its /v1/models lists no model")
    return found
