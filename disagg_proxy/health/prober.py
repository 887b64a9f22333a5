"""Readiness probes: an instance may serve when its /health and its /v1/models answer 200. /version is read too.

Pings start about 2 s before vLLM's HTTP server answers, and continue when it hangs, so a ping alone admits no instance.
One task per instance; it ends when the instance is removed, or is LOST and its process has ended. An instance that only
stopped to ping is probed further, to distinguish a hung process from one that has ended.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Mapping
from typing import Any

from disagg_proxy.cluster.instance import Instance, State
from disagg_proxy.cluster.registry import Registry
from disagg_proxy.errors import EngineDeadline, EngineError, EngineUnreachable
from disagg_proxy.runtime.within import within
from disagg_proxy.upstream import CompleteResponse, Upstream

log = logging.getLogger(__name__)

_MAX_TIMEOUTS = 3
"""Probes without a response until an instance is suspended: a busy API server may answer late. A wrong status or a
refused connection suspends it at once."""

_FIRST_RETRY, _LAST_RETRY = 0.1, 2.0
"""Seconds between probes of an instance that is not ready, doubled after each from the first to the last."""


_REFRESH_SECONDS = 1.0
"""Seconds for which :meth:`Prober.refresh_models` lasts at most, and between the beginnings of two."""


class _NotServing(Exception):
    """Why a probe failed; ``tolerable`` when the instance may only be busy, ``gone`` when it refuses connections."""

    def __init__(self, reason: str, tolerable: bool = False, gone: bool = False) -> None:
        super().__init__(reason)
        self.tolerable = tolerable
        self.gone = gone


class Prober:
    """Probes every instance of a registry.

    Args:
        interval: seconds between two probes of a ready instance.
        headers: encoded header lines for each probe, such as the engines' key.
    """

    def __init__(self, registry: Registry, upstream: Upstream, interval: float, headers: bytes) -> None:
        self._registry = registry
        self._upstream = upstream
        self._interval = interval
        self._headers = headers
        self._tasks: dict[Instance, asyncio.Task[None]] = {}
        self._wake: dict[Instance, asyncio.Event] = {}
        self._sent_at: dict[Instance, float] = {}
        """Clock reading of the sending of each probe in flight."""
        self._refresh: asyncio.Task[None] | None = None
        self._refreshed_at = 0.0

    def start(self) -> None:
        """Probe the instances of the registry from now on."""
        self._registry.watch(probe_wanted=self.probe_now)
        self._registry.refresh_models = self.refresh_models
        for instance in self._registry.instances():
            self.probe_now(instance)

    async def stop(self) -> None:
        """End all probes."""
        tasks = list(self._tasks.values())
        if self._refresh is not None:
            tasks.append(self._refresh)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def set_interval(self, seconds: float) -> None:
        """Probe at this interval, beginning now."""
        if seconds != self._interval:
            self._interval = seconds
            for wake in self._wake.values():
                wake.set()

    def probe_now(self, instance: Instance) -> None:
        """Probe an instance now, without waiting for the interval.

        A probe in flight suffices, unless the state of the instance has changed since it was sent: it may then wait
        for a process that has ended.
        """
        running = self._tasks.get(instance)
        if running is not None:
            if instance not in self._sent_at or instance.changed_at < self._sent_at[instance]:
                self._wake[instance].set()
                return
            running.cancel()
            del self._sent_at[instance]
        self._wake[instance] = asyncio.Event()
        task = asyncio.get_running_loop().create_task(self._probe_repeatedly(instance), name=f"probe {instance}")
        self._tasks[instance] = task
        task.add_done_callback(lambda ended: self._on_task_done(instance, ended))

    def _on_task_done(self, instance: Instance, ended: asyncio.Task[None]) -> None:
        if self._tasks.get(instance) is ended:
            del self._tasks[instance], self._wake[instance]
            self._sent_at.pop(instance, None)

    async def _probe_repeatedly(self, instance: Instance) -> None:
        retry = _FIRST_RETRY
        wake = self._wake[instance]
        while self._registry.knows(instance) and (
            instance.state is not State.LOST or instance.last_probe_response is not None
        ):
            wake.clear()
            self._sent_at[instance] = self._registry.now()
            await self.probe(instance)
            self._sent_at.pop(instance, None)
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

    def refresh_models(self) -> Awaitable[None]:
        """Probe all ready instances now; the result is complete when they have answered, or after one second.

        Concurrent callers share one refresh, and within a second of its beginning there is no other: clients choose
        the names of models that do not exist.
        """
        now, refresh = self._registry.now(), self._refresh
        if refresh is None or (refresh.done() and now - self._refreshed_at >= _REFRESH_SECONDS):
            self._refreshed_at = now
            refresh = self._refresh = asyncio.get_running_loop().create_task(self._probe_ready(), name="models")
        return asyncio.shield(refresh)

    async def _probe_ready(self) -> None:
        ready = [i for i in self._registry.instances() if i.state is State.READY]
        try:
            async with within(_REFRESH_SECONDS):
                await asyncio.gather(*map(self.probe, ready))
        except asyncio.TimeoutError:
            return

    async def probe(self, instance: Instance) -> None:
        """Probe an instance once and report the result to the registry."""
        try:
            await self._get(instance, "/health")
            models = _models(await self._get(instance, "/v1/models"))
            if instance.kind.computes and (instance.state is not State.READY or instance.version is None):
                instance.version = await self._version(instance)
        except _NotServing as refusal:
            instance.probe_failures += 1
            if not refusal.tolerable and instance.last_probe_response is not None:
                instance.last_probe_response = self._registry.now()
            # A process that was found hung keeps the reason for its restart.
            timed_out = instance.probe_failures >= _MAX_TIMEOUTS and not instance.restart_wanted
            if not refusal.tolerable or timed_out:
                self._registry.suspend(instance, str(refusal), gone=refusal.gone)
        else:
            self._registry.admit(instance, models)

    async def _version(self, instance: Instance) -> str | None:
        """What its /version says; empty where it says nothing of the kind, None where it does not answer now."""
        try:
            return _version(await self._get(instance, "/version"))
        except _NotServing as refusal:
            return None if refusal.tolerable else ""

    async def _get(self, instance: Instance, path: str) -> CompleteResponse:
        try:
            answer = await self._upstream.request(
                "GET", instance, path, headers=self._headers, idle_timeout=self._interval, leg=instance.role.value
            )
            complete = await answer.read_all()
        except EngineUnreachable as error:
            if error.refused:
                raise _NotServing("its HTTP port refuses connections", gone=True) from None
            raise _NotServing("its HTTP port cannot be reached", tolerable=True) from None
        except EngineDeadline:
            raise _NotServing(f"its {path} does not answer in time", tolerable=True) from None
        except EngineError:
            raise _NotServing(f"its {path} closes the connection", tolerable=True) from None
        if complete.status in (401, 403):
            raise _NotServing(f"its {path} answers {complete.status}: set ENGINE_API_KEY to the instances' key")
        if complete.status != 200:
            raise _NotServing(f"its {path} answers {complete.status}")
        return complete


def _version(answer: CompleteResponse) -> str:
    try:
        version = json.loads(answer.body)["version"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return ""
    return version if isinstance(version, str) else ""


def _models(answer: CompleteResponse) -> dict[str, Mapping[str, Any]]:
    """The entries of an OpenAI /v1/models response by name, in its order."""
    try:
        cards = json.loads(answer.body)["data"]
        found = {card["id"]: card for card in cards if isinstance(card["id"], str)}
    except (ValueError, KeyError, TypeError, RecursionError):
        raise _NotServing("its /v1/models is not an OpenAI model list") from None
    if not found:
        raise _NotServing("its /v1/models lists no model")
    return found
