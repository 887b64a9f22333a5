"""Energy of each role, and per token and request: reports of GPUs and totals of requests in, figures out. Pure.

Times are the caller's monotonic seconds. A GPU belongs to the instance that reported it; one that instances of both
roles report (prefill and decode on one GPU) cannot be divided, so a role with such a GPU has no figure per token.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from disagg_power.devices import throttle_names
from disagg_power.report import GpuReport

ROLES = ("prefill", "decode")
HOST = "host"
"""The role of what serves all instances of a machine: CPU packages."""
STALE_SECONDS = 10.0
"""Without a report for this long a GPU's figures are not current: engines report every 3 s."""
WINDOW_SECONDS = 120.0
"""Figures per token and request are means over at most this time."""
SHORTEST_WINDOW = 10.0
"""Figures over less than this are too coarse to show: engines report every 3 s, counters move every 100 ms."""
_IDLE_KEPT = 600.0
_MAX_GPUS = 1024
_HISTORY = 320
"""Marks of the last ten minutes and a bit."""
_WH = 3600.0


@dataclass(slots=True)
class Gpu:
    """One GPU as reported.

    Attributes:
        joules: since its first report here, monotonic whatever its sources do.
        watts: mean power between the last two reports from the energy, else the GPU's own figure.
        idle: (time, watts) of intervals without a request on its instance.
        work: requests that its instance had got at the last report, None if one was running.
    """

    report: GpuReport
    role: str
    instance: str
    seen: float
    joules: float = 0.0
    watts: float | None = None
    others: set[tuple[str, str]] = field(default_factory=set)
    idle: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=64))
    work: int | None = None
    last_idle_w: float | None = None

    def joules_at(self, now: float) -> float:
        """``joules`` at ``now``: reports come every 1 to 3 s, since the last one at its power."""
        since = now - self.seen
        return self.joules + (self.watts * since if self.watts is not None and since <= STALE_SECONDS else 0.0)

    def idle_watts(self, now: float) -> float | None:
        """The lowest mean power of an idle interval in the last ten minutes, or of the last one known."""
        recent = [watts for at, watts in self.idle if now - at <= _IDLE_KEPT]
        return min(recent) if recent else self.last_idle_w

    def state(self, now: float) -> str:
        """``ok``, ``stale``, ``lost``, ``mig`` or ``no_figures``; figures of the others are not to be used."""
        if self.report.state != "ok":
            return self.report.state
        if now - self.seen > STALE_SECONDS:
            return "stale"
        return "mig" if self.report.mig else "ok"


@dataclass(frozen=True, slots=True)
class Totals:
    """Totals of all requests of the proxy that have ended.

    Attributes:
        computed: prompt tokens that prefill instances computed: without those found in a prefix cache.
        output: output tokens; the chunks of a stream where the engine did not count them.
        requests: answered requests.
    """

    computed: int = 0
    output: int = 0
    requests: int = 0


@dataclass(frozen=True, slots=True)
class _Mark:
    at: float
    totals: Totals
    joules: Mapping[str, float]
    """By UUID."""


@dataclass(frozen=True, slots=True)
class RoleFigures:
    """One role over the window; None: not known.

    Attributes:
        watts: now.
        idle_watts: while its instances had no request.
        joules: drawn in the window. idle_joules: the share that idle GPUs would have drawn in that time.
        tokens: prompt tokens computed, or output tokens.
        joules_per_token: ``joules / tokens``.
        active_joules_per_token: the same without the idle share.
    """

    watts: float | None
    idle_watts: float | None
    joules: float | None
    idle_joules: float | None
    tokens: int
    joules_per_token: float | None
    active_joules_per_token: float | None


