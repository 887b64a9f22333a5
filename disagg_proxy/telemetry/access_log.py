"""The access log: one line of JSON per generation request, written when the request ends.

docs/monitoring.md lists the fields. A line is formatted on the event loop (a few microseconds). A thread writes the
lines of the last 50 ms, or 16 KB if that is less, so a slow disk or a stalled reader of a pipe does not delay requests,
and SIGKILL loses no more than that. Lines that cannot be written (disk full, no permission) are kept and retried.
The backlog is bounded: further lines are dropped and counted, and a line with their number is written.

The file is reopened when its path no longer leads to the open file, so renaming it rotates the log without a signal.
Several workers may append to one file: a single write of complete lines with ``O_APPEND`` is not interleaved.
"""

from __future__ import annotations

import asyncio
import logging
import os
import queue
import select
import stat
import threading
import time
from collections import deque

import msgspec

from disagg_power.book import EnergyBook
from disagg_proxy.telemetry.energy import estimate, rounded
from disagg_proxy.telemetry.request_record import RequestRecord
from disagg_proxy.telemetry.stats import Stats

log = logging.getLogger(__name__)

_FLUSH_INTERVAL = 0.05
"""Seconds that a line may wait before it is passed to the writer thread."""

_FLUSH_BYTES = 16 * 1024
"""Bytes of lines that are passed on without waiting for the interval."""

_RETRY_INTERVAL = 1.0
"""Seconds between two attempts to write to a target that fails."""

_WRITE_BYTES = 64 * 1024
"""Bytes of lines in one write, except for a line that is longer."""

_MAX_BACKLOG = 8 * 1024 * 1024
"""Bytes that may be waiting for the writer thread."""

_FLUSH_TIMEOUT = 2.0
"""Seconds that shutdown waits for the last lines."""

_encode = msgspec.json.Encoder().encode


class AccessLog:
    """Formats records on the event loop and passes them to the writer thread.

    Args:
        target: a path, or "-" for standard output.
        worker: the number of this worker, None for a single process.
        stats: where dropped lines and failed writes are counted.
        energy: for ``energy_j`` of a request; lines have the field only where it is known.
    """

    def __init__(
        self, target: str, worker: int | None = None, stats: Stats | None = None, energy: EnergyBook | None = None
    ) -> None:
        self._worker = worker
        self._energy = energy
        self._stats = Stats(time.monotonic) if stats is None else stats
        self._lines: list[bytes] = []
        self._waiting = 0
        self._dropped = 0
        self._timer: asyncio.TimerHandle | None = None
        self._second = -1
        self._date = ""
        self._out = _Writer(target, self._stats)

    def take(self, record: RequestRecord) -> None:
        """Append the line of a request that has ended. A sink of the request recorder."""
        # Once lines are dropped, half of the backlog must be written before new ones are accepted: one log line each.
        if self._waiting + self._out.unwritten > (_MAX_BACKLOG // 2 if self._dropped else _MAX_BACKLOG):
            if not self._dropped:
                log.warning("Dropping lines of the access log: its target is full or too slow (ACCESS_LOG)")
            self._dropped += 1
            self._stats.access_log_lines_dropped += 1
            return
        if self._dropped:
            self._append_dropped()
        self._append(self._line(record))
        if self._waiting >= _FLUSH_BYTES:
            self._flush()
        elif self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_FLUSH_INTERVAL, self._flush)

    def _append(self, line: bytes) -> None:
        self._lines.append(line)
        self._waiting += len(line)

    def _append_dropped(self) -> None:
        self._append(_encode({"dropped": self._dropped}) + b"\n")
        log.warning("Dropped %d lines of the access log (ACCESS_LOG)", self._dropped)
        self._dropped = 0

    def _line(self, record: RequestRecord) -> bytes:
        unix = record.unix
        second = int(unix)
        if second != self._second:
            self._second = second
            self._date = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))
        fields = {
            "time": f"{self._date}.{int(unix % 1 * 1000):03d}Z",
            "request_id": record.request_id,
            "id": record.public_id,
            "client_id": record.client_id,
            "key": record.key,
            "route": record.route,
            "model": record.model,
            "prefill": record.prefill,
            "decode": record.decode,
            "way": record.way,
            "tries": record.tries,
            "status": record.status,
            "outcome": record.outcome,
            "cause": record.cause,
            "stream": record.streamed,
            "prompt_tokens": record.prompt_tokens,
            "cached_tokens": record.cached_tokens,
            "output_tokens": record.output_tokens,
            "pieces": record.pieces,
            "queue_ms": _ms(record.queue_time),
            "prefill_ms": _ms(record.prefill_time),
            "ttft_ms": _ms(record.ttft),
            "gap_ms": _ms(record.mean_gap),
            "total_ms": _ms(record.total),
        }
        if self._energy and (joules := estimate(self._energy, record)) is not None:
            fields["energy_j"], fields["energy_idle_j"] = rounded(joules[0]), rounded(joules[1])
        if self._worker is not None:
            fields["worker"] = self._worker
        return _encode(fields) + b"\n"

    def _flush(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        lines, self._lines = self._lines, []
        self._waiting = 0
        self._out.write(lines)

    async def stop(self) -> None:
        """Write the remaining lines, within two seconds."""
        if self._dropped:
            self._append_dropped()
        if self._lines:
            self._flush()
        await asyncio.get_running_loop().run_in_executor(None, self._out.close)


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1000, 2)


