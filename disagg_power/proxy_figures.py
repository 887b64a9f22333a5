"""What the proxy sees, as the governor needs it: windows between two scrapes of its ``/metrics``."""

from __future__ import annotations

import re
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field

from disagg_power.governor import Sample

PREFIX = "disagg_proxy_"
TTFT, GAP = PREFIX + "time_to_first_token_seconds", PREFIX + "inter_token_latency_seconds"
QUEUED, IN_FLIGHT = PREFIX + "requests_queued", PREFIX + "instance_in_flight"
TAIL = 0.95
SECONDS = 1.0
"""For one scrape."""

_LINE = re.compile(r"([a-zA-Z_:][\w:]*)(?:\{(.*)\})? (\S+)")
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def scrape(url: str, key: str) -> str:
    """The text of ``/metrics``.

    Raises:
        OSError: the proxy does not answer, or refuses the key.
    """
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {key}"} if key else {})
    with _OPENER.open(request, timeout=SECONDS) as response:
        return str(response.read().decode("utf-8", "replace"))


@dataclass(frozen=True, slots=True)
class Totals:
    """One histogram since the start of the proxy; ``buckets`` are cumulative, by upper bound."""

    sum: float = 0.0
    count: float = 0.0
    buckets: Mapping[float, float] = field(default_factory=dict)

    def since(self, before: Totals) -> float | None:
        """Seconds of the window: its mean, or the lower bound of the bucket in which its 95th percentile is, if that is
        more; so it never exceeds what requests have seen. None without values, or when the proxy was restarted."""
        count = self.count - before.count
        if count <= 0:
            return None
        mean = (self.sum - before.sum) / count
        lower = 0.0
        for bound, total in sorted(self.buckets.items()):
            if total - before.buckets.get(bound, 0.0) >= TAIL * count:
                break
            lower = bound
        return max(mean, lower)


def parse(text: str) -> tuple[Totals, Totals, int, int]:
    """TTFT, gaps, queued requests, and legs in flight at prefill instances."""
    values: dict[str, float] = {}
    buckets: dict[str, dict[float, float]] = {TTFT: {}, GAP: {}}
    prompts = 0.0
    for line in text.splitlines():
        match = _LINE.fullmatch(line)
        if match is None:
            continue
        name, labels, value = match[1], match[2] or "", float(match[3])
        if name.endswith("_bucket") and name[:-7] in buckets:
            bound = re.search(r'le="([^"]+)"', labels)
            if bound and bound[1] != "+Inf":
                buckets[name[:-7]][float(bound[1])] = value
        elif name == IN_FLIGHT and 'role="prefill"' in labels:
            prompts += value
        elif not labels:
            values[name] = value
    histograms = [Totals(values.get(f"{n}_sum", 0.0), values.get(f"{n}_count", 0.0), buckets[n]) for n in (TTFT, GAP)]
    return histograms[0], histograms[1], int(values.get(QUEUED, 0)), int(prompts)


class Windows:
    """Samples of successive scrapes."""

    def __init__(self) -> None:
        self._before: tuple[Totals, Totals] | None = None

    def take(self, text: str, at: float) -> Sample:
        """The window since the scrape before."""
        ttft, gap, queued, prompts = parse(text)
        before, self._before = self._before or (ttft, gap), (ttft, gap)
        return Sample(at, ttft.since(before[0]), gap.since(before[1]), queued, prompts)
