"""The bytes of decode's answer on their way to the client. Free of JSON and of SSE framing.

Two filters sit in the way, each a search in the bytes that have just arrived: the internal id is replaced, and the
cached tokens of `usage` are set right. Backpressure is the reader's: nothing is read ahead of it but what the
sockets hold.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing

from disagg_proxy.errors import ProxyError, StreamCut
from disagg_proxy.protocol.redact import IdHider
from disagg_proxy.protocol.usage import UsageRepair
from disagg_proxy.upstream import Answer

log = logging.getLogger(__name__)


class Relay:
    """One body. Iterate it once; :meth:`close` gives up what is left.

    Args:
        first_byte: called once, when the first byte is there.
        ended: called once, with whether the body came to its end by itself.
    """

    def __init__(
        self,
        answer: Answer,
        hider: IdHider,
        repair: UsageRepair,
        first_byte: Callable[[], None],
        ended: Callable[[bool], None],
    ) -> None:
        self._answer = answer
        self._hider = hider
        self._repair = repair
        self._first_byte = first_byte
        self._ended = ended
        self.begun = False
        self._over = False
        self._letting_go = False

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self._chunks()

    async def _chunks(self) -> AsyncIterator[bytes]:
        feed, repair = self._hider.feed, self._repair.feed
        try:
            async for piece in self._answer.chunks():
                if not self.begun:
                    self.begun = True
                    self._first_byte()
                piece = repair(feed(piece))
                if piece:
                    yield piece
            rest = repair(self._hider.end()) + self._repair.end()
            if rest:
                yield rest
        except ProxyError as error:
            if self._over:
                # Given up: nobody waits for more, and this must not look like the body's proper end.
                raise asyncio.CancelledError from None
            self._end(complete=False)
            raise StreamCut(error.message) from error
        self._end(complete=True)

    async def close_once_begun(self, grace: float) -> None:
        """Read on, for nobody, until the first byte proves that the engine has the request, then :meth:`close`.

        Only the first call does so: a client that leaves as decode's headers come is noticed from both sides.

        Args:
            grace: seconds after which to close in any case.
        """
        if self._letting_go:
            return
        self._letting_go = True
        try:
            await asyncio.wait_for(self._until_begun(), grace)
        except asyncio.TimeoutError:
            log.info("A decode that nobody waits for had not begun after %.0f s and is aborted", grace)
        finally:
            self.close()

    async def _until_begun(self) -> None:
        try:
            async with aclosing(self._answer.chunks()) as pieces:
                async for _ in pieces:
                    return
        except ProxyError:
            return

    def close(self) -> None:
        """Give up: the instance sees its connection close and aborts the request. Harmless at the end."""
        if not self._over:
            self._answer.close()
            self._end(complete=False)

    def _end(self, complete: bool) -> None:
        if not self._over:
            self._over = True
            self._ended(complete)
