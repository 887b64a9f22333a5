"""One attempt of a request on its instances: sends the legs and updates leases, circuit breaker and record.

The connector decides the order of the legs, and what follows from each outcome.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable

from disagg_proxy.cluster.instance import Instance
from disagg_proxy.cluster.lease import Lease, Placement
from disagg_proxy.cluster.progress import PendingResponse
from disagg_proxy.cluster.registry import Registry
from disagg_proxy.connectors.base import Engines, Request
from disagg_proxy.downstream.refusal import BUSY_STATUSES, ClientResponse, refusal
from disagg_proxy.downstream.reply import Reply
from disagg_proxy.downstream.response_stream import ResponseStream
from disagg_proxy.errors import EngineBusy, EngineError, EngineUnreachable, ProxyError
from disagg_proxy.http1.headers import ResponseHeaders, forwarded_response_headers
from disagg_proxy.openai.error_answer import begins_with_error, error_in
from disagg_proxy.openai.fields import MESSAGES, Route
from disagg_proxy.openai.usage import UsageRepair
from disagg_proxy.request_id import RequestId, RequestIdRewriter, WholeEvents
from disagg_proxy.upstream import CompleteResponse, ReadUntil, Resend, Response

log = logging.getLogger(__name__)


class Attempt:
    """The legs of one attempt.

    Args:
        request_id: the id that both engines get, and the one that the client sees instead.

    Attributes:
        leg: name of the leg that generates the answer, for messages: the role of its engine.
        detached: other work has taken over the placement and releases it.
    """

    def __init__(self, engines: Engines, request: Request, placement: Placement, request_id: RequestId) -> None:
        self.request = request
        self.placement = placement
        self.id = request_id
        self.detached = False
        self.leg = placement.decode.role.value
        self._engines = engines
        self._decoding: PendingResponse | None = None
        lines = b"%sx-request-id: %s\r\n" % (request.headers, request_id.internal.encode())
        trace = request.record.trace
        self._prefill_headers = lines if trace is None else lines + trace.prefill_lines
        self._decode_headers = lines if trace is None else lines + trace.decode_lines
        request.record.on_attempt(placement.prefill, placement.decode, request_id.public)
        request.record.forecast = placement.forecast

    @property
    def log_fields(self) -> dict[str, str]:
        """Fields for log lines about the request."""
        return {"request_id": self.request.record.request_id}

    @property
    def decode(self) -> Instance:
        """The instance that generates the answer."""
        return self.placement.decode

    @property
    def decoding(self) -> PendingResponse:
        """The pending answer of decode, once :meth:`watch_decode` was called."""
        if self._decoding is None:
            raise RuntimeError("decode has not been sent a request")
        return self._decoding

    # -- the legs

    def send_prefill(
        self, lease: Lease, body: bytes, idle_timeout: float, pending: PendingResponse | None, fresh: bool = False
    ) -> Awaitable[Response]:
        """Send prefill's leg and wait for its complete answer. It is idempotent: after a kept connection closed it is
        sent once more over a fresh one.

        Args:
            idle_timeout: seconds that may pass without a byte from prefill.
            fresh: use a new connection, once.

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
        """Send decode's leg, after :meth:`watch_decode`. Arguments: :meth:`disagg_proxy.upstream.Upstream.request`.

        Raises:
            EngineError, EngineDeadline: there is no answer.
        """
        return self._engines.upstream().request(
            "POST", self.decode, self.request.route.path, headers=self._decode_headers, body=body,
            idle_timeout=self._engines.config.decode_timeout, leg=self.leg, fresh=fresh, until=until, resend=resend,
            resend_body=resend_body, pending=self._decoding,
        )  # fmt: skip

    def watch_decode(self, pending: PendingResponse) -> PendingResponse:
        """Make ``pending`` the wait for decode."""
        self._decoding = pending
        return pending

    def blame_decode(self, error: ProxyError) -> None:
        """Report that decode's leg ended with ``error``."""
        blame(self._engines.registry, self.decode, error)

    def take_count(self, tokens: int) -> int:
        """Use prefill's count of prompt tokens as the request's size; 0: prefill reports none. Returns ``tokens``."""
        request = self.request
        request.record.prompt_tokens = tokens or None
        if tokens:
            request.demand.kv_tokens = self._engines.sizes.record_count(request.route, request.prepared, tokens)
        return tokens

    # -- the answer

    async def refusal(self, answer: Response) -> CompleteResponse | None:
        """Decode's answer as a refusal, if its status is not 200 or it is nothing but an error; None for any other.

        Raises:
            EngineError, EngineDeadline: decode broke before the first byte of the body, or within the refusal.
        """
        if answer.status != 200:
            return await answer.read_all()
        await answer.wait_until(ReadUntil.BODY_STARTED)
        if not begins_with_error(answer.beginning):
            return None
        status, body = error_in((await answer.read_all()).body)
        return CompleteResponse(status, ResponseHeaders([(b"content-type", b"application/json")]), body)

    async def deliver(
        self, reply: Reply, answer: Response, rewriter: RequestIdRewriter, repair: UsageRepair, public: RequestId | None
    ) -> None:
        """Stream decode's 200 to the client until it ends or the client leaves.

        Args:
            public: hides the internal id in the headers; None where it is the public one.

        Raises:
            EngineError, EngineDeadline: decode broke before the first byte of the body.
        """
        try:
            # Before the first byte a failure can still get its own status.
            await answer.wait_until(ReadUntil.BODY_STARTED)
        except BaseException:
            answer.close()
            raise
        pending, record = self.decoding, self.request.record
        pending.on_data()
        if self._engines.config.stream_error_event:
            rewriter = WholeEvents(rewriter)
        stream = ResponseStream(answer, rewriter, repair, pending, record)
        record.on_first_byte(True)
        reply.send(ClientResponse(200, forwarded_response_headers(answer.headers, public), stream))
        await stream.finished
        if stream.error is not None:
            status, said = stream.error
            log.warning(
                "The %s leg ended with an error in its stream, status %d: %.300r", self.leg, status, said,
                extra=self.log_fields,
            )  # fmt: skip
            self.end_refused(status)
        self.end_decode(failed=False if stream.complete else None if reply.gone else True)

    def refuse(self, reply: Reply, answer: CompleteResponse, leg: str) -> None:
        """Deliver an instance's answer other than 200.

        Raises:
            EngineBusy, EngineFailed: the status is not the client's fault.
        """
        outcome = refusal(answer, leg, self.request.record, self.id, bool(self._engines.config.engine_api_key))
        self.request.record.refused(answer.status)
        reply.send(outcome)

    # -- ends

    def end_decode(self, *, failed: bool | None = None, received: bool = True, keeps_kv: bool = False) -> None:
        """End the decode leg. Further calls have no effect.

        Args:
            failed, received: those of :meth:`Lease.end` and :meth:`PendingResponse.end`.
            keeps_kv: decode still holds the KV, which a release frees.
        """
        if self._decoding is not None:
            self._decoding.end(received=received)
        self.placement.decode_lease.end(failed=failed)
        if not keeps_kv:
            self.placement.release_kv()

    def end_refused(self, status: int) -> None:
        """End the decode leg after an answer with ``status``, not 200."""
        end_lease(self._engines.registry, self.placement.decode_lease, self.request.route, status)
        self.end_decode()

    def release(self) -> None:
        """Give back all leases that are still held."""
        self.end_decode()
        self.placement.release()


