"""``power record``: one CSV row per GPU and sample, and one per request beside them.

Times are Unix seconds of this machine. Energy is that of the GPU since the recording began: by its counter where there
is one (``source``), else the integral of its power.
"""

from __future__ import annotations

import csv
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from disagg_power.devices import Device, throttle_names
from disagg_power.meter import GpuMeter
from disagg_power.proxy_client import NoProxy, ProxyClient

SAMPLES = (
    "time", "elapsed_s", "gpu", "uuid", "role", "instance", "state", "power_w", "energy_j", "source", "sm_clock_mhz",
    "memory_clock_mhz", "utilization", "temperature_c", "throttle",
)  # fmt: skip
REQUESTS = (
    "seq", "time", "elapsed_s", "id", "prefill", "decode", "outcome", "prompt_tokens", "cached_tokens", "output_tokens",
    "prefill_start_s", "prefill_end_s", "decode_start_s", "decode_end_s",
)  # fmt: skip
POLL_SECONDS = 2.0
"""Between two looks at the proxy's last 256 requests: none is missed below 128 requests a second."""


@dataclass(frozen=True, slots=True)
class Recorded:
    """A GPU to record: the role and the instance that use it, empty where not known."""

    device: Device
    role: str = ""
    instance: str = ""


class Recorder:
    """Writes samples until it is stopped.

    Args:
        out: file of the samples; that of the requests is :func:`requests_file`.
        interval: seconds between two samples.
        proxy: for the requests; None for none.
    """

    def __init__(
        self,
        gpus: Sequence[Recorded],
        out: Path,
        interval: float,
        proxy: ProxyClient | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.out = out
        self.meters = [(one, GpuMeter(one.device)) for one in gpus]
        self.samples = self.requests = self.missed = 0
        self.proxy_error = ""
        self._interval, self._proxy, self._clock, self._sleep = interval, proxy, clock, sleep
        self._last_seq = 0

    def run(self, seconds: float | None = None) -> None:
        """Record for this long, or until KeyboardInterrupt; what was recorded by then is kept.

        Raises:
            OSError: the files cannot be written.
        """
        with (
            self.out.open("w", newline="", encoding="utf-8") as samples,
            requests_file(self.out).open("w", newline="", encoding="utf-8") as requests,
        ):
            rows, events = csv.writer(samples), csv.writer(requests)
            rows.writerow(SAMPLES)
            events.writerow(REQUESTS)
            begin, unix = self._clock(), time.time()
            due = polled = begin
            try:
                while seconds is None or due - begin <= seconds:
                    self._sample(rows, unix, begin)
                    if self._proxy is not None and self._clock() - polled >= POLL_SECONDS:
                        polled = self._clock()
                        self._poll(events, unix)
                        samples.flush()
                    now = self._clock()
                    late = max(0, int((now - due) / self._interval))
                    self.missed += late
                    due += (late + 1) * self._interval
                    self._sleep(max(0.0, due - now))
            except KeyboardInterrupt:
                pass
            if self._proxy is not None:
                self._poll(events, unix)

    def _sample(self, rows: Any, unix: float, begin: float) -> None:
        for one, meter in self.meters:
            report = meter.sample()
            elapsed = self._clock() - begin
            joules = meter.counted if report.source == "counter" else meter.integrated
            rows.writerow([
                f"{unix + elapsed:.3f}", f"{elapsed:.3f}", report.index, report.uuid, one.role, one.instance,
                report.state, report.power_w, f"{joules:.3f}" if report.state == "ok" else None, report.source,
                report.sm_clock_mhz, report.memory_clock_mhz, report.utilization, report.temperature_c,
                " ".join(throttle_names(report.throttle)),
            ])  # fmt: skip
        self.samples += 1

    def _poll(self, events: Any, unix: float) -> None:
        assert self._proxy is not None
        try:
            found = self._proxy.recent()
        except NoProxy as error:
            self.proxy_error = str(error)
            return
        for record in found:
            if record["seq"] > self._last_seq and record["time"] >= unix:
                events.writerow(_request_row(record, unix))
                self.requests += 1
        self._last_seq = max([self._last_seq, *(record["seq"] for record in found)])


def _request_row(record: Mapping[str, Any], unix: float) -> list[Any]:
    start = record["time"] - unix
    phases: list[Any] = []
    for name in ("prefill", "decode"):
        bar = record["bars"].get(name)
        phases += [None, None] if bar is None else [round(start + bar[0] / 1e3, 3), round(start + bar[1] / 1e3, 3)]
    return [
        record["seq"], record["time"], round(start, 3), record["id"], record["prefill"], record["decode"],
        record["outcome"], record["prompt_tokens"], record["cached_tokens"], record["output_tokens"], *phases,
    ]  # fmt: skip


def requests_file(out: Path) -> Path:
    """The file of the requests beside that of the samples."""
    return out.with_name(f"{out.stem}.requests.csv")


def write_parquet(out: Path) -> Path | None:
    """The samples once more as Parquet, where pyarrow is installed; else None."""
    try:
        import pyarrow.csv
        import pyarrow.parquet
    except ImportError:
        return None
    path = out.with_suffix(".parquet")
    pyarrow.parquet.write_table(pyarrow.csv.read_csv(out), path)
    return path