class EnergyBook:
    """Collects reports; empty while nothing reports, and then it has no figures and costs nothing."""

    def __init__(self) -> None:
        self.gpus: dict[str, Gpu] = {}
        self._marks: deque[_Mark] = deque()
        self._figures: dict[str, RoleFigures] = {}
        self._history: deque[tuple[float, dict[str, RoleFigures]]] = deque(maxlen=_HISTORY)

    def __bool__(self) -> bool:
        return bool(self.gpus)

    # -- in

    def take(self, role: str, instance: str, reports: Iterable[GpuReport], now: float, work: int | None) -> None:
        """Note reports of an instance.

        Args:
            instance: key of the instance; empty for the host.
            work: requests that it has got so far; None while one is running.
        """
        for report in reports:
            gpu = self.gpus.get(report.uuid)
            if gpu is None:
                if len(self.gpus) < _MAX_GPUS:
                    self.gpus[report.uuid] = Gpu(report, role, instance, now, work=work, watts=report.power_w)
                continue
            if (gpu.role, gpu.instance) != (role, instance):
                if now - gpu.seen > STALE_SECONDS:
                    # The instance has gone and another one uses the GPU now.
                    gpu.role, gpu.instance = role, instance
                    gpu.others.clear()
                else:
                    gpu.others.add((role, instance))
                    continue
            self._note(gpu, report, now, work)

    def _note(self, gpu: Gpu, report: GpuReport, now: float, work: int | None) -> None:
        last, gpu.report, gpu.seen = gpu.report, report, now
        before, gpu.work = gpu.work, work if report.utilization in (None, 0.0) else None
        gpu.watts = report.power_w
        if report.joules is None or last.joules is None or report.source != last.source:
            return
        joules, seconds = report.joules - last.joules, report.at - last.at
        if joules < 0 or seconds <= 0:
            # The source has begun anew: what it shows from now on is added.
            return
        gpu.joules += joules
        gpu.watts = joules / seconds
        if gpu.work is not None and gpu.work == before and seconds >= 0.9:
            gpu.idle.append((now, gpu.watts))
            gpu.last_idle_w = gpu.watts

    def mark(self, now: float, totals: Totals, unix: float = 0.0) -> None:
        """Begin a new interval of the window; to be called every few seconds.

        Args:
            unix: Unix time, for :meth:`history`.
        """
        joules = {uuid: gpu.joules_at(now) for uuid, gpu in self.gpus.items()}
        self._marks.append(_Mark(now, totals, joules))
        while self._marks and now - self._marks[0].at > WINDOW_SECONDS:
            self._marks.popleft()
        self._figures = {role: self._role(role, now) for role in ROLES}
        self._history.append((unix, self._figures))

    # -- out

    def of_role(self, role: str) -> list[Gpu]:
        """The GPUs of one role."""
        return [gpu for gpu in self.gpus.values() if gpu.role == role or any(r == role for r, _ in gpu.others)]

    def figures(self, role: str) -> RoleFigures | None:
        """The figures of the last :meth:`mark`."""
        return self._figures.get(role)

    def history(self, start: float, seconds: float) -> dict[str, dict[str, float | None]]:
        """``watts`` and ``joules_per_token`` of each role at the last mark within ``seconds`` from ``start``.

        Args:
            start: Unix time.
        """
        found: Mapping[str, RoleFigures] = {}
        for unix, figures in reversed(self._history):
            if unix < start:
                break
            if unix < start + seconds:
                found = figures
                break
        return {
            "watts": {role: _rounded(found[role].watts, 1) if found else None for role in ROLES},
            "joules_per_token": {role: _rounded(found[role].joules_per_token, 6) if found else None for role in ROLES},
        }

    def _role(self, role: str, now: float) -> RoleFigures:
        gpus = self.of_role(role)
        usable = bool(gpus) and all(gpu.state(now) == "ok" and not gpu.others for gpu in gpus)
        idle = [gpu.idle_watts(now) for gpu in gpus]
        known_idle = sum(watts for watts in idle if watts is not None) if None not in idle and idle else None
        first, last = (self._marks[0], self._marks[-1]) if self._marks else (None, None)
        joules = idle_joules = None
        tokens = 0
        if first is not None and last is not None and last.at - first.at >= SHORTEST_WINDOW:
            name = "computed" if role == "prefill" else "output"
            tokens = max(0, getattr(last.totals, name) - getattr(first.totals, name))
            if usable and all(gpu.report.uuid in first.joules for gpu in gpus):
                joules = sum(last.joules[gpu.report.uuid] - first.joules[gpu.report.uuid] for gpu in gpus)
                if known_idle is not None:
                    idle_joules = min(joules, known_idle * (last.at - first.at))
        per_token = joules / tokens if joules is not None and tokens else None
        active = (joules - idle_joules) / tokens if joules is not None and idle_joules is not None and tokens else None
        watts = [gpu.watts for gpu in gpus if gpu.state(now) == "ok"]
        known = (
            sum(w for w in watts if w is not None) if watts and None not in watts and len(watts) == len(gpus) else None
        )
        return RoleFigures(known, known_idle, joules, idle_joules, tokens, per_token, active)

    def per_request(self) -> tuple[float | None, int, float]:
        """Joules of all GPUs per answered request in the window, the requests, and the length of the window."""
        if not self._marks:
            return None, 0, 0.0
        first, last = self._marks[0], self._marks[-1]
        seconds, requests = last.at - first.at, last.totals.requests - first.totals.requests
        gpus = [gpu for gpu in self.gpus.values() if gpu.role != HOST]
        usable = all(gpu.state(last.at) == "ok" and gpu.report.uuid in first.joules for gpu in gpus)
        if not gpus or not usable or requests <= 0 or seconds < SHORTEST_WINDOW:
            return None, max(0, requests), seconds
        joules = sum(last.joules[gpu.report.uuid] - first.joules[gpu.report.uuid] for gpu in gpus)
        return joules / requests, requests, seconds

    def request_energy(self, computed: int | None, output: int | None) -> tuple[float, float | None] | None:
        """Estimate of one request's joules: its tokens at the present energy per token of each role.

        Args:
            computed: prompt tokens that prefill computed, None where it took no part.
            output: output tokens.

        Returns:
            The energy above idle and the share of idle power, or all of it and None where idle power is not known
            yet; None without figures.
        """
        whole = active = 0.0
        split = True
        for role, tokens in (("prefill", computed), ("decode", output)):
            if not tokens:
                continue
            figures = self._figures.get(role)
            if figures is None or figures.joules_per_token is None:
                return None
            whole += tokens * figures.joules_per_token
            if figures.active_joules_per_token is None:
                split = False
            else:
                active += tokens * figures.active_joules_per_token
        if not whole:
            return None
        return (active, whole - active) if split else (whole, None)

    def report(self, now: float) -> dict[str, Any] | None:
        """The object ``energy`` of /stats and of the page; None while nothing reports."""
        if not self.gpus:
            return None
        per_request, requests, seconds = self.per_request()
        return {
            "window_s": round(seconds, 1),
            "simulated": any(gpu.report.simulated for gpu in self.gpus.values()),
            "requests": requests,
            "joules_per_request": _rounded(per_request, 3),
            "requests_per_wh": None if not per_request else _rounded(_WH / per_request, 2),
            "roles": {role: _role_report(self._figures.get(role)) for role in ROLES},
            "gpus": [_gpu_report(gpu, now) for gpu in sorted(self.gpus.values(), key=_order)],
        }


