"""The body of decode's answer on its way to the client. Knows neither JSON nor SSE framing.

Two filters run over it, each a search in the bytes that have just arrived: the internal request id is replaced, and the
cached tokens of ``usage`` are corrected. Backpressure: while the client does not read, decode's connection is not read.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import ClassVar, Final, Protocol

from disagg_proxy.cluster.progress import PendingResponse
from disagg_proxy.errors import EngineDeadline, EngineError, StreamCut
from disagg_proxy.openai.prefill_answer import prompt_tokens
from disagg_proxy.openai.usage import UsageRepair, output_tokens
from disagg_proxy.request_id import RequestIdRewriter
from disagg_proxy.runtime.inline_coroutine import Event
from disagg_proxy.telemetry.request_record import RequestRecord
from disagg_proxy.upstream import Response

_PULLED_AHEAD = 64 * 1024
"""Bytes that wait for a reader that pulls."""

_LINE_END: Final = ord("\n")

_END: Final = 64
"""Bytes that the last event of a stream may have, which tells of no tokens: ``[DONE]``, ``message_stop``."""


def _discard(piece: bytes) -> None:
    """The outlet before there is one, and after the end."""


class StreamSink(Protocol):
    """Where a relay's bytes go. It calls the relay's ``pause`` and ``resume``."""

    @property
    def pass_on(self) -> Callable[[bytes], None] | None:
        """Takes the next bytes as chunks of HTTP/1.1 with their framing; None where they go on without it."""

    def write(self, piece: bytes) -> None:
        """The next bytes, never none."""

    def end(self) -> None:
        """The body came to its end."""

    def cut(self, cause: StreamCut) -> None:
        """It did not, and nothing more comes."""


class ResponseStream:
    """One body, piped into an outlet or iterated, once; :meth:`close` gives up the rest.

    Args:
        vigil: notified when decode is waited for, and of each byte that arrives.
        record: counts the chunks.

    Attributes:
        finished: set when the body is over.
        complete: whether it came to its proper end; valid once it is finished.
    """

    __slots__ = (
        "_answer",
        "_hider",
        "_last",
        "_outlet",
        "_over",
        "_pass_on",
        "_paused",
        "_pending",
        "_progress",
        "_record",
        "_repair",
        "_unseen",
        "_write",
        "complete",
        "finished",
    )  # fmt: skip

    def __init__(
        self,
        answer: Response,
        hider: RequestIdRewriter,
        repair: UsageRepair,
        pending: PendingResponse,
        record: RequestRecord,
    ) -> None:
        self._answer = answer
        self._hider = hider
        self._repair = repair
        self._pending = pending
        self._progress = pending.progress
        self._record = record
        self._unseen = record.first_look
        self._last = b""
        self._outlet: StreamSink | None = None
        self._write: Callable[[bytes], None] = _discard
        self._pass_on: Callable[[bytes], None] | None = None
        self._over = False
        self._paused = False
        self.complete = False
        self.finished = Event()

    # -- decode's side

    def feed(self, piece: bytes) -> None:
        """What has just arrived. Runs for every token: what holds for most of them is decided here, by the rules that
        the filters state, since each further call costs as much as all the rest of it. ``find`` and not ``in``, which
        first tries whether what is looked for is a number, and formats an error."""
        if self._over:
            return
        self._count(piece)
        hider, repair = self._hider, self._repair
        if piece[-1] == _LINE_END and not hider.held and not repair.held and piece.find(repair.key) < 0:
            self._write(piece.replace(hider.internal, hider.public) if hider.internal else piece)
            return
        piece = repair.feed(hider.feed(piece))
        if piece:
            self._write(piece)

    def feed_chunks(self, chunks: bytes) -> bool:
        """The same for chunks of whole lines with their framing, which stays right: an id and what replaces it are
        equally long, and neither is torn where a line ends. False where they must come without it."""
        hider, repair = self._hider, self._repair
        pass_on = self._pass_on
        if pass_on is None or hider.held or repair.held or chunks.find(repair.key) >= 0:
            return False
        self._count(chunks)
        pass_on(chunks.replace(hider.internal, hider.public) if hider.internal else chunks)
        return True

    def _count(self, piece: bytes) -> None:
        self._progress.outputs += 1
        self._unseen -= 1
        if not self._unseen:
            self._unseen = self._record.look()
        if len(piece) > _END:
            self._last = piece

    def end(self) -> None:
        """Decode's answer is whole."""
        outlet = self._outlet
        if self._over or outlet is None:
            return
        rest = self._repair.feed(self._hider.end()) + self._repair.end()
        if rest:
            outlet.write(rest)
        # Before the outlet's end, which closes the record.
        self._record.complete()
        self._finish(complete=True)
        outlet.end()

    def broke(self, error: EngineError | EngineDeadline) -> None:
        """Decode's answer broke off."""
        outlet = self._outlet
        if self._over or outlet is None:
            return
        self._record.cut(error)
        self._finish(complete=False)
        outlet.cut(StreamCut(error.message))

    # -- the client's side

    def pour(self, outlet: StreamSink) -> None:
        """Write into ``outlet`` from now on, until its ``end`` or ``cut`` is called."""
        self._outlet, self._write, self._pass_on = outlet, outlet.write, outlet.pass_on
        self._pending.waiting = not self._paused
        self._answer.pour(self)

    def pause(self) -> None:
        """The client is behind: until :meth:`resume` decode is not waited for."""
        self._paused = True
        self._record.disturbed()
        self._pending.waiting = False
        self._answer.pause()

    def resume(self) -> None:
        """The client has caught up."""
        if self._paused:
            self._paused = False
            if not self._over:
                self._pending.resume_wait()
                self._answer.resume()

    def __aiter__(self) -> AsyncIterator[bytes]:
        """For a reader that pulls.

        Raises:
            StreamCut: decode broke.
        """
        pieces = _Pulled(self)
        self.pour(pieces)
        return pieces

    def close(self) -> None:
        """Give up: the instance sees its connection close and aborts the request. Harmless at the end."""
        if not self._over:
            self._finish(complete=False)
            self._answer.close()

    def _finish(self, complete: bool) -> None:
        self._over = True
        # What is over shall go without the garbage collector, which looks for cycles.
        self._write, self._outlet, self._pass_on = _discard, None, None
        record, last, self._last = self._record, self._last, b""
        record.passed(self._unseen)
        record.output_tokens = output_tokens(last)
        if record.prompt_tokens is None:
            record.prompt_tokens = prompt_tokens(last) or None
        self.complete = complete
        self.finished.set()


class _Pulled:
    """An outlet that holds pieces until they are asked for."""

    pass_on: ClassVar[None] = None

    def __init__(self, relay: ResponseStream) -> None:
        self._relay = relay
        self._pieces: deque[bytes] = deque()
        self._held = 0
        self._cut: StreamCut | None = None
        self._over = False
        self._more = asyncio.Event()

    def write(self, piece: bytes) -> None:
        self._pieces.append(piece)
        self._held += len(piece)
        if self._held > _PULLED_AHEAD:
            self._relay.pause()
        self._more.set()

    def end(self) -> None:
        self._over = True
        self._more.set()

    def cut(self, cause: StreamCut) -> None:
        self._cut = cause
        self.end()

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        """What has come since the last call.

        Raises:
            StreamCut: there is no proper end.
        """
        while not self._pieces and not self._over:
            self._more.clear()
            await self._more.wait()
        if self._pieces:
            found = b"".join(self._pieces)
            self._pieces.clear()
            self._held = 0
            self._relay.resume()
            return found
        if self._cut is not None:
            raise self._cut
        raise StopAsyncIteration
