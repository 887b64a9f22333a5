"""Requests through ASGI after whose response the connection is closed: HTTP/1.0, Connection: close, Expect.

1. **HTTP/1.0 has no chunks** (RFC 9112, 6.1), which uvicorn (0.30 - 0.54) sends to every client. A body without
   Content-Length ends with the connection. A client cannot tell that from a response that is cut (RFC 9112, 8), unless
   the transport reports an error: a cut ends in a TCP reset.
2. **100 (Continue) is sent when the body is read**, not when the head is enough to refuse the request (RFC 9110,
   10.1.1). uvicorn sends it at the first ``receive``, which Quart (0.22) calls before it calls a handler.
3. **A response that precedes the end of the request's body** is followed by a lingering close. uvicorn closes at once,
   which resets the connection under a client that still sends, and destroys the response (RFC 9112, 9.6).
"""

from __future__ import annotations

import socket
import struct
from typing import Any, cast

from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from disagg_proxy.server.asgi.request import SEND_CONTINUE

_LINGER_OPTION = struct.Struct("ii")


class ClosingCycle(RequestResponseCycle):
    """An exchange of which the connection says that it is the last one. Made by :meth:`adopt`."""

    _ends_with_connection = False

    @staticmethod
    def adopt(cycle: Any, expects_continue: bool) -> None:
        """Make a ``ClosingCycle`` of uvicorn's ``RequestResponseCycle``, which has not started."""
        cycle.__class__ = ClosingCycle
        if expects_continue:
            cast(dict[str, Any], cycle.scope)[SEND_CONTINUE] = cycle.send_continue

    def send_continue(self) -> None:
        """Ask for the body."""
        if not (self.response_started or self.disconnected or self.transport.is_closing()):
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    async def send(self, message: Any) -> None:
        """See ASGI. At the end the connection stays open if the request's body is incomplete."""
        if message["type"] == "http.response.start":
            headers = message.get("headers", ())
            if self.scope["http_version"] == "1.0" and all(name.lower() != b"content-length" for name, _ in headers):
                self.chunked_encoding, self._ends_with_connection = False, True
                self._reset_when_closed(True)
        else:
            if self._ends_with_connection:
                # uvicorn compares it with what is sent.
                self.expected_content_length = len(message.get("body", b""))
            if not message.get("more_body", False):
                if self._ends_with_connection:
                    self._reset_when_closed(False)
                if self.more_body:
                    self.keep_alive = True
        await super().send(message)

    def _reset_when_closed(self, reset: bool) -> None:
        """Whether a close resets the connection, because it would cut the body."""
        if not (self.disconnected or self.transport.is_closing()):
            sock = self.transport.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_OPTION.pack(reset, 0))
