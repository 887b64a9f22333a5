"""What the connectors share whose decode computes the prompt where it gets no KV for it (``disagg_kv``, ``nixl``,
``moriio``).

    prefill refused or failed      decode computes; the client notices nothing
    prefill busy (429, 503)        another pair, else 503: decodes do not take over the work of prefills that are busy
    decode refused (4xx)           the client gets that answer
    decode busy (429, 503)         another decode, else 503
    decode failed (5xx, broken, unreachable, stalled) before the first byte    another decode, bounded attempts
    decode breaks in mid-answer    the client's connection is cut
    client leaves                  both legs are aborted at once; vLLM and the connector free everything

Nothing can stall here, a leg may be cancelled at any time, and no KV needs a release by decode: what is not fetched
expires on prefill.
"""

from __future__ import annotations

import logging

from disagg_proxy.cluster.lease import Placement
from disagg_proxy.cluster.progress import PendingResponse
from disagg_proxy.connectors.attempt import Attempt, blame, end_lease, is_failure
from disagg_proxy.connectors.base import Engines, Failure, Request
from disagg_proxy.downstream.refusal import BUSY_STATUSES, ClientResponse, engine_busy, prefill_refusal
from disagg_proxy.downstream.reply import Reply
from disagg_proxy.errors import EngineBusy, EngineDeadline, EngineDisconnected, EngineError, ProxyError
from disagg_proxy.http1.headers import forwarded_response_headers, is_stream
from disagg_proxy.openai.error_answer import begins_with_error
from disagg_proxy.openai.fields import RESPONSES
from disagg_proxy.openai.prefill_answer import error_message, prompt_tokens
from disagg_proxy.openai.responses_stream import has_output
from disagg_proxy.openai.usage import UsageRepair, cache_use, output_tokens, repair_usage
from disagg_proxy.request_id import NoRewriting, RequestId
from disagg_proxy.upstream import CompleteResponse, ReadUntil, Resend, Response

log = logging.getLogger(__name__)


