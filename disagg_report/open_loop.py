"""The project's own load generator: an open loop of streamed completions, each URL in turn.

Open loop: a request is sent when its moment comes, however many are unanswered, as with people who do not know of each
other. After the last one it waits for answers for a bounded time; those that are missing then have failed.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import json
import os
import time
from collections import Counter
from collections.abc import Iterable, Sequence

import aiohttp

from disagg_report.arrivals import Workload
from disagg_report.client import Watch
from disagg_report.records import Measurement, Shot


class OwnClient:
    """Sends requests and keeps what came of them.

    Args:
        urls: the proxy, or plain engines, which get requests in turn.
        key: sent as ``Authorization: Bearer``.
        patience: seconds after the last arrival in which answers are awaited.
    """

    name = "the project's own load generator"

    def __init__(self, urls: Sequence[str], workload: Workload, key: str = "", patience: float | None = None) -> None:
        self._urls = [url + "/v1/completions" for url in urls]
        self._workload = workload
        self._headers = {"Content-Type": "application/json"}
        if key:
            self._headers["Authorization"] = f"Bearer {key}"
        self._patience = max(30.0, 2 * workload.seconds) if patience is None else patience

    async def warm_up(self, count: int) -> Sequence[Shot]:
        """``count`` requests at once, so that connections and communicators are made before anything counts."""
        bodies = self._workload.bodies(self._workload.dice(0), count)
        async with self._session() as session:
            begin = time.perf_counter()
            tasks = [asyncio.create_task(self._one(session, at, body, begin, 0.0)) for at, body in enumerate(bodies)]
            done, late = await asyncio.wait(tasks, timeout=max(120.0, self._patience))
            await _cancel(late)
            return [task.result() for task in done] + [Shot(error="no answer in the warm-up")] * len(late)

    async def measure(self, rate: float, stop: asyncio.Event, watch: Watch) -> Measurement:
        """One rate, or what there is of it when ``stop`` is set."""
        moments = self._workload.moments(rate)
        bodies = self._workload.bodies(self._workload.dice(rate), len(moments))
        tasks: list[asyncio.Task[Shot]] = []
        ended: Counter[bool] = Counter()

        def count(task: asyncio.Task[Shot]) -> None:
            if not task.cancelled():
                ended[task.result().answered] += 1
                watch(ended[True], ended[False], len(moments))

        async with self._session() as session:
            halt = asyncio.create_task(stop.wait())
            gc.collect()
            gc.disable()
            cpu, begin = time.process_time(), time.perf_counter()
            try:
                for at, (moment, body) in enumerate(zip(moments, bodies, strict=True)):
                    if (wait := begin + moment - time.perf_counter()) > 0:
                        await asyncio.wait([halt], timeout=wait)
                    if stop.is_set():
                        break
                    late = (time.perf_counter() - begin - moment) * 1e3
                    task = asyncio.create_task(self._one(session, at, body, begin, late))
                    task.add_done_callback(count)
                    tasks.append(task)
                await self._await_answers(tasks, halt, begin + moments[-1] + self._patience)
                seconds, used = time.perf_counter() - begin, time.process_time() - cpu
            finally:
                gc.enable()
                halt.cancel()
                missing = [task for task in tasks if not task.done()]
                await _cancel(missing)
        shots = [task.result() for task in tasks if not task.cancelled()]
        if not stop.is_set():
            shots += [Shot(error=f"no whole answer {self._patience:g} s after the last request")] * len(missing)
        return Measurement(rate, seconds, tuple(shots), client_cpu=used / seconds, interrupted=stop.is_set())

    def window(self) -> tuple[float, float] | None:
        """Load is there from the beginning to the end of :meth:`measure`."""
        return None

    async def _await_answers(self, tasks: Sequence[asyncio.Task[Shot]], halt: asyncio.Task[bool], limit: float) -> None:
        while left := [task for task in tasks if not task.done()]:
            patience = limit - time.perf_counter()
            if patience <= 0 or halt.done():
                return
            await asyncio.wait([halt, left[0]], timeout=patience, return_when=asyncio.FIRST_COMPLETED)

    def _session(self) -> aiohttp.ClientSession:
        # Kept connections could be closed by the peer between two rates; a request on one of them would fail.
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=2)
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=10)
        return aiohttp.ClientSession(connector=connector, timeout=timeout, headers=self._headers)

    async def _one(self, session: aiohttp.ClientSession, at: int, body: bytes, begin: float, late_ms: float) -> Shot:
        sent = time.perf_counter()
        times: list[float] = []
        prompt = output = 0
        done, error = False, ""
        try:
            async with session.post(self._urls[at % len(self._urls)], data=body) as answer:
                if answer.status != 200:
                    text = (await answer.read())[:300].decode("utf-8", "replace")
                    error = f"HTTP {answer.status}: {' '.join(text.split())}"
                async for line in answer.content:
                    if not line.startswith(b"data:"):
                        continue
                    now = time.perf_counter()
                    data = line[5:].strip()
                    if data == b"[DONE]":
                        done = True
                        continue
                    event = json.loads(data)
                    if event.get("choices"):
                        times.append(now)
                    if event.get("usage"):
                        prompt, output = event["usage"]["prompt_tokens"], event["usage"]["completion_tokens"]
                    if event.get("error"):
                        error = f"error in the stream: {str(event['error'])[:200]}"
        except (aiohttp.ClientError, OSError, asyncio.TimeoutError, ValueError, KeyError, TypeError) as failed:
            error = f"{type(failed).__name__}: {failed}"[:300]
        if not error and not done:
            error = "the stream ended without [DONE]"
        if not error and not times:
            error = "the stream had no tokens"
        if error:
            return Shot(sent=round(sent - begin, 6), late_ms=round(late_ms, 3), error=error)
        return Shot(
            sent=round(sent - begin, 6),
            ttft_ms=round((times[0] - sent) * 1e3, 3),
            itl_ms=tuple(round((b - a) * 1e3, 3) for a, b in itertools.pairwise(times)),
            latency_ms=round((times[-1] - sent) * 1e3, 3),
            prompt_tokens=int(prompt),
            output_tokens=int(output) or len(times),
            late_ms=round(late_ms, 3),
        )


async def _cancel(tasks: Iterable[asyncio.Task[Shot]]) -> None:
    left = list(tasks)
    for task in left:
        task.cancel()
    await asyncio.gather(*left, return_exceptions=True)


def key_from_environment() -> str:
    """BENCH_KEY: not an argument, which `ps` would show."""
    return os.environ.get("BENCH_KEY", "")
