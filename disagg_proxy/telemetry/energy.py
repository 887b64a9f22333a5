"""Energy as the telemetry of the proxy shows it: the totals that it is divided by, and one request's estimate."""

from __future__ import annotations

from disagg_power.book import EnergyBook, Totals
from disagg_proxy.telemetry.request_record import RequestRecord
from disagg_proxy.telemetry.stats import Stats


def totals_of(stats: Stats) -> Totals:
    """What all requests so far have cost in tokens. Where no usage was reported a chunk counts as one token."""
    return Totals(
        computed=stats.prompt_tokens - stats.cached_tokens - stats.alone_prompt_tokens,
        output=stats.output_tokens + stats.uncounted_chunks,
        requests=stats.outcomes["ok"],
    )


def estimate(book: EnergyBook, record: RequestRecord) -> tuple[float, float | None] | None:
    """The joules of one request above idle, and its share of idle power; see :meth:`EnergyBook.request_energy`."""
    computed = None
    if record.prefill is not None and record.prompt_tokens is not None:
        computed = record.prompt_tokens - (record.cached_tokens or 0)
    return book.request_energy(computed, record.output_tokens or record.pieces)


def rounded(joules: float | None) -> float | None:
    """Three decimals: the estimate is no better."""
    return None if joules is None else round(joules, 3)
