"""The bytes of decode's answer on their way to the client. Free of JSON and of SSE framing.

Two filters sit in the way, each a search in the bytes that have just arrived: the internal id is replaced, and the
cached tokens of `usage` are set right. Backpressure is the reader's: nothing is read ahead of it but the first piece
and what the sockets hold.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

from disagg_proxy.cluster.pulse import Vigil
from disagg_proxy.errors import ProxyError, StreamCut
from disagg_proxy.protocol.redact import IdHider, NoHiding
from disagg_proxy.protocol.usage import UsageRepair
from disagg_proxy.upstream import Answer


class Relay:
    """One body: :meth:`begin`, then iterate once; :meth:`close` gives up what is left.

    Args:
        vigil: told when decode is waited for, and what comes.
        ended: called once, with whether the body came to its end by itself.
    """

    def __init__(
        self,
        answer: Answer,
        hider: IdHider | NoHiding,
        repair: UsageRepair,
        vigil: Vigil,
        ended: Callable[[bool], None],
    ) -> None:
        self._answer = answer
        self._pieces = answer.chunks()
        self._hider = hider
        self._repair = repair
        self._vigil = vigil
        self._ended = ended
        self._first = b""
        self._over = False

    async def begin(self) -> None:
        """Wait for the first piece; until then a failure can still be told to the client as one.

        Raises:
            EngineError, EngineDeadline: it does not come. The answer is closed then.
        """
        try:
            async for piece in self._pieces:
                self._first = piece
                self._vigil.heard()
                break
        except BaseException:
            self._answer.close()
            raise

    async def __aiter__(self) -> AsyncIterator[bytes]:
        """
        Raises:
            StreamCut: decode broke.
        """
        feed, repair = self._hider.feed, self._repair.feed
        heard, listen = self._vigil.heard, self._vigil.listen
        piece = repair(feed(self._first))
        try:
            if piece:
                yield piece
            listen()
            async for piece in self._pieces:
                heard()
                piece = repair(feed(piece))
                if piece:
                    yield piece
                listen()
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

    def cut(self) -> None:
        """Break it off in the middle: the reader gets :class:`StreamCut`."""
        self._answer.close()

    def close(self) -> None:
        """Give up: the instance sees its connection close and aborts the request. Harmless at the end."""
        if not self._over:
            self._answer.close()
            self._end(complete=False)

    def _end(self, complete: bool) -> None:
        if not self._over:
            self._over = True
            self._ended(complete)
