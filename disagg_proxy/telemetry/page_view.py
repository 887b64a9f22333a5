"""Everything that a page shows of a proxy, as one object for JSON. Its schema is docs/observe.md.

All durations in it are milliseconds, all moments Unix time in seconds. Entries of the past are made once and are the
same objects in every view: they must not be changed.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from disagg_proxy import __version__
from disagg_proxy.cluster.instance import Instance
from disagg_proxy.telemetry.aggregate import Overview
from disagg_proxy.telemetry.page_state import PageState, fields_of, step_of, together
from disagg_proxy.telemetry.proxy_state import ProxyState
from disagg_proxy.telemetry.stats import Latency
from disagg_proxy.telemetry.stats_report import instance_report
from disagg_proxy.telemetry.timeseries import SECONDS

SHARES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}


def view(proxy: ProxyState, overview: Overview, news: Sequence[PageState]) -> dict[str, Any]:
    """The whole proxy, from any of its workers.

    Args:
        news: of each process.
    """
    now = time.time()
    stats = overview.stats
    whole = together(news, now)
    return {
        "now": round(now, 3),
        "version": __version__,
        "uptime_s": round(stats.clock() - stats.started_at, 3),
        "stopping": proxy.shutdown.begun.is_set(),
        "workers": max(1, len(overview.workers)),
        "instances": [_instance(i, proxy, overview) for i in proxy.registry.instances()],
        "flows": [
            {"prefill": f.prefill, "decode": f.decode, "in_flight": f.in_flight, "total": f.total} for f in whole.flows
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
        "rates": {"step_s": SECONDS, "steps": [_step(start, parts) for start, parts in whole.steps]},
        "recent": [_record(packed) for packed in whole.records],
        "events": [
            {"seq": e.seq, "time": round(e.time, 3), "kind": e.kind, "instance": e.instance, "text": e.text,
             "count": e.count}
            for e in whole.events
        ],
    }  # fmt: skip


def _instance(instance: Instance, proxy: ProxyState, overview: Overview) -> dict[str, Any]:
    return {"key": instance.key, **instance_report(instance, proxy, overview)}


def _summary(latency: Latency) -> dict[str, float | int | None]:
    found = latency.summary()
    shown: dict[str, float | int | None] = {"count": latency.count}
    for name in SHARES:
        seconds = found[f"{name}_s"]
        shown[name] = None if seconds is None else round(seconds * 1000, 2)
    return shown


@lru_cache(maxsize=1024)
def _step(start: int, parts: tuple[bytes, ...]) -> dict[str, Any]:
    step = step_of(start, parts)
    ttft, gap = step.ttft, step.gap
    return {
        "time": step.start,
        "requests": dict(step.outcomes),
        "pieces": step.pieces,
        "prompt_tokens": step.prompt_tokens,
        "output_tokens": step.output_tokens,
        "ttft": {name: _ms(ttft.quantile(share)) for name, share in SHARES.items()},
        "gap": {name: _ms(gap.quantile(share)) for name, share in SHARES.items()},
        "kv_waiting_bytes": step.kv_waiting_bytes,
        "in_flight": step.in_flight,
        "queued": step.queued,
    }


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1000, 3)


@lru_cache(maxsize=1024)
def _record(packed: bytes) -> dict[str, Any]:
    """With the bars of a waterfall: from and to, in order, without those that there were not."""
    record = fields_of(packed)
    end = record["total_ms"]
    admitted, asked, answered, decode, first = (
        record.pop(f"{name}_at")
        for name in ("admitted", "prefill_asked", "prefill_answered", "decode_asked", "first_byte")
    )
    ready = record.pop("ready_at")
    bars: dict[str, list[float]] = {}
    if record["queue_ms"]:
        bars["queue"] = [ready, end if admitted is None else admitted]
    if asked is not None:
        bars["prefill"] = [asked, _first(answered, first, end)]
    if decode is not None and (asked is None or answered is not None or first is not None):
        # Both legs run at once with the project's own connector: what prefill takes is not decode's time.
        begun = decode if answered is None else max(decode, answered)
        if not record["streamed"] and first is not None:
            bars["decode"] = [min(begun, end), end]
        elif first is None or first > begun:
            bars["transfer"] = [begun, _first(first, end)]
    if first is not None and record["streamed"]:
        bars["decode"] = [first, end]
    return {**record, "bars": bars}


def _first(*moments: float | None) -> float:
    return next(moment for moment in moments if moment is not None)
