"""The view: everything that the live page shows, as one JSON object. docs/observe.md has its schema.

Durations are milliseconds, times are Unix seconds. Finished entries are cached and shared by all views: callers must
not modify them.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from disagg_power.book import EnergyBook
from disagg_proxy import __version__, compiled
from disagg_proxy.cluster.instance import Instance
from disagg_proxy.telemetry.aggregate import Overview
from disagg_proxy.telemetry.page_state import PageState, merge_states, merge_step, unpack_record
from disagg_proxy.telemetry.proxy_state import ProxyState
from disagg_proxy.telemetry.stats import Latency
from disagg_proxy.telemetry.stats_report import instance_report, placement_report
from disagg_proxy.telemetry.timeseries import SECONDS

_QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}

_NO_QUANTILES = dict.fromkeys(_QUANTILES)

_COUNTED = ("requests", "pieces", "prompt_tokens", "output_tokens", "kv_waiting_bytes", "in_flight", "queued")
"""Values of a step that are null where no process has recorded it."""


def view(proxy: ProxyState, overview: Overview, states: Sequence[PageState]) -> dict[str, Any]:
    """The view of the whole proxy, whichever worker makes it.

    Args:
        overview: totals of all processes.
        states: what each process has published.
    """
    now = time.time()
    stats = overview.stats
    merged = merge_states(states, now)
    return {
        "now": round(now, 3),
        "version": __version__,
        "compiled": compiled(),
        "uptime_s": round(stats.clock() - stats.started_at, 3),
        "stopping": proxy.shutdown.begun.is_set(),
        "workers": max(1, len(overview.workers)),
        "instances": [_instance(i, proxy, overview) for i in proxy.registry.instances()],
        "energy": proxy.energy.report(proxy.registry.now()),
        "placement": placement_report(proxy, overview),
        "flows": [
            {"prefill": f.prefill, "decode": f.decode, "in_flight": f.in_flight, "total": f.total} for f in merged.flows
        ],
        "totals": {
            "requests": dict(stats.outcomes),
            "in_flight": stats.in_flight,
            "queued": overview.queued,
            "in_background": overview.in_background,
            "failovers": stats.failovers,
            "prompt_tokens": stats.prompt_tokens,
            "output_tokens": stats.output_tokens,
        },
        "latency": {
            "queue": _summary(stats.queued),
            "prefill": _summary(stats.prefill),
            "ttft": _summary(stats.ttft),
            "gap": _summary(stats.gap),
            "total": _summary(stats.total),
        },
        "rates": {
            "step_s": SECONDS,
            "steps": [_with_power(_step(start, parts), proxy.energy) for start, parts in merged.steps],
        },
        "recent": [_record(packed) for packed in merged.records],
        "events": [
            {"seq": e.seq, "time": round(e.time, 3), "kind": e.kind, "instance": e.instance, "text": e.text,
             "count": e.count}
            for e in merged.events
        ],
    }  # fmt: skip


def _with_power(step: dict[str, Any], energy: EnergyBook) -> dict[str, Any]:
    return {**step, **energy.history(step["time"], SECONDS)} if energy else step


def _instance(instance: Instance, proxy: ProxyState, overview: Overview) -> dict[str, Any]:
    return {"key": instance.key, **instance_report(instance, proxy, overview)}


def _summary(latency: Latency) -> dict[str, float | int | None]:
    summary = latency.summary()
    shown: dict[str, float | int | None] = {"count": latency.count}
    for name in _QUANTILES:
        seconds = summary[f"{name}_s"]
        shown[name] = None if seconds is None else round(seconds * 1000, 2)
    return shown


@lru_cache(maxsize=1024)
def _step(start: int, parts: tuple[bytes, ...]) -> dict[str, Any]:
    if not parts:
        # Before the start of the proxy, or while it was stalled: not the same as zero.
        return {"time": start, **dict.fromkeys(_COUNTED), "ttft": _NO_QUANTILES, "gap": _NO_QUANTILES}
    step = merge_step(start, parts)
    ttft, gap = step.ttft, step.gap
    return {
        "time": step.start,
        "requests": dict(step.outcomes),
        "pieces": step.pieces,
        "prompt_tokens": step.prompt_tokens,
        "output_tokens": step.output_tokens,
        "ttft": {name: _ms(ttft.quantile(share)) for name, share in _QUANTILES.items()},
        "gap": {name: _ms(gap.quantile(share)) for name, share in _QUANTILES.items()},
        "kv_waiting_bytes": step.kv_waiting_bytes,
        "in_flight": step.in_flight,
        "queued": step.queued,
    }


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1000, 3)


@lru_cache(maxsize=1024)
def _record(packed: bytes) -> dict[str, Any]:
    """A record for the page, with ``bars``: start and end in ms since its arrival of each phase that it had."""
    record = unpack_record(packed)
    end = record["total_ms"]
    admitted, sent, done, decode, first = (
        record.pop(f"{name}_at") for name in ("admitted", "prefill_sent", "prefill_done", "decode_sent", "first_byte")
    )
    ready = record.pop("ready_at")
    bars: dict[str, list[float]] = {}
    if record["queue_ms"]:
        bars["queue"] = [ready, end if admitted is None else admitted]
    if sent is not None:
        bars["prefill"] = [sent, _first_known(done, first, end)]
    if decode is not None and (sent is None or done is not None or first is not None):
        # With disagg_kv both legs run at once: the time of prefill is not counted as decode's.
        begun = decode if done is None else max(decode, done)
        if not record["streamed"] and first is not None:
            bars["decode"] = [min(begun, end), end]
        elif first is None or first > begun:
            bars["transfer"] = [begun, _first_known(first, end)]
    if first is not None and record["streamed"]:
        bars["decode"] = [first, end]
    return {**record, "bars": bars}


def _first_known(*times: float | None) -> float:
    return next(time for time in times if time is not None)
