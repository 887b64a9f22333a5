"""One line of JSON for each generation request when it has ended: docs/monitoring.md lists the fields.

A line is made on the event loop, a few microseconds each, and written by a thread, four times a second, so that a slow
disk or a reader of a pipe that sleeps holds up nobody. What has not been written is bounded; lines beyond are dropped,
and a line says how many.

A file is opened anew when its name leads to another one, or to none, so that it can be rotated by renaming, without a
signal. Several workers append to one file: a write of whole lines with O_APPEND is not torn.
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

_PAUSE = 0.25
"""Seconds between two writes."""

_MOST = 8 * 1024 * 1024
"""Bytes that may wait to be written."""

_END_WITHIN = 2.0
"""Seconds for the last lines."""

_encode = msgspec.json.Encoder().encode


class AccessLog:
    """Takes records from the event loop's thread.

    Args:
        target: a path, or "-" for standard output.
        worker: number of this process, where there are several.
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
        """A request has ended."""
        if self._waiting + self._out.unwritten > _MOST:
            self._dropped += 1
            return
        line = self._line(record)
        self._lines.append(line)
        self._waiting += len(line)
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_PAUSE, self._hand_over)

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

    def _hand_over(self) -> None:
        self._timer = None
        if self._dropped:
            self._lines.append(_encode({"dropped": self._dropped}) + b"\n")
            log.warning("%d lines of the access log were dropped: nothing takes them (ACCESS_LOG)", self._dropped)
            self._dropped = 0
        lines, self._lines = self._lines, []
        self._waiting = 0
        self._out.write(lines)

    async def stop(self) -> None:
        """Write what is left, for a moment at most."""
        if self._timer is not None:
            self._timer.cancel()
            self._hand_over()
        await asyncio.get_running_loop().run_in_executor(None, self._out.end)


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1000, 2)


class _Writer:
    """A thread that writes.

    Attributes:
        unwritten: bytes.
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
        """Whole lines, in their order."""
        self.unwritten += sum(map(len, lines))
        self._batches.put(lines)

    def end(self) -> None:
        """Return when everything is written, or after a moment. Call it from no event loop."""
        self._batches.put(None)
        self._thread.join(_END_WITHIN)

    def _run(self) -> None:
        while (lines := self._batches.get()) is not None:
            try:
                self._open()
                for piece in self._pieces(lines):
                    self._write(piece)
                self._failed = False
            except OSError as error:
                if not self._failed:
                    log.error("The access log cannot be written (ACCESS_LOG): %s", error)
                self._failed = True
            self.unwritten -= sum(map(len, lines))
        if self._path is not None and self._file >= 0:
            os.close(self._file)

    def _open(self) -> None:
        """Have the file that the path leads to now."""
        if self._path is None:
            return
        if self._file >= 0:
            mine = os.fstat(self._file)
            try:
                there = os.stat(self._path)
            except FileNotFoundError:
                there = None
            if there is not None and (there.st_dev, there.st_ino) == (mine.st_dev, mine.st_ino):
                return
            os.close(self._file)
            self._file = -1
        self._file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)

    def _pieces(self, lines: list[bytes]) -> list[bytes]:
        """What is written at once: all, but to a pipe no more than it takes whole when others write too."""
        if not stat.S_ISFIFO(os.fstat(self._file).st_mode):
            return [b"".join(lines)]
        pieces, piece = [], b""
        for line in lines:
            if piece and len(piece) + len(line) > select.PIPE_BUF:
                pieces.append(piece)
                piece = b""
            piece += line
        return [*pieces, piece]

    def _write(self, data: bytes) -> None:
        left = memoryview(data)
        while left:
            try:
                left = left[os.write(self._file, left) :]
            except BlockingIOError:
                select.select([], [self._file], [])
