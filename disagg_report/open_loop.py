"""Open-loop load generator of streamed completions, for the URLs in turn.

Open loop: each request is sent at its planned time, however many are unanswered, as by independent users. After the
last one it waits for responses for a bounded time; those that are incomplete then have failed.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from disagg_report.arrivals import Workload
from disagg_report.client import Watch
from disagg_report.load_client import Broken, LoadClient, Response
from disagg_report.records import Measurement, Shot

_STATS_SECONDS = 5.0


class OpenLoopClient:
    """Sends the requests of a workload and records their times.

    Args:
        urls: the proxy, or plain engines, which get requests in turn.
        key: sent as ``Authorization: Bearer``.
        patience: seconds to wait for responses after the last arrival; None: at least 30, and twice the workload's.
    """

    name = "the project's own load generator"

    def __init__(self, urls: Sequence[str], workload: Workload, key: str = "", patience: float | None = None) -> None:
        self._urls = urls
        self._workload = workload
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._patience = max(30.0, 2 * workload.seconds) if patience is None else patience

    async def warm_up(self, count: int) -> Sequence[Shot]:
        """Send ``count`` requests at once, so that connections and communicators exist before the measurement."""
        bodies = self._workload.bodies(self._workload.dice(0), count)
        with self._connected() as clients:
            begin = time.perf_counter()
            tasks = [
                asyncio.create_task(self._one(clients[at % len(clients)], body, begin, 0.0))
                for at, body in enumerate(bodies)
            ]
            done, late = await asyncio.wait(tasks, timeout=max(120.0, self._patience))
            await _cancel(late)
            return [task.result() for task in done] + [Shot(error="no response in the warm-up")] * len(late)

    async def measure(self, rate: float, stop: asyncio.Event, watch: Watch) -> Measurement:
        """Measure one rate, or the part of it until ``stop`` is set."""
        arrivals = self._workload.arrival_times(rate)
        bodies = self._workload.bodies(self._workload.dice(rate), len(arrivals))
        tasks: list[asyncio.Task[Shot]] = []
        ended: Counter[bool] = Counter()

        def count(task: asyncio.Task[Shot]) -> None:
            if not task.cancelled():
                ended[task.result().answered] += 1
                watch(ended[True], ended[False], len(arrivals))

        with self._connected() as clients:
            halt = asyncio.create_task(stop.wait())
            gc.collect()
            gc.disable()
            cpu, begin = time.process_time(), time.perf_counter()
            try:
                for at, (arrival, body) in enumerate(zip(arrivals, bodies, strict=True)):
                    if (wait := begin + arrival - time.perf_counter()) > 0:
                        await asyncio.wait([halt], timeout=wait)
                    if stop.is_set():
                        break
                    late = (time.perf_counter() - begin - arrival) * 1e3
                    task = asyncio.create_task(self._one(clients[at % len(clients)], body, begin, late))
                    task.add_done_callback(count)
                    tasks.append(task)
                await self._await_responses(tasks, halt, begin + arrivals[-1] + self._patience)
                seconds, used = time.perf_counter() - begin, time.process_time() - cpu
            finally:
                gc.enable()
                halt.cancel()
                missing = [task for task in tasks if not task.done()]
                await _cancel(missing)
        shots = [task.result() for task in tasks if not task.cancelled()]
        if not stop.is_set():
            shots += [Shot(error=f"no complete response within {self._patience:g} s after the last request")] * len(
                missing
            )
        return Measurement(rate, seconds, tuple(shots), client_cpu=used / seconds, interrupted=stop.is_set())

    def window(self) -> tuple[float, float] | None:
        """None: the load lasts from the beginning to the end of :meth:`measure`."""
        return None

    async def _await_responses(
        self, tasks: Sequence[asyncio.Task[Shot]], halt: asyncio.Task[bool], limit: float
    ) -> None:
        while left := [task for task in tasks if not task.done()]:
            patience = limit - time.perf_counter()
            if patience <= 0 or halt.done():
                return
            await asyncio.wait([halt, left[0]], timeout=patience, return_when=asyncio.FIRST_COMPLETED)

    @contextmanager
    def _connected(self) -> Iterator[Sequence[LoadClient]]:
        clients = [LoadClient(url, self._headers) for url in self._urls]
        try:
            yield clients
        finally:
            for client in clients:
                client.close()

    async def _one(self, client: LoadClient, body: bytes, begin: float, late_ms: float) -> Shot:
        sent = time.perf_counter()
        response, error = Response(stream=True), ""
        try:
            await client.post("/v1/completions", body, response)
            if response.status != 200:
                text = bytes(response.body[:300]).decode("utf-8", "replace")
                error = f"HTTP {response.status}: {' '.join(text.split())}"
        except Broken as broken:
            error = f"Broken: {broken}"
        if not error and response.error:
            error = f"error in the stream: {response.error}"[:200]
        if not error and not response.done:
            error = "the stream ended without [DONE]"
        times = response.arrivals
        if not error and not times:
            error = "the stream had no tokens"
        if error:
            return Shot(sent=round(sent - begin, 6), late_ms=round(late_ms, 3), error=error[:300])
        return Shot(
            sent=round(sent - begin, 6),
            ttft_ms=round((times[0] - sent) * 1e3, 3),
            itl_ms=tuple(round((b - a) * 1e3, 3) for a, b in itertools.pairwise(times)),
            latency_ms=round((times[-1] - sent) * 1e3, 3),
            prompt_tokens=int(response.usage.get("prompt_tokens", 0)),
            output_tokens=response.completion_tokens or len(times),
            late_ms=round(late_ms, 3),
        )


async def _cancel(tasks: Iterable[asyncio.Task[Shot]]) -> None:
    left = list(tasks)
    for task in left:
        task.cancel()
    await asyncio.gather(*left, return_exceptions=True)


async def read_placed(url: str, key: str) -> dict[str, int]:
    """Requests so far by the way that the proxy placed them, by its ``/stats``; empty where it shows none."""
    client = LoadClient(url, {"Authorization": f"Bearer {key}"} if key else {})
    try:
        answer = await asyncio.wait_for(client.get("/stats"), _STATS_SECONDS)
        found = answer.json()["placement"]["requests"]
        return {str(way): int(count) for way, count in found.items()}
    except (Broken, asyncio.TimeoutError, ValueError, KeyError, TypeError, AttributeError):
        return {}
    finally:
        client.close()


def key_from_environment() -> str:
    """Read BENCH_KEY from the environment; `ps` would show an argument."""
    return os.environ.get("BENCH_KEY", "")
