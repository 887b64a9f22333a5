"""vLLM's P2pNcclConnector (0.9.2 - 0.23): prefill first, then decode, both under an id that names both KV addresses.

A decode whose KV never arrives stalls its whole engine, and KV that no decode fetches stays in decode's buffer
indefinitely (docs/retry.md). So each moment at which a request can end has its own outcome:

    prefill refused (4xx)           the client gets that answer; decode is not sent the request
    prefill failed (5xx, broken)    another pair, else 502. Decode is not sent the request, there is no KV to release
    prefill busy (429, 503)         the same, with 503
    prefill timeout                 504; the leg runs on, then its KV is released
    client leaves during prefill    the leg runs on, then its KV is released: a prefill that was sent is never cancelled
    prefill stalled                 another pair, else 504. The leg runs on, then its KV is released
    prefill or decode lost during the prefill    another pair; without one the request waits for its leg
    decode refused (4xx)            the client gets that answer; the KV is released
    decode busy (429, 503)          another pair, else 503. The KV is released
    decode unreachable              another pair, else 502. The KV is released unless decode's process has ended
    decode broken before the first byte    502 and no release: a second decode of an id that was received would stall
    decode's 200 is an error        the error with its own status and no release: the engine may have the KV
    decode stalled                  504 before the first byte of the answer, a cut afterwards
    client leaves before the first byte    decode is aborted once it has loaded the KV: vLLM counts the KV of a request
                                           that is aborted earlier in its buffer indefinitely
    client leaves later             decode is aborted at once: vLLM frees everything
    decode breaks in mid-answer     the client's connection is cut
"""

from __future__ import annotations

import asyncio

from disagg_proxy.cluster.kv_kind import KvKind
from disagg_proxy.cluster.lease import Placement
from disagg_proxy.connectors.attempt import is_failure
from disagg_proxy.connectors.base import (
    Announced,
    Engines,
    Failure,
    Fields,
    KvProtocol,
    Request,
    address_field,
    text_field,
)
from disagg_proxy.connectors.p2p_nccl_legs import NotSent, P2pAttempt, PrefillLeg
from disagg_proxy.connectors.p2p_nccl_loads import LoadWatch, WatchedLeg
from disagg_proxy.downstream.refusal import (
    BUSY_STATUSES,
    ClientResponse,
    forwarded,
    over_context,
    prefill_refusal,
    refusal,
)
from disagg_proxy.downstream.reply import Reply
from disagg_proxy.errors import EngineBusy, EngineError, EngineFailed, EngineFrozen, EngineUnreachable, ProxyError
from disagg_proxy.http1.headers import forwarded_response_headers, is_stream
from disagg_proxy.openai.fields import RESPONSES, Route
from disagg_proxy.openai.prepare import responses_refusal
from disagg_proxy.openai.usage import CachedTokens, UsageRepair, output_tokens, repair_usage
from disagg_proxy.request_id import RequestIdRewriter, hide
from disagg_proxy.runtime.fixed_timeouts import FixedTimeouts
from disagg_proxy.upstream import CompleteResponse, Response

KIND: KvKind = KvKind("p2p_nccl", computes=False)


def read(fields: Fields) -> Announced | None:
    """Read a ping (vLLM 0.9.2 - 0.23, ``p2p_nccl_engine.py``, ``ping``), which names no protocol."""
    if fields.get("protocol", KIND.protocol) != KIND.protocol:
        return None
    return Announced(KIND, address_field(fields, "zmq_address"), text_field(fields, "boot_id", ""))


