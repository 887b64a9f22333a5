"""Streams the body of decode's response to the client, without parsing JSON or SSE.

Two filters run over the bytes as they arrive, each a search: the internal request id is replaced, and the cached tokens
of ``usage`` are corrected. Backpressure: while the client does not read, decode's connection is not read either.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import ClassVar, Final, Protocol

from disagg_proxy.cluster.progress import PendingResponse
from disagg_proxy.errors import EngineDeadline, EngineError, EngineFailed, StreamCut
from disagg_proxy.openai.error_answer import ErrorAnswer, error_event
from disagg_proxy.openai.prefill_answer import prompt_tokens
from disagg_proxy.openai.usage import UsageRepair, output_tokens
from disagg_proxy.request_id import RequestIdRewriter
from disagg_proxy.runtime.inline_coroutine import Event
from disagg_proxy.telemetry.request_record import RequestRecord
from disagg_proxy.upstream import Response

_READ_AHEAD = 64 * 1024
"""Bytes that are buffered for an iterating reader; then decode's connection is paused."""

_LINE_END: Final = ord("\n")

_MAX_FINAL_EVENT: Final = 64
"""Bytes of the last event of a stream, which has no token counts: ``[DONE]``, ``message_stop``."""


_MAX_LINE: Final = 4096
"""Bytes that are kept of an event that arrives in several reads, as the last one of /v1/responses: it repeats the whole
answer, with usage behind it."""

_ENDED_WITH_ERROR: Final = "The %s instance ended its stream with an error."


def _discard(data: bytes) -> None:
    """Stands for the sink's ``write`` before :meth:`ResponseStream.pipe_to` and after the end."""


def _count_events(record: RequestRecord, write: Callable[[bytes], None]) -> Callable[[bytes], None]:
    """``write`` that also counts events, which end with an empty line; text of a model has its line ends escaped."""

    def counted(data: bytes) -> None:
        record.stream_events = (record.stream_events or 0) + data.count(b"\n\n")
        write(data)

    return counted


class StreamSink(Protocol):
    """Receives a stream, and calls its ``pause`` and ``resume``. Either :meth:`end` or :meth:`cut` is called last."""

    @property
    def write_framed(self) -> Callable[[bytes], None] | None:
        """Takes the next bytes as HTTP/1.1 chunks with their framing; None if the sink needs them without framing."""

    def write(self, data: bytes) -> None:
        """The next bytes without framing, never empty."""

    def end(self) -> None:
        """The body is complete."""

    def cut(self, cause: StreamCut) -> None:
        """The body ended early."""