# -- passive outlier detection: what the end of a leg says of its instance


def is_failure(route: Route, status: int) -> bool:
    """Whether an instance that answers ``status`` failed, so that another one may do better."""
    if status == 501:
        # No other instance of the same version supports what the request asks for (RFC 9110, 15.6.2).
        return False
    # vLLM 0.17 and newer answer /v1/messages with 500 also to a client's mistake.
    return status >= 500 and status not in BUSY_STATUSES and not (route is MESSAGES and status == 500)


def end_lease(registry: Registry, lease: Lease, route: Route, status: int) -> None:
    """Give back a lease after an answer with ``status``.

    Every version of vLLM answers some malformed requests with 500, and a client could have a healthy instance ejected
    that way. So a 500 triggers a probe, which finds a dead engine, but does not open the circuit breaker. A busy
    instance has neither failed nor shown that it can serve.
    """
    if status in BUSY_STATUSES:
        registry.rejected(lease.instance)
    lease.end(failed=None if status in BUSY_STATUSES else is_failure(route, status), certain=status != 500)
    if status == 500:
        registry.recheck(lease.instance)


def blame(registry: Registry, instance: Instance, error: ProxyError) -> None:
    """Report a failed leg. A refused connection takes the instance out of service at once; other errors trigger a
    probe, since a busy server may time out too."""
    if isinstance(error, EngineUnreachable) and error.refused:
        registry.connection_refused(instance, "its HTTP port cannot be reached")
    elif isinstance(error, EngineError) and not isinstance(error, EngineBusy):
        registry.recheck(instance)