class _Writer:
    """The writer thread.

    Args:
        target: a path, or "-" for standard output.
        stats: where failed writes are counted, and lines that were dropped at the end.
    """

    def __init__(self, target: str, stats: Stats) -> None:
        self._path = None if target == "-" else target
        self._file = 1 if target == "-" else -1
        self._stats = stats
        self._failing = False
        self._pending: deque[bytes] = deque()
        self._begun = 0
        """Bytes of the first pending line that are in the file already."""
        # Each has one writing thread; one counter of both would lose updates.
        self._queued = 0
        self._finished = 0
        self._batches: queue.SimpleQueue[list[bytes] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="access-log", daemon=True)
        self._thread.start()

    @property
    def unwritten(self) -> int:
        """Bytes passed to :meth:`write` and not yet written."""
        return self._queued - self._finished

    def write(self, lines: list[bytes]) -> None:
        """Queue complete lines for writing, in order."""
        self._queued += sum(map(len, lines))
        self._batches.put(lines)

    def close(self) -> None:
        """Block until everything is written, two seconds at most. Not to be called on an event loop."""
        self._batches.put(None)
        self._thread.join(_FLUSH_TIMEOUT)
        if self.unwritten:
            self._stats.access_log_lines_dropped += len(self._pending)
            log.error("Dropped %d bytes of the access log at shutdown (ACCESS_LOG)", self.unwritten)

    def _run(self) -> None:
        lines: list[bytes] | None = []
        while lines is not None:
            try:
                lines = self._batches.get(timeout=_RETRY_INTERVAL if self._pending else None)
                self._pending.extend(lines or ())
            except queue.Empty:
                pass
            try:
                self._reopen()
                while self._pending:
                    self._write_some()
                if self._failing:
                    log.warning("The access log is written again (ACCESS_LOG)")
                self._failing = False
            except OSError as error:
                self._stats.access_log_write_errors += 1
                if not self._failing:
                    log.error("Cannot write the access log (ACCESS_LOG): %s. Retrying; its lines are kept", error)
                self._failing = True
        if self._path is not None and self._file >= 0:
            os.close(self._file)

    def _reopen(self) -> None:
        """Open the file, or reopen it if it was renamed or removed."""
        if self._path is None:
            return
        if self._file >= 0:
            opened = os.fstat(self._file)
            try:
                current = os.stat(self._path)
            except FileNotFoundError:
                current = None
            if current is not None and (current.st_dev, current.st_ino) == (opened.st_dev, opened.st_ino):
                if self._begun and os.lseek(self._file, 0, os.SEEK_CUR) != opened.st_size:
                    # Another worker has appended to a line that a full disk cut short, or the file was truncated.
                    self._pending.appendleft(b"\n")
                    self._finished -= 1
                    self._begun = 0
                return
            os.close(self._file)
            self._file = -1
        self._begun = 0
        self._file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)

    def _write_some(self) -> None:
        """Write the first pending lines; a pipe gets at most ``PIPE_BUF`` bytes, which are written atomically."""
        limit = select.PIPE_BUF if stat.S_ISFIFO(os.fstat(self._file).st_mode) else _WRITE_BYTES
        lines: list[bytes] = []
        size = 0
        for line in self._pending:
            if lines and size + len(line) > limit:
                break
            lines.append(line)
            size += len(line)
        data = memoryview(b"".join(lines))[self._begun :]
        try:
            written = os.write(self._file, data)
        except BlockingIOError:
            select.select([], [self._file], [])
            return
        self._begun += written
        while self._pending and self._begun >= (length := len(self._pending[0])):
            self._pending.popleft()
            self._begun -= length
            self._finished += length