class P2pNccl:
    """Serves requests on pairs of P2pNcclConnector engines."""

    def __init__(self, engines: Engines) -> None:
        self._engines = engines
        self._releaser = engines.kv_releaser
        self._own_key = bool(engines.config.engine_api_key)
        self._prefill_timeouts = FixedTimeouts(engines.config.prefill_timeout)
        self._loads = LoadWatch(engines)

    async def run(self, request: Request, placement: Placement, reply: Reply) -> Failure | None:
        """One attempt: see :class:`disagg_proxy.connectors.base.Connector`."""
        if request.route is RESPONSES:
            # Sent to a pair of another protocol, while instances of this one registered.
            placement.release()
            raise responses_refusal()
        attempt = P2pAttempt(self._engines, request, placement)
        record, prefill, decode = request.record, attempt.prefill_lease.instance, attempt.decode
        try:
            # 1. Prefill: one token. The leg runs to its end, even if the request does not wait for it.
            timeouts = self._current_timeouts()
            leg = PrefillLeg(attempt, self._release, timeouts.seconds)
            timeout = timeouts.add(leg.expire)
            self._engines.background.leg(leg.run()).start()
            try:
                await leg.settled
            except asyncio.CancelledError:
                leg.abandon()
                raise
            finally:
                timeouts.drop(timeout)
            if leg.overdue is not None:
                leg.abandon()
                if leg.expired:
                    raise leg.overdue
                # A stalled prefill may be blocked by a decode that receives no KV; a lost decode blocks its prefill.
                failed, suspect = (decode, prefill) if leg.decode_lost else (prefill, decode)
                return Failure(leg.overdue, failed, suspect)
            if leg.error is not None:
                if isinstance(leg.error, EngineError):
                    return Failure(leg.error, prefill, prefill=True)
                raise leg.error

            # 2. Verify: a refusal is the client's answer, and prefill's 200 may complete the request.
            prefilled = leg.answer
            assert prefilled is not None
            try:
                refused = prefill_refusal(request.route, prefilled, request.prepared.choices, record.request_id)
                if refused is not None and _leads_to_another(request.route, refused.status):
                    refusal(refused, "prefill", record, attempt.id, self._own_key)
            except (EngineBusy, EngineFailed) as error:
                return Failure(error, prefill, prefill=True)
            if refused is not None:
                attempt.end_decode()
                attempt.refuse(reply, refused, "prefill")
                return None
            use = attempt.count_prompt(prefilled)
            settled = self._settled_by_prefill(attempt, prefilled)
            if settled is not None or not reply.open:
                self._release(attempt)
                if settled is not None:
                    reply.send(settled)
                return None

            # 3. Decode: sent once, never again after it may have been received.
            record.on_decode_sent()
            reply.abortable = False
            watched = None if request.prepared.streams else self._watch_load(attempt, reply)
            try:
                answer = await attempt.request_decode()
            except NotSent as failure:
                reply.abortable = True
                return self._not_sent(attempt, failure.error)
            except ProxyError as error:
                attempt.placement.orphan_kv()
                attempt.end_decode(failed=None if isinstance(error, EngineFrozen) else True)
                raise
            finally:
                if watched is not None:
                    self._loads.end(watched)

            # 4. Answer.
            try:
                rejected = await attempt.refusal(answer)
                if rejected is None:
                    attempt.placement.release_kv()
                    reply.allow_abort()
                    await self._answer(attempt, reply, answer, use)
                    return None
            except ProxyError:
                # No effect where the KV is loaded.
                attempt.placement.orphan_kv()
                attempt.end_decode(failed=True)
                raise
            return self._refused_by_decode(attempt, reply, rejected, received=answer.status == 200)
        finally:
            if not attempt.detached:
                attempt.release()

    # -- prefill

    def _current_timeouts(self) -> FixedTimeouts:
        """Those of the current PREFILL_TIMEOUT; legs that were sent before a reload keep theirs."""
        seconds = self._engines.config.prefill_timeout
        if seconds != self._prefill_timeouts.seconds:
            self._prefill_timeouts = FixedTimeouts(seconds)
        return self._prefill_timeouts

    def _settled_by_prefill(self, attempt: P2pAttempt, prefilled: CompleteResponse) -> ClientResponse | None:
        """The client's answer where prefill's answer already decides it, so that decode only has to release the KV."""
        request, record = attempt.request, attempt.request.record
        if request.prepared.prefill_answers:
            record.on_first_byte(False)
            record.output_tokens = output_tokens(prefilled.body)
            record.complete()
            return forwarded(prefilled, attempt.id)
        refused = over_context(request.route, request.prepared, attempt.decode, prefilled)
        if refused is not None:
            record.refused(refused.status)
        return refused

    # -- decode

    def _watch_load(self, attempt: P2pAttempt, reply: Reply) -> WatchedLeg:
        """Notice that decode has loaded the KV, although its answer shows nothing before its end."""

        def loaded() -> None:
            attempt.placement.release_kv()
            reply.allow_abort()

        return self._loads.begin(attempt.decode, loaded)

    def _not_sent(self, attempt: P2pAttempt, error: EngineError) -> Failure:
        unreachable = isinstance(error, EngineUnreachable)
        gone = attempt.placement.decode_lease.process_ended
        attempt.end_decode(failed=True if unreachable else None, received=False, keeps_kv=not gone)
        if not gone:
            self._release(attempt)
        return Failure(error, attempt.decode)

    def _refused_by_decode(
        self, attempt: P2pAttempt, reply: Reply, refused: CompleteResponse, received: bool
    ) -> Failure | None:
        """Deliver decode's refusal, or let another pair serve the request if decode is busy.

        Args:
            received: it is an error within a 200, so that the engine may have the request and its KV.
        """
        if not received and (refused.status < 500 or refused.status in BUSY_STATUSES):
            attempt.decoding.end(received=False)
            # The API server rejected it before its engine had it, so the KV still waits there.
            self._release(attempt)
        else:
            attempt.placement.orphan_kv()
            attempt.end_refused(refused.status)
        try:
            attempt.refuse(reply, refused, "decode")
        except EngineBusy as error:
            if received:
                raise
            self._engines.registry.rejected(attempt.decode)
            attempt.release()
            return Failure(error, attempt.decode)
        return None

    async def _answer(self, attempt: P2pAttempt, reply: Reply, answer: Response, use: CachedTokens) -> None:
        request, record = attempt.request, attempt.request.record
        if is_stream(answer.headers):
            request.prepared.forget_bodies()
            await attempt.deliver(
                reply, answer, RequestIdRewriter(attempt.id), UsageRepair(request.route, use), attempt.id
            )
            return
        # The repair may change the length, which is sent before the body.
        body = await answer.read_all() if request.prepared.streams else answer.read()
        attempt.decoding.on_data()
        record.on_first_byte(False)
        record.output_tokens = output_tokens(body.body)
        record.complete()
        attempt.end_decode(failed=False)
        headers = forwarded_response_headers(answer.headers, attempt.id)
        reply.send(ClientResponse(200, headers, repair_usage(request.route, hide(attempt.id, body.body), use)))

    def _release(self, attempt: P2pAttempt) -> None:
        """Release the attempt's KV on decode in the background, and its leases afterwards."""
        attempt.detached = True
        attempt.keep_for_release()
        self._engines.background.spawn(self._releaser.release(attempt), "KV release")


def _leads_to_another(route: Route, status: int) -> bool:
    """Whether another prefill may do better than one that answers ``status``."""
    return status in BUSY_STATUSES or is_failure(route, status)


PROTOCOL: KvProtocol = KvProtocol(KIND, P2pNccl, read)
