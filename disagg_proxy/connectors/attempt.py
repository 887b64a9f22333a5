"""One attempt of a request on its instances: sends the legs, and keeps the leases, the breaker and the record right.

The order of the legs, and what follows from each outcome, is the connector's.
"""

from __future__ import annotations

from collections.abc import Awaitable

from disagg_proxy.cluster.instance import Instance
from disagg_proxy.cluster.lease import Lease
from disagg_proxy.cluster.placement import Placement
from disagg_proxy.cluster.progress import PendingResponse
from disagg_proxy.connectors.base import Engines, Request
from disagg_proxy.connectors.outlier import blame, end_lease
from disagg_proxy.downstream.refusal import ClientResponse, refusal
from disagg_proxy.downstream.reply import Reply
from disagg_proxy.downstream.response_stream import ResponseStream
from disagg_proxy.errors import ProxyError
from disagg_proxy.http1.headers import forwarded_response_headers
from disagg_proxy.openai.request_id_rewriter import RequestIdRewriter
from disagg_proxy.openai.usage import UsageRepair
from disagg_proxy.request_id import RequestId
from disagg_proxy.upstream import CompleteResponse, ReadUntil, Resend, Response


class Attempt:
    """The legs of one attempt.

    Args:
        request_id: under which both engines get it, and what the client sees in its place.

    Attributes:
        detached: other work holds the placement and gives it back.
    """

    def __init__(self, engines: Engines, request: Request, placement: Placement, request_id: RequestId) -> None:
        self.request = request
        self.placement = placement
        self.id = request_id
        self.detached = False
        self._engines = engines
        self._decoding: PendingResponse | None = None
        lines = b"%sx-request-id: %s\r\n" % (request.headers, request_id.internal.encode())
        trace = request.record.trace
        self._prefill_headers = lines if trace is None else lines + trace.prefill_lines
        self._decode_headers = lines if trace is None else lines + trace.decode_lines
        request.record.put_on(placement.prefill, placement.decode, request_id.public)

    @property
    def decode(self) -> Instance:
        """The decode instance."""
        return self.placement.decode

    @property
    def decoding(self) -> PendingResponse:
        """The wait for decode, once its leg is sent."""
        if self._decoding is None:
            raise RuntimeError("decode has not been sent a request")
        return self._decoding

    # -- the legs

    def send_prefill(
        self, lease: Lease, body: bytes, idle_timeout: float, pending: PendingResponse | None, fresh: bool = False
    ) -> Awaitable[Response]:
        """Send prefill's leg and wait for its whole answer. It is idempotent: a kept connection that closes is made up
        for by a fresh one.

        Raises:
            EngineError, EngineDeadline: there is no answer.
        """
        return self._engines.upstream().request(
            "POST", lease.instance, self.request.route.path, headers=self._prefill_headers, body=body,
            idle_timeout=idle_timeout, leg="prefill", fresh=fresh, until=ReadUntil.COMPLETE,
            resend=Resend.NEVER if fresh else Resend.REUSED, pending=pending,
        )  # fmt: skip

    def send_decode(
        self,
        body: bytes,
        *,
        until: ReadUntil,
        resend: Resend,
        resend_body: bytes | None = None,
        fresh: bool = False,
    ) -> Awaitable[Response]:
        """Send decode's leg; :attr:`decoding` must have begun.

        Raises:
            EngineError, EngineDeadline: there is no answer.
        """
        return self._engines.upstream().request(
            "POST", self.decode, self.request.route.path, headers=self._decode_headers, body=body,
            idle_timeout=self._engines.config.decode_timeout, leg="decode", fresh=fresh, until=until, resend=resend,
            resend_body=resend_body, pending=self._decoding,
        )  # fmt: skip

    def watch_decode(self, pending: PendingResponse) -> PendingResponse:
        """``vigil`` is the wait for decode from now on."""
        self._decoding = pending
        return pending

    def blame_decode(self, error: ProxyError) -> None:
        """Decode's leg ended with ``error``."""
        blame(self._engines.registry, self.decode, error)

    def take_count(self, tokens: int) -> int:
        """Prefill counted so many prompt tokens, 0 where it does not say; from now on they are the request's size."""
        request = self.request
        request.record.prompt_tokens = tokens or None
        if tokens:
            request.demand.kv_bytes = self._engines.sizes.counted(request.route, request.prepared, tokens)
        return tokens

    # -- the answer

    async def deliver(
        self, reply: Reply, answer: Response, rewriter: RequestIdRewriter, repair: UsageRepair, public: RequestId | None
    ) -> None:
        """Stream decode's 200 to the client, until its end or until the client leaves.

        Raises:
            EngineError, EngineDeadline: decode broke before the first byte of the body.
        """
        try:
            # Until the first byte a failure can still have a status of its own.
            await answer.wait_until(ReadUntil.BODY_STARTED)
        except BaseException:
            answer.close()
            raise
        pending, record = self.decoding, self.request.record
        pending.heard()
        stream = ResponseStream(answer, rewriter, repair, pending, record)
        record.begin_answer(True)
        reply.send(ClientResponse(200, forwarded_response_headers(answer.headers, public), stream))
        await stream.finished
        self.end_decode(failed=False if stream.complete else None if reply.gone else True)

    def refuse(self, reply: Reply, answer: CompleteResponse, leg: str) -> None:
        """Deliver the instance's own refusal.

        Raises:
            EngineFailed: it is not the client's mistake.
        """
        outcome = refusal(answer, leg, self.id, bool(self._engines.config.engine_api_key))
        self.request.record.refused(answer.status)
        reply.send(outcome)

    # -- ends

    def end_decode(self, *, failed: bool | None = None, received: bool = True) -> None:
        """The decode leg is over; only the first call counts.

        The arguments are those of :meth:`Lease.end` and :meth:`PendingResponse.end`.
        """
        if self._decoding is not None:
            self._decoding.end(received=received)
        self.placement.decode_lease.end(failed=failed)
        self.placement.loaded()

    def end_refused(self, status: int) -> None:
        """Decode answered, but not 200."""
        end_lease(self._engines.registry, self.placement.decode_lease, self.request.route, status)
        self.end_decode()

    def release(self) -> None:
        """Give back every place; harmless for those that were given back before."""
        self.end_decode()
        self.placement.release()