class ResponseStream:
    """The body of one response, piped to a sink or iterated, once. :meth:`close` gives up the rest.

    Args:
        answer: decode's response.
        rewriter: replaces the internal request id.
        repair: corrects the cached tokens of ``usage``.
        pending: tracks decode's progress: whether the client waits for decode, and each read of the body.
        record: counts the chunks and tokens.

    Attributes:
        finished: set when the body has ended in any way.
        complete: whether it is complete; valid once finished.
        error: the error that decode ended it with, None if there is none; valid once finished.
    """

    __slots__ = (
        "_answer",
        "_finished",
        "_last",
        "_line",
        "_paused",
        "_pending",
        "_progress",
        "_record",
        "_repair",
        "_rewriter",
        "_sink",
        "_unseen",
        "_write",
        "_write_framed",
        "complete",
        "error",
        "finished",
    )  # fmt: skip

    def __init__(
        self,
        answer: Response,
        rewriter: RequestIdRewriter,
        repair: UsageRepair,
        pending: PendingResponse,
        record: RequestRecord,
    ) -> None:
        self._answer = answer
        self._rewriter = rewriter
        self._repair = repair
        self._pending = pending
        self._progress = pending.progress
        self._record = record
        self._unseen = record.first_sample
        self._last = self._line = b""
        self._sink: StreamSink | None = None
        self._write: Callable[[bytes], None] = _discard
        self._write_framed: Callable[[bytes], None] | None = None
        self._finished = False
        self._paused = False
        self.complete = False
        self.error: ErrorAnswer | None = None
        self.finished = Event()

    # -- decode's side

    def feed(self, data: bytes) -> None:
        """Filter and pass on what has just arrived.

        Runs for every token. The common case is therefore decided here by the filters' own rules, because each further
        call would cost as much as all the rest. ``find`` instead of ``in``, which first tries to convert the operand to
        an integer and formats an exception.
        """
        if self._finished:
            return
        self._count(data)
        rewriter, repair = self._rewriter, self._repair
        if data[-1] == _LINE_END and not rewriter.held and not repair.held and data.find(repair.key) < 0:
            self._write(data.replace(rewriter.internal, rewriter.public) if rewriter.internal else data)
            return
        if data[-1] != _LINE_END:
            self._line = (self._line + data)[-_MAX_LINE:]
        data = repair.feed(rewriter.feed(data))
        if data:
            self._write(data)

    def feed_chunks(self, chunks: bytes) -> bool:
        """:meth:`feed` for complete chunks of complete lines with their framing.

        The framing stays valid: an internal id and its replacement have the same length, and no id spans two lines.

        Returns:
            False, with nothing taken, if the filters need the bytes without framing.
        """
        rewriter, repair = self._rewriter, self._repair
        write_framed = self._write_framed
        if write_framed is None or rewriter.held or repair.held or chunks.find(repair.key) >= 0:
            return False
        # As _count, without its call.
        self._progress.outputs += 1
        self._unseen -= 1
        if not self._unseen:
            self._unseen = self._record.sample_gap()
        if len(chunks) > _MAX_FINAL_EVENT:
            self._last = chunks
        write_framed(chunks.replace(rewriter.internal, rewriter.public) if rewriter.internal else chunks)
        return True

    def _count(self, data: bytes) -> None:
        self._progress.outputs += 1
        self._unseen -= 1
        if not self._unseen:
            self._unseen = self._record.sample_gap()
        if len(data) > _MAX_FINAL_EVENT:
            self._last = data

    def end(self) -> None:
        """Decode's response is complete."""
        sink = self._sink
        if self._finished or sink is None:
            return
        rest = self._repair.feed(self._rewriter.end()) + self._repair.end()
        if rest:
            sink.write(rest)
        self.error = error_event(self._last)
        # Before the sink's end, which ends the record.
        if self.error is None:
            self._record.complete()
        else:
            self._record.cut(EngineFailed(_ENDED_WITH_ERROR % self._answer.leg))
        self._finish(complete=self.error is None)
        sink.end()

    def fail(self, error: EngineError | EngineDeadline) -> None:
        """Decode's response ended early."""
        sink = self._sink
        if self._finished or sink is None:
            return
        self._record.cut(error)
        self._finish(complete=False)
        sink.cut(StreamCut(error))

    # -- the client's side

    def pipe_to(self, sink: StreamSink) -> None:
        """Write to ``sink`` until its ``end`` or ``cut`` is called."""
        self._sink, self._write, self._write_framed = sink, sink.write, sink.write_framed
        if self._record.stream_events is not None:
            self._write = _count_events(self._record, self._write)
            if self._write_framed is not None:
                self._write_framed = _count_events(self._record, self._write_framed)
        self._pending.waiting = not self._paused
        self._answer.pipe_to(self)

    def pause(self) -> None:
        """The client does not read: stop reading from decode, and stop waiting for it, until :meth:`resume`."""
        self._paused = True
        self._record.skip_gap()
        self._pending.waiting = False
        self._answer.pause()

    def resume(self) -> None:
        """The client reads again."""
        if self._paused:
            self._paused = False
            if not self._finished:
                self._pending.resume_wait()
                self._answer.resume()

    def __aiter__(self) -> AsyncIterator[bytes]:
        """Iterate over the body.

        Raises:
            StreamCut: decode's response ended early.
        """
        sink = _IteratorSink(self)
        self.pipe_to(sink)
        return sink

    def close(self) -> None:
        """Close decode's connection, so that it aborts the request. No effect after the end."""
        if not self._finished:
            self._finish(complete=False)
            self._answer.close()

    def _finish(self, complete: bool) -> None:
        self._finished = True
        # Break the reference cycles, so that a finished stream is freed without the garbage collector.
        self._write, self._sink, self._write_framed = _discard, None, None
        record, last = self._record, self._line + self._last
        self._line = self._last = b""
        record.end_of_stream(self._unseen)
        record.output_tokens = output_tokens(last)
        if record.prompt_tokens is None:
            record.prompt_tokens = prompt_tokens(last) or None
        self.complete = complete
        self.finished.set()


class _IteratorSink:
    """A sink that buffers the body for an asynchronous iterator."""

    write_framed: ClassVar[None] = None

    def __init__(self, stream: ResponseStream) -> None:
        self._stream = stream
        self._chunks: deque[bytes] = deque()
        self._buffered = 0
        self._cut: StreamCut | None = None
        self._ended = False
        self._changed = asyncio.Event()

    def write(self, data: bytes) -> None:
        self._chunks.append(data)
        self._buffered += len(data)
        if self._buffered > _READ_AHEAD:
            self._stream.pause()
        self._changed.set()

    def end(self) -> None:
        self._ended = True
        self._changed.set()

    def cut(self, cause: StreamCut) -> None:
        self._cut = cause
        self.end()

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        """Everything that has arrived since the previous call.

        Raises:
            StreamCut: the body ended early.
        """
        while not self._chunks and not self._ended:
            self._changed.clear()
            await self._changed.wait()
        if self._chunks:
            data = b"".join(self._chunks)
            self._chunks.clear()
            self._buffered = 0
            self._stream.resume()
            return data
        if self._cut is not None:
            raise self._cut
        raise StopAsyncIteration