def _order(gpu: Gpu) -> tuple[int, str]:
    return (*ROLES, HOST).index(gpu.role), gpu.instance


def _role_report(figures: RoleFigures | None) -> dict[str, Any]:
    if figures is None:
        figures = RoleFigures(None, None, None, None, 0, None, None)
    return {
        "watts": _rounded(figures.watts, 1),
        "idle_watts": _rounded(figures.idle_watts, 1),
        "joules": _rounded(figures.joules, 1),
        "idle_joules": _rounded(figures.idle_joules, 1),
        "tokens": figures.tokens,
        "joules_per_token": _rounded(figures.joules_per_token, 6),
        "active_joules_per_token": _rounded(figures.active_joules_per_token, 6),
    }


def _gpu_report(gpu: Gpu, now: float) -> dict[str, Any]:
    report, state = gpu.report, gpu.state(now)
    current = state in ("ok", "mig")
    return {
        "uuid": report.uuid,
        "index": report.index,
        "name": report.name,
        "role": gpu.role,
        "instance": gpu.instance or None,
        "shared_with": sorted(f"{role} {instance}" for role, instance in gpu.others),
        "state": state,
        "simulated": report.simulated,
        "source": report.source,
        "joules": _rounded(report.joules, 3),
        "watts": _rounded(gpu.watts, 1) if current else None,
        "sm_clock_mhz": report.sm_clock_mhz if current else None,
        "memory_clock_mhz": report.memory_clock_mhz if current else None,
        "utilization": report.utilization if current else None,
        "temperature_c": report.temperature_c if current else None,
        "throttle": list(throttle_names(report.throttle)) if current else [],
        "idle_watts": _rounded(gpu.idle_watts(now), 1),
        "integral_deviation": report.deviation,
    }


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)
