"""The two legs of a request whose decode computes by itself what it gets no KV for, or decode's leg alone.

What they say about the KV, and whether decode waits for prefill's answer, is the protocol's
(:mod:`disagg_proxy.protocol.handover`). Nothing can stall, a leg may be cancelled at any time, and no KV needs a
drain: what nobody fetches expires.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Generic, TypeVar

from disagg_proxy.cluster.instance import Instance
from disagg_proxy.cluster.lease import KvClaim, Lease
from disagg_proxy.cluster.pairing import Alone, Pair
from disagg_proxy.cluster.pulse import Vigil
from disagg_proxy.cluster.registry import Registry
from disagg_proxy.config import Config
from disagg_proxy.errors import EngineDisconnected, ProxyError
from disagg_proxy.flight.outcome import prefill_refusal
from disagg_proxy.flight.verdict import blame, end_lease, is_failure
from disagg_proxy.observe.trace import Trace
from disagg_proxy.protocol.fields import Route
from disagg_proxy.protocol.handover import Handover
from disagg_proxy.protocol.headers import is_stream
from disagg_proxy.protocol.p2p_nccl import RequestId
from disagg_proxy.protocol.prefill_answer import error_message
from disagg_proxy.protocol.prepare import Prepared
from disagg_proxy.upstream import Answer, Enough, Upstream, WholeAnswer

log = logging.getLogger(__name__)

Release = Callable[[Instance, str], Awaitable[None]]
"""Told an instance and a transfer id: the transfer is over there."""


T = TypeVar("T")


class _Leg(Generic[T]):
    """What is awaited of an instance, until it comes or the instance turns out to stand still."""

    def __init__(self, work: Coroutine[Any, Any, T]) -> None:
        self._task = asyncio.ensure_future(work)
        self._error: ProxyError | None = None

    def give_up(self, error: ProxyError) -> None:
        """The instance stands still."""
        self._error = error
        self._task.cancel()

    async def result(self) -> T:
        """What came of it. Cancelled, it cancels the work.

        Raises:
            ProxyError: there is nothing, or it was given up.
        """
        try:
            return await self._task
        except asyncio.CancelledError:
            if self._error is None:
                raise
            raise self._error from None


class TogetherLegs:
    """The legs of one try. Creating it takes its places.

    Args:
        release: ends waits for KV.
        handover: how the KV goes over; None: decode computes.
        request_id: what both engines and the client call the request.
        tokens: estimated length of the prompts, in all.
        trace: what both instances are told of the trace that the request belongs to.
    """

    def __init__(
        self,
        upstream: Upstream,
        registry: Registry,
        config: Config,
        release: Release,
        found: Pair | Alone,
        handover: Handover | None,
        route: Route,
        headers: bytes,
        prepared: Prepared,
        request_id: str,
        tokens: int = 0,
        trace: Trace | None = None,
    ) -> None:
        if prepared.prefill_answers or (handover is not None and not handover.fits(prepared)):
            handover = None
        prefill = found.prefill if isinstance(found, Pair) and handover is not None else None
        self.id = RequestId(request_id, request_id)
        self._handover = handover
        self._prefilled: asyncio.Future[bytes | None] | None = None
        if handover is not None and handover.in_order:
            self._prefilled = asyncio.get_running_loop().create_future()
        self.route = route
        self.prepared = prepared
        self.decode = found.decode
        self.prefill = prefill
        self._upstream = upstream
        self._registry = registry
        self._config = config
        self._release = release
        self._tokens = tokens
        lines = b"%sx-request-id: %s\r\n" % (headers, request_id.encode())
        self._headers = {
            "prefill": lines if trace is None else lines + trace.prefill_lines,
            "decode": lines if trace is None else lines + trace.decode_lines,
        }
        self.decode_lease = Lease(registry, found.decode, found.decode_tokens)
        work = found.prefill_tokens if isinstance(found, Pair) else 0
        self.prefill_lease = None if prefill is None else Lease(registry, prefill, work)
        self._kv = None if prefill is None else KvClaim(registry, prefill, found.decode, 0)
        self._settled = prefill is None
        self._decoding: Vigil | None = None
        self._refusal: WholeAnswer | None = None
        self._accepted = False

    @property
    def decoding(self) -> Vigil:
        """The wait for decode, once it is asked."""
        if self._decoding is None:
            raise RuntimeError("decode has not been asked")
        return self._decoding

    def loaded(self) -> None:
        """Decode has what it needs of prefill."""
        if self._kv is not None:
            self._kv.release()

    def end_decode(self, *, failed: bool | None = None) -> None:
        """The decode leg is over; only the first call counts."""
        if self._decoding is not None:
            self._decoding.end()
        self.decode_lease.end(failed=failed)
        self.loaded()

    def give_back(self) -> None:
        """Give up every place; harmless for those that were given back before."""
        if self.prefill_lease is not None:
            self.prefill_lease.end()
        self.end_decode()

    async def ask_prefill(self) -> WholeAnswer | None:
        """Prefill's answer if it did its work; else decode is told to wait no longer. Never raises a ProxyError."""
        lease, handover = self.prefill_lease, self._handover
        if lease is None or handover is None:
            return None
        body = handover.for_prefill(self.prepared.prefill_body)
        leg = _Leg(self._post(lease, body, "prefill", self._config.prefill_timeout))
        vigil = lease.pulse.begin(self._registry.now, tokens=self._tokens, give_up=leg.give_up, receiver=None)
        try:
            whole = await leg.result()
            if whole.status == 200:
                vigil.heard()
                refusal = None
                if is_stream(whole.headers):
                    # A refusal from within the engine is an event of a stream that began with 200.
                    refusal = prefill_refusal(self.route, whole, self.prepared.choices)
                if refusal is None:
                    lease.end(failed=False)
                    self._settle(whole.body)
                    return whole
                whole = refusal
            end_lease(self._registry, lease, self.route, whole.status)
            if whole.status != 429 and not is_failure(self.route, whole.status):
                self._refusal = whole
                self._compare()
        except ProxyError as error:
            blame(self._registry, lease.instance, error)
            lease.end(failed=True)
        finally:
            vigil.end()
            lease.end()
            self._settle()
        if handover.transfer_id:
            await self._release(self.decode, handover.transfer_id)
        return None

    def _settle(self, answer: bytes | None = None) -> None:
        """Prefill has nothing more to do for it: from now on decode is waited for. Only the first call counts."""
        if self._settled:
            return
        self._settled = True
        if self._prefilled is not None and not self._prefilled.done():
            self._prefilled.set_result(answer)
        if self._decoding is not None and not self._decoding.begun:
            self._decoding.since = self._registry.now()
            self._decoding.listen()

    @property
    def unfetched(self) -> bool:
        """Whether prefill may hold, or still compute, KV that decode has not shown to have."""
        return self._kv is not None and not self._kv.released

    async def forget(self) -> None:
        """Nobody will fetch the KV any more: prefill shall not hold it until its deadline. Never raises."""
        handover = self._handover
        if self.prefill is not None and handover is not None and handover.transfer_id:
            await self._release(self.prefill, handover.transfer_id)

    async def _post(self, lease: Lease, body: bytes, leg: str, silence: float) -> WholeAnswer:
        return await (await self._send(lease, body, body, leg, silence, Enough.WHOLE)).whole()

    async def _send(self, lease: Lease, body: bytes, again: bytes, leg: str, silence: float, enough: Enough) -> Answer:
        """``again`` is the body to repeat it with where the first one may have been received."""
        try:
            return await self._send_once(lease, body, leg, silence, enough, fresh=False)
        except EngineDisconnected as error:
            if not error.reused and not error.unsent:
                raise
            body = body if error.unsent else again
        return await self._send_once(lease, body, leg, silence, enough, fresh=True)

    async def _send_once(
        self, lease: Lease, body: bytes, leg: str, silence: float, enough: Enough, fresh: bool
    ) -> Answer:
        return await self._upstream.request(
            "POST",
            lease.instance,
            self.route.path,
            headers=self._headers[leg],
            body=body,
            silence=silence,
            leg=leg,
            fresh=fresh,
            enough=enough,
        )

    async def ask_decode(self, asked: Callable[[], None] = lambda: None) -> Answer:
        """Decode's answer once it has begun, whole when it is not streamed.

        While prefill is at work decode has nothing to do, so only from then on its silence means anything. Where the
        protocol has an order, decode is not even asked before.

        Args:
            asked: told when decode is asked.

        Raises:
            EngineError, EngineDeadline: there is no answer. Another decode may be asked: the client has seen nothing.
        """
        body = again = self.prepared.decode_body
        if self._handover is not None:
            prefilled = None if self._prefilled is None else await self._prefilled
            body = self._handover.for_decode(body, prefilled)
            if prefilled is not None and body is again:
                self._kv_missing()
            again = body if self._handover.again else again
        asked()
        enough = Enough.BEGUN if self.prepared.streams else Enough.WHOLE
        leg = _Leg(self._send(self.decode_lease, body, again, "decode", self._config.decode_timeout, enough))
        self._decoding = vigil = self.decode_lease.pulse.begin(
            self._registry.now, tokens=self._tokens, telling=self.prepared.streams, give_up=leg.give_up
        )
        vigil.waiting = self._settled
        try:
            answer = await leg.result()
        except ProxyError as error:
            blame(self._registry, self.decode, error)
            raise
        if answer.status == 200:
            self._accepted = True
            self._compare()
        # Whoever reads on is told that the connection has ended.
        vigil.give_up = lambda error: answer.close()
        return answer

    def _compare(self) -> None:
        """Count a request that prefill refused and decode accepted, once both are known, and log the first one.

        Either the engines differ, or prefill's body breaks a rule of vLLM's that decode's does not: one token, no
        stream (:func:`disagg_proxy.protocol.fields.for_prefill`).
        """
        prefill, refusal = self.prefill, self._refusal
        if prefill is None or refusal is None or not self._accepted:
            return
        self._refusal = None
        if not prefill.prefills_refused:
            # What follows may quote the prompt (pydantic's "input").
            reason = error_message(refusal.body).partition("input")[0][:200]
            log.warning(
                "%s refuses requests to %s that %s accepts, which then computes their prompts: status %d, %s",
                prefill, self.route.path, self.decode, refusal.status, reason,
            )  # fmt: skip
        prefill.prefills_refused += 1

    def _kv_missing(self) -> None:
        if self.prefill is None:
            return
        if not self.prefill.kv_missing:
            log.warning("%s prefills without saying where the KV is: which KV connector does it run?", self.prefill)
        self.prefill.kv_missing += 1

    def end_refused(self, status: int) -> None:
        """Decode answered, but not 200."""
        end_lease(self._registry, self.decode_lease, self.route, status)
