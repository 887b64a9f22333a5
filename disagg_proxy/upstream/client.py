"""One HTTP exchange with one instance, over a pool of kept connections, with a typed outcome.

Everything aiohttp raises is translated here into the project's error tree. Messages name the leg, never the
address: clients read them. Retry rule: docs/retry.md.
"""

from __future__ import annotations

import asyncio
import errno
import logging
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import SimpleNamespace

import aiohttp
from multidict import CIMultiDict, CIMultiDictProxy
from yarl import URL

from disagg_proxy.cluster.instance import Instance
from disagg_proxy.errors import EngineDeadline, EngineDisconnected, EngineError, EngineUnreachable

log = logging.getLogger(__name__)

_KEEP_IDLE = 3.0
"""Seconds an idle connection is kept. vLLM's server closes them after 5 s (0.9.2 - 0.23, ``vllm/envs.py``,
VLLM_HTTP_TIMEOUT_KEEP_ALIVE); staying below means that a request is not sent into a closing connection."""

_WARY = 2 * _KEEP_IDLE
"""Seconds without kept connections after an error answer: vLLM closes the connection after some 400s without saying
so. aiohttp takes it back into the pool before the status can be looked at, so it must be left there to grow old."""

_OWN_HEADERS = ("Accept", "Accept-Encoding", "Content-Type", "User-Agent")


@dataclass(frozen=True, slots=True)
class WholeAnswer:
    """An answer that was read to its end."""

    status: int
    headers: CIMultiDictProxy[str]
    body: bytes


class Answer:
    """An answer whose status and headers are there and whose body is still coming."""

    def __init__(self, response: aiohttp.ClientResponse, leg: str) -> None:
        self._response = response
        self._leg = leg
        self.status = response.status
        self.headers = response.headers

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        """The body as it arrives; what arrives together comes together.

        A reader that is cancelled leaves the connection as it is, so that its owner can read on, or :meth:`close`.

        Raises:
            EngineError: the connection broke before the end of the body.
            EngineDeadline: nothing came for longer than the read timeout.
        """
        try:
            async for chunk in self._response.content.iter_any():
                yield chunk
        except (aiohttp.ClientError, asyncio.TimeoutError, OSError) as error:
            self._response.close()
            raise _translate(error, self._leg, reused=False) from error
        self._response.release()

    async def whole(self) -> WholeAnswer:
        """The rest of the body at once. Raises as :meth:`chunks` does; closes the connection when cancelled."""
        try:
            return WholeAnswer(self.status, self.headers, b"".join([chunk async for chunk in self.chunks()]))
        except asyncio.CancelledError:
            self.close()
            raise

    def close(self) -> None:
        """Give up the rest; the instance sees the connection close and aborts its work. Harmless when read."""
        self._response.close()


class Upstream:
    """The pool. Create and close it on the event loop that uses it.

    Args:
        connect_timeout: seconds for one connection attempt.
    """

    def __init__(self, connect_timeout: float) -> None:
        self._connect_timeout = connect_timeout
        self._kept = self._session(aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEP_IDLE))
        self._fresh = self._session(aiohttp.TCPConnector(limit=0, force_close=True))
        self._wary_until: dict[str, float] = {}

    def _session(self, connector: aiohttp.TCPConnector) -> aiohttp.ClientSession:
        trace = aiohttp.TraceConfig()
        trace.on_connection_reuseconn.append(_note_reuse)
        return aiohttp.ClientSession(
            connector=connector,
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
            skip_auto_headers=_OWN_HEADERS,
            trace_configs=[trace],
            max_line_size=65536,
            max_field_size=65536,
        )

    async def close(self) -> None:
        """Close every connection."""
        await self._kept.close()
        await self._fresh.close()

    async def request(
        self,
        method: str,
        instance: Instance,
        path: str,
        *,
        headers: CIMultiDict[str] | Mapping[str, str],
        body: bytes = b"",
        silence: float,
        leg: str,
        fresh: bool = False,
    ) -> Answer:
        """Send one request and wait for status and headers.

        Args:
            silence: seconds that may pass without a byte from the instance, before and within the body.
            leg: word for messages, such as "prefill".
            fresh: use a connection of its own instead of a kept one.

        Raises:
            EngineUnreachable: no connection.
            EngineDisconnected: the connection ended before an answer.
            EngineDeadline: silence.
        """
        seen = SimpleNamespace(reused=False)
        session = self._fresh if fresh or self._is_wary(instance.http.netloc) else self._kept
        try:
            response = await session.request(
                method,
                _url(instance.http.netloc, path),
                data=body or None,
                headers=headers,
                allow_redirects=False,
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=self._connect_timeout, sock_read=silence),
                trace_request_ctx=seen,
            )
        except (aiohttp.ClientError, asyncio.TimeoutError, OSError) as error:
            log.info("%s: %s on the %s leg: %s", instance, type(error).__name__, leg, error)
            raise _translate(error, leg, reused=seen.reused) from error
        if response.status >= 400:
            self._wary_until[instance.http.netloc] = asyncio.get_running_loop().time() + _WARY
        return Answer(response, leg)

    def _is_wary(self, netloc: str) -> bool:
        """Whether a kept connection to that endpoint may be a dead one."""
        until = self._wary_until.get(netloc)
        if until is None:
            return False
        if asyncio.get_running_loop().time() < until:
            return True
        del self._wary_until[netloc]
        return False


@lru_cache(maxsize=4096)
def _url(netloc: str, path: str) -> URL:
    return URL.build(scheme="http", authority=netloc, path=path, encoded=True)


async def _note_reuse(
    session: aiohttp.ClientSession, context: SimpleNamespace, params: aiohttp.TraceConnectionReuseconnParams
) -> None:
    if context.trace_request_ctx is not None:
        context.trace_request_ctx.reused = True


def _translate(error: Exception, leg: str, *, reused: bool) -> EngineError | EngineDeadline:
    """Foreign exception to outcome. The order matters: aiohttp's types overlap."""
    if isinstance(error, (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError)):
        refused = isinstance(error, aiohttp.ClientConnectorError) and error.os_error.errno == errno.ECONNREFUSED
        return EngineUnreachable(f"The {leg} instance could not be reached.", refused=refused)
    if isinstance(error, asyncio.TimeoutError):
        return EngineDeadline(f"The {leg} instance said nothing within its deadline.")
    # Raised by a write into a transport that was closed before: the request, or its last part, never left.
    unsent = isinstance(error, aiohttp.ClientConnectionResetError)
    return EngineDisconnected(
        f"The {leg} instance closed the connection without an answer.", unsent=unsent, reused=reused
    )
