"""Cost of telemetry: CPU time of a request's record, of a chunk of a stream, of a line of the access log, and of the
state that a worker publishes for the page.

    python -m bench.observe

Each figure is the minimum of several rounds in this process, so that other programs on the machine hardly affect it.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from disagg_proxy.address import parse_address
from disagg_proxy.cluster.instance import Instance, Role, Source
from disagg_proxy.connectors.p2p_nccl import KIND as P2P
from disagg_proxy.telemetry.access_log import AccessLog
from disagg_proxy.telemetry.page_state import page_state_of
from disagg_proxy.telemetry.request_record import GAP_SAMPLE_INTERVAL, RequestRecord
from disagg_proxy.telemetry.request_recorder import RequestRecorder

_ROUNDS = 7


def microseconds(work: Callable[[], object], times: int, rounds: int = _ROUNDS) -> float:
    """CPU time of one call: the least of several rounds."""
    best = float("inf")
    for _ in range(rounds):
        begun = time.process_time()
        for _ in range(times):
            work()
        best = min(best, time.process_time() - begun)
    return best / times * 1e6


class _Request:
    """A small request that is not streamed, from its arrival to its end."""

    def __init__(self) -> None:
        self.recorder = RequestRecorder.standalone()
        self._prefill, self._decode = (
            Instance(role, parse_address(f"127.0.0.1:{port}"), None, Source.STATIC, P2P)
            for role, port in ((Role.PREFILL, 20003), (Role.DECODE, 20005))
        )

    def __call__(self) -> RequestRecord:
        record = self.recorder.open("/v1/completions", None)
        record.on_ready("model")
        record.on_admitted()
        record.on_attempt(self._prefill, self._decode, "0123456789abcdef0123456789abcdef")
        record.on_prefill_sent()
        record.on_prefill_response()
        record.prompt_tokens, record.cached_tokens = 100, 0
        record.on_decode_sent()
        record.on_first_byte(False)
        record.output_tokens, record.status = 8, 200
        record.complete()
        record.end()
        return record


def chunks() -> float:
    """Mean CPU time of the samples for one chunk of a stream, without the countdown in the relay."""
    record = RequestRecorder.standalone().open("/v1/completions", None)

    def gap() -> None:
        record.sample_gap()
        record.sample_gap()

    return microseconds(gap, 10_000) / GAP_SAMPLE_INTERVAL


async def _line(request: _Request) -> float:
    with tempfile.TemporaryDirectory() as folder:
        log = AccessLog(str(Path(folder) / "access.log"))
        record = request()
        found = microseconds(lambda: log.take(record), 2_000)
        await log.stop()
    return found


def main() -> None:
    """Print the table."""
    request = _Request()
    print(f"record of a request            {microseconds(request, 10_000):6.2f} µs")
    print(f"sampling, each chunk           {chunks():6.3f} µs")
    print(f"line of the access log         {asyncio.run(_line(request)):6.2f} µs")
    publish = microseconds(lambda: page_state_of(request.recorder).pack(1 << 18), 200)
    print(f"page state, each second        {publish:6.0f} µs")
    if found := os.cpu_count():
        print(f"({found} cores)")


if __name__ == "__main__":
    main()