class RecomputingAttempt(Attempt):
    """One attempt: a connector's subclass orders the legs in :meth:`serve`. Creating it drops the placement's prefill
    where this request cannot use its KV.

    Args:
        fits: whether the KV of all its prompts can be handed over.

    Attributes:
        repair: corrects the cached tokens in the usage of decode's answer, once prefill's answer says how many.
    """

    def __init__(self, engines: Engines, request: Request, placement: Placement, fits: bool) -> None:
        if request.prepared.prefill_answers or not fits:
            placement.drop_prefill()
        record = request.record
        name = record.request_id
        if record.client_id is None and record.tries:
            # The engines of an earlier attempt may still have its request.
            name = f"{name}-{record.tries + 1}"
        super().__init__(engines, request, placement, RequestId(name, name))
        if placement.prefill is None and not request.prepared.streams:
            # Nothing shows when the prompt is computed.
            placement.computed()
        self.repair = UsageRepair(request.route, None)
        self._refusal: CompleteResponse | None = None
        self._prefill_busy: EngineBusy | None = None
        self._accepted = False

    async def run(self, reply: Reply) -> Failure | None:
        """The attempt from its start to the release of all leases: see
        :class:`disagg_proxy.connectors.base.Connector`."""
        try:
            error = await self._failure(reply)
            # Nothing is awaited while an exception is handled (tests/test_compilable.py).
            return None if error is None else await self._outcome(reply, error)
        finally:
            self.release()

    async def _failure(self, reply: Reply) -> EngineError | EngineDeadline | None:
        try:
            await self.serve(reply)
        except (EngineError, EngineDeadline) as error:
            return error
        return None

    async def _outcome(self, reply: Reply, error: EngineError | EngineDeadline) -> Failure | None:
        """What becomes of an attempt that failed before the first byte."""
        prefill = self.placement.prefill
        if prefill is not None and error is self._prefill_busy:
            self.placement.decode_lease.end()
            return Failure(error, prefill, prefill=True)
        if await self._refused_by_both(error):
            assert self._refusal is not None
            self.placement.decode_lease.end(failed=None)
            self.refuse(reply, self._refusal, "prefill")
            return None
        self.placement.decode_lease.end(failed=None if isinstance(error, EngineBusy) else True)
        return Failure(error, self.decode)

    async def serve(self, reply: Reply) -> None:
        """The legs and the answer, in the order that the protocol needs.

        Raises:
            EngineError, EngineDeadline: decode failed before the client has seen anything.
        """
        raise NotImplementedError

    async def prefill(self, body: bytes) -> CompleteResponse | None:
        """Send prefill's leg. Returns its 200, or None when it failed or refused.

        Raises:
            EngineBusy: it is busy, so that another pair is to serve the request.
        """
        lease, registry, record = self.placement.prefill_lease, self._engines.registry, self.request.record
        if lease is None:
            return None
        record.on_prefill_sent()
        pending = lease.progress.begin(registry.now, tokens=self.request.tokens)
        pending.prefill = True
        answer: CompleteResponse | None = None
        try:
            received = (await self.send_prefill(lease, body, self._engines.config.prefill_timeout, pending)).read()
            if received.status == 200:
                pending.on_data()
                if is_stream(received.headers):
                    # A refusal from within the engine is an event of a stream that began with 200.
                    choices = self.request.prepared.choices
                    received = prefill_refusal(self.request.route, received, choices, record.request_id) or received
            answer = received
        except ProxyError as error:
            blame(registry, lease.instance, error)
            lease.end(failed=True)
        finally:
            pending.end()
            if answer is None:
                lease.end()
        if answer is None:
            return None
        end_lease(registry, lease, self.request.route, answer.status)
        if answer.status in BUSY_STATUSES:
            self._prefill_busy = engine_busy(answer, "prefill")
            raise self._prefill_busy
        if answer.status != 200:
            if not is_failure(self.request.route, answer.status):
                self._refusal = answer
                self._count_disagreement()
            return None
        record.on_prefill_response()
        self.placement.computed()
        self.take_count(prompt_tokens(answer.body))
        self.repair.use = use = cache_use(self.request.route, answer.body)
        record.cached_tokens = use.cached
        return answer

    def watch(self, waiting: bool = True) -> PendingResponse:
        """Begin the wait for decode.

        Args:
            waiting: whether decode has all it needs to answer; else :meth:`PendingResponse.listen` starts the clock.
        """
        pending = self.placement.decode_lease.progress.begin(
            self._engines.registry.now, tokens=self.request.tokens, expects_output=self.request.prepared.streams
        )
        pending.waiting = waiting
        return self.watch_decode(pending)

    async def request_decode(self, body: bytes, resend_body: bytes | None = None) -> Response:
        """Send decode's leg after :meth:`watch`. Returns when its stream begins, or its unstreamed answer is complete.

        Args:
            resend_body: sent instead where the request may have been received once, on a kept connection that closed;
                None: ``body`` again.

        Raises:
            EngineError, EngineDeadline: there is no answer. Another decode may serve it: the client has seen nothing.
        """
        self.request.record.on_decode_sent()
        until = ReadUntil.BODY_STARTED if self.request.prepared.streams else ReadUntil.COMPLETE
        try:
            answer = await self.send_decode(body, until=until, resend=Resend.REUSED, resend_body=resend_body)
        except ProxyError as error:
            self.blame_decode(error)
            raise
        if self.request.route is RESPONSES and answer.status == 200 and is_stream(answer.headers):
            # Its first events say nothing of the engine; until it has begun, another decode may serve the request.
            try:
                await answer.wait_for_body(has_output)
            except ProxyError as error:
                self.blame_decode(error)
                raise
        if answer.status == 200 and not begins_with_error(answer.beginning):
            self._accepted = True
            self._count_disagreement()
        return answer

    async def answer(self, reply: Reply, answer: Response) -> None:
        """Deliver decode's answer: its 200, or its refusal.

        Raises:
            EngineError, EngineDeadline: decode failed, or broke before the first byte of the body.
        """
        refused = await self.refusal(answer)
        if refused is not None:
            # The KV stays claimed: prefill still holds it, and gets a RELEASE at the end of the attempt.
            end_lease(self._engines.registry, self.placement.decode_lease, self.request.route, refused.status)
            self.refuse(reply, refused, self.leg)
            return
        request, record = self.request, self.request.record
        if is_stream(answer.headers):
            self.placement.release_kv()
            self.placement.computed()
            request.prepared.forget_bodies()
            await self.deliver(reply, answer, NoRewriting(), self.repair, None)
            return
        whole = await answer.read_all()
        self.decoding.on_data()
        self.placement.release_kv()
        await self.prompt_counted(whole)
        record.on_first_byte(False)
        record.output_tokens = output_tokens(whole.body)
        if record.prompt_tokens is None:
            record.prompt_tokens = prompt_tokens(whole.body) or None
        record.complete()
        self.end_decode(failed=False)
        reply.send(
            ClientResponse(
                200,
                forwarded_response_headers(answer.headers, None),
                repair_usage(request.route, whole.body, self.repair.use),
            )
        )

    async def _refused_by_both(self, error: ProxyError) -> bool:
        """Whether decode's ``error`` stands for a refusal that prefill has answered properly.

        A stream of /v1/responses has begun before the engine checks the request, and vLLM breaks it off
        (``openai/responses_stream.py``). Without this a client could have healthy instances ejected that way.
        """
        if self.request.route is not RESPONSES or not isinstance(error, EngineDisconnected):
            return False
        await self.prefill_settled()
        return self._refusal is not None

    async def prefill_settled(self) -> None:
        """Wait a moment for prefill's answer, where it is not awaited before decode's."""

    async def prompt_counted(self, whole: CompleteResponse) -> None:
        """Wait until :attr:`repair` knows the cached tokens, if they are to be corrected in ``whole``."""

    def _count_disagreement(self) -> None:
        """Count a request that prefill refused and decode accepted, once both are known, and log the first one.

        Either the engines differ, or prefill's body breaks a rule of vLLM's that decode's does not: one token, no
        stream (:func:`disagg_proxy.openai.fields.for_prefill`).
        """
        prefill, refusal = self.placement.prefill, self._refusal
        if prefill is None or refusal is None or not self._accepted:
            return
        self._refusal = None
        if not prefill.prefills_refused:
            # What follows may quote the prompt (pydantic's "input").
            reason = error_message(refusal.body).partition("input")[0][:200]
            log.warning(
                "%s refuses requests to %s that %s accepts, which then computes their prompts: status %d, %s",
                prefill, self.request.route.path, self.decode, refusal.status, reason, extra=self.log_fields,
            )  # fmt: skip
        prefill.prefills_refused += 1
