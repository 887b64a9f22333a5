"""The access log: one line of JSON per generation request, written when the request ends.

docs/monitoring.md lists the fields. A line is formatted on the event loop (a few microseconds); a thread writes the
lines four times a second, so a slow disk or a stalled reader of a pipe does not delay requests. The backlog is bounded:
further lines are dropped, and a line with the number of dropped ones is written.

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

import msgspec

from disagg_proxy.telemetry.request_record import RequestRecord

log = logging.getLogger(__name__)

_FLUSH_INTERVAL = 0.25
"""Seconds between two writes."""

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
    """

    def __init__(self, target: str, worker: int | None = None) -> None:
        self._worker = worker
        self._lines: list[bytes] = []
        self._waiting = 0
        self._dropped = 0
        self._timer: asyncio.TimerHandle | None = None
        self._second = -1
        self._date = ""
        self._out = _Writer(target)

    def take(self, record: RequestRecord) -> None:
        """Append the line of a request that has ended. A sink of the request recorder."""
        if self._waiting + self._out.unwritten > _MAX_BACKLOG:
            self._dropped += 1
            return
        line = self._line(record)
        self._lines.append(line)
        self._waiting += len(line)
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_FLUSH_INTERVAL, self._flush)

    def _line(self, record: RequestRecord) -> bytes:
        unix = record.unix
        second = int(unix)
        if second != self._second:
            self._second = second
            self._date = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))
        fields = {
            "time": f"{self._date}.{int(unix % 1 * 1000):03d}Z",
            "id": record.public_id,
            "client_id": record.client_id,
            "route": record.route,
            "model": record.model,
            "prefill": record.prefill,
            "decode": record.decode,
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
        if self._worker is not None:
            fields["worker"] = self._worker
        return _encode(fields) + b"\n"

    def _flush(self) -> None:
        self._timer = None
        if self._dropped:
            self._lines.append(_encode({"dropped": self._dropped}) + b"\n")
            log.warning(
                "Dropped %d lines of the access log: its target is too slow (ACCESS_LOG)",
                self._dropped,
            )
            self._dropped = 0
        lines, self._lines = self._lines, []
        self._waiting = 0
        self._out.write(lines)

    async def stop(self) -> None:
        """Write the remaining lines, within two seconds."""
        if self._timer is not None:
            self._timer.cancel()
            self._flush()
        await asyncio.get_running_loop().run_in_executor(None, self._out.close)


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1000, 2)


class _Writer:
    """The writer thread.

    Attributes:
        unwritten: bytes passed to :meth:`write` and not yet written or discarded.
    """

    def __init__(self, target: str) -> None:
        self._path = None if target == "-" else target
        self._file = 1 if target == "-" else -1
        self._failed = False
        self._batches: queue.SimpleQueue[list[bytes] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="access-log", daemon=True)
        self._thread.start()
        self.unwritten = 0

    def write(self, lines: list[bytes]) -> None:
        """Queue complete lines for writing, in order."""
        self.unwritten += sum(map(len, lines))
        self._batches.put(lines)

    def close(self) -> None:
        """Block until everything is written, two seconds at most. Not to be called on an event loop."""
        self._batches.put(None)
        self._thread.join(_FLUSH_TIMEOUT)

    def _run(self) -> None:
        while (lines := self._batches.get()) is not None:
            try:
                self._reopen()
                for chunk in self._chunks(lines):
                    self._write(chunk)
                self._failed = False
            except OSError as error:
                if not self._failed:
                    log.error("Cannot write the access log (ACCESS_LOG): %s", error)
                self._failed = True
            self.unwritten -= sum(map(len, lines))
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
                return
            os.close(self._file)
            self._file = -1
        self._file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)

    def _chunks(self, lines: list[bytes]) -> list[bytes]:
        """What to write at once: everything, or for a pipe at most ``PIPE_BUF`` bytes, which are written atomically."""
        if not stat.S_ISFIFO(os.fstat(self._file).st_mode):
            return [b"".join(lines)]
        chunks, chunk = [], b""
        for line in lines:
            if chunk and len(chunk) + len(line) > select.PIPE_BUF:
                chunks.append(chunk)
                chunk = b""
            chunk += line
        return [*chunks, chunk]

    def _write(self, data: bytes) -> None:
        left = memoryview(data)
        while left:
            try:
                left = left[os.write(self._file, left) :]
            except BlockingIOError:
                select.select([], [self._file], [])
