"""The legs of one attempt over vLLM's P2pNcclConnector: what is sent to prefill and decode, and what never twice.

:mod:`disagg_proxy.connectors.p2p_nccl` decides the order of the legs and the outcome.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from disagg_proxy.cluster.instance import Instance, Role
from disagg_proxy.cluster.lease import Lease, Placement
from disagg_proxy.connectors.attempt import Attempt, blame, end_lease
from disagg_proxy.connectors.base import CLIENT_GIVEN_UP, Engines, Request
from disagg_proxy.downstream.refusal import prefill_refusal
from disagg_proxy.errors import (
    EngineDeadline,
    EngineError,
    EngineFailed,
    EngineUnreachable,
    ProxyError,
    Unavailable,
)
from disagg_proxy.openai.prefill_answer import prompt_tokens
from disagg_proxy.openai.prepare import Prepared
from disagg_proxy.openai.usage import CachedTokens, cache_use
from disagg_proxy.request_id import new_request_id
from disagg_proxy.runtime.inline_coroutine import Event
from disagg_proxy.runtime.within import within
from disagg_proxy.upstream import CompleteResponse, ReadUntil, Resend, Response

_ABANDON_FACTOR = 2
"""Prefill timeouts after which the leg of a prefill ends that no client waits for."""


def decode_went_away() -> EngineError:
    return EngineFailed("The decode instance went away during the prefill.")


class NotSent(Exception):
    """Decode cannot have received the request, so another pair may serve it; ``error`` is for when none can."""

    def __init__(self, error: EngineError) -> None:
        super().__init__(error.message)
        self.error = error


class P2pAttempt(Attempt):
    """The legs of one attempt on a pair: prefill, decode, the KV release, and prefill's replay for a stalled decode."""

    def __init__(self, engines: Engines, request: Request, placement: Placement) -> None:
        prefill, lease = placement.prefill, placement.prefill_lease
        if prefill is None or lease is None or prefill.kv is None or placement.decode.kv is None:
            raise ValueError("P2pNcclConnector serves only pairs of instances with KV addresses")
        request_id = new_request_id(prefill.kv, placement.decode.kv, request.record.own_id)
        super().__init__(engines, request, placement, request_id)
        self.prefill_lease: Lease = lease
        self.prepared: Prepared = request.prepared

    async def prefill(self, leg: PrefillLeg | None = None) -> CompleteResponse:
        """Send the one-token body to prefill and read its whole answer.

        Args:
            leg: gets the error of a stalled prefill, while the HTTP request to it runs on.

        Raises:
            EngineError, EngineDeadline: there is no answer.
        """
        lease, registry = self.prefill_lease, self._engines.registry
        registry.kv_compatibility.record_send(lease.instance, self.decode)
        pending = lease.progress.begin(
            registry.now, tokens=self.request.tokens, receiver=self.placement.decode_lease,
            move=None if leg is None else leg.move,
        )  # fmt: skip
        pending.answer = leg
        try:
            answer = (await self._send_prefill(lease, fresh=False)).read()
            if answer.status == 200:
                pending.on_data()
        except ProxyError as error:
            blame(registry, lease.instance, error)
            lease.end(failed=True)
            raise
        except BaseException:
            lease.end()
            raise
        finally:
            pending.end()
        end_lease(registry, lease, self.request.route, answer.status)
        return answer

    def _send_prefill(self, lease: Lease, fresh: bool) -> Awaitable[Response]:
        idle_timeout = self._engines.config.prefill_timeout * _ABANDON_FACTOR
        return self.send_prefill(lease, self.prepared.prefill_body, idle_timeout, None, fresh)

    def keep_for_release(self) -> None:
        """This attempt's KV is, or may come to be, on decode: keep what its release needs, although the request drops
        the bodies that all its attempts share when its answer streams."""
        self.prepared = self.prepared.for_release()

    def count_prompt(self, prefilled: CompleteResponse) -> CachedTokens:
        """Record the prompt's length from prefill's 200. Returns its cache figures."""
        request, record = self.request, self.request.record
        tokens = self.take_count(prompt_tokens(prefilled.body))
        if tokens and self.placement.kv is not None:
            self.placement.kv.resize(request.demand.kv_tokens)
        use = cache_use(request.route, prefilled.body)
        record.cached_tokens = use.cached
        return use

    async def replay(self) -> bool:
        """Send prefill once more with the same id, for a decode that waits for KV which never came; True on its 200.

        Any prefill that can send to decode will do: the KV's key is the id, and the id says where it goes.
        """
        decode, registry, config = self.decode, self._engines.registry, self._engines.config
        model = self.request.prepared.model or decode.default_model
        able = [p for p in registry.serving(Role.PREFILL, model) if registry.kv_compatibility.compatible(p, decode)]
        if not able:
            return False
        first = self.prefill_lease.instance
        prefill: Instance = first if first in able else min(able, key=lambda one: one.draining)
        registry.kv_compatibility.record_send(prefill, decode)
        lease = Lease(registry, prefill)
        # This prefill may stall too.
        deadline = prefill.progress.deadline(config.freeze_after_min, config.freeze_after_max)
        try:
            async with within(deadline):
                answer = await self._send_prefill(lease, fresh=True)
        except (ProxyError, asyncio.TimeoutError):
            return False
        finally:
            lease.end()
        return answer.status == 200

    async def request_decode(self) -> Response:
        """Send the client's own body to decode. Returns when the answer begins, or is whole if it is not streamed.

        Raises:
            NotSent: the instance is gone, or another process than the KV was sent to, or not reached in time.
            EngineError, EngineDeadline: there is no answer.
        """
        if not self.placement.decode_lease.still_ready:
            raise NotSent(decode_went_away())
        streams = self.request.prepared.streams
        self._watch(expects_output=streams)
        until = ReadUntil.BODY_STARTED if streams else ReadUntil.COMPLETE
        try:
            return await self.send_decode(self.request.prepared.decode_body, until=until, resend=Resend.UNSENT)
        except ProxyError as error:
            self.blame_decode(error)
            if isinstance(error, EngineUnreachable):
                self.decoding.end(received=False)
                raise NotSent(error) from error
            raise

    async def send_release(self) -> CompleteResponse:
        """Have decode generate one token under the same id, which frees the KV.

        Raises:
            EngineUnreachable: it cannot have been received.
            ProxyError: it may have been.
        """
        self._watch(expects_output=True)
        try:
            body = self.prepared.kv_release_body
            answer = (await self.send_decode(body, until=ReadUntil.COMPLETE, resend=Resend.NEVER, fresh=True)).read()
            if answer.status == 200:
                self.decoding.on_data()
            return answer
        except ProxyError as error:
            self.decoding.end(received=not isinstance(error, EngineUnreachable))
            self.blame_decode(error)
            raise
        finally:
            self.decoding.end()

    def _watch(self, expects_output: bool) -> None:
        prepared, lease = self.prepared, self.placement.decode_lease
        size = len(prepared.prefill_body) + len(prepared.decode_body)
        self.watch_decode(
            lease.progress.begin(
                self._engines.registry.now, expects_output=expects_output, replay=self.replay, size=size
            )
        )


class PrefillLeg:
    """Prefill's leg, in a coroutine of its own: vLLM never sends the KV of a prefill that was cancelled before it ran.

    Attributes:
        settled: set when the leg has ended, or :attr:`overdue` is known.
        answer, error: how it ended; one of them is set.
        overdue: why the request no longer waits for the leg. expired: because of the prefill timeout. decode_lost:
            because decode failed.
    """

    __slots__ = (
        "_abandoned", "_attempt", "_release", "_seconds", "answer", "decode_lost", "error", "expired", "overdue",
        "settled",
    )  # fmt: skip

    def __init__(self, attempt: P2pAttempt, release: Callable[[P2pAttempt], None], seconds: float) -> None:
        self._attempt = attempt
        self._release = release
        self._seconds = seconds
        self._abandoned = False
        self.decode_lost = False
        self.expired = False
        self.settled = Event()
        self.answer: CompleteResponse | None = None
        self.error: ProxyError | None = None
        self.overdue: EngineError | EngineDeadline | None = None

    def fail(self, error: EngineError | EngineDeadline) -> None:
        """Prefill is stalled, lost or late: the request stops waiting for it."""
        if not self.settled.is_set:
            self.overdue = error
            self.settled.set()

    def move(self) -> None:
        """Prefill or decode is lost, maybe for a moment: the request moves on if another pair can serve it."""
        others, lost = self._attempt.request.others, self._attempt.placement.decode_lease.lost
        failed = self._attempt.decode if lost else self._attempt.prefill_lease.instance
        if not self.settled.is_set and others is not None and others.possible(failed):
            self.decode_lost = lost
            self.fail(decode_went_away())

    def expire(self) -> None:
        """The prefill timeout has expired."""
        self.expired = not self.settled.is_set
        self.fail(EngineDeadline(f"The prefill did not finish within {self._seconds:g} s."))

    def abandon(self) -> None:
        """The request no longer waits. When the leg ends, its KV and the leases of the attempt are released."""
        self._abandoned = self._attempt.detached = True
        self._attempt.keep_for_release()

    async def run(self) -> None:
        """Send the leg. If the request has moved on by its end, release what it leaves behind."""
        attempt, record = self._attempt, self._attempt.request.record
        record.on_prefill_sent()
        try:
            self.answer = await attempt.prefill(self)
        except ProxyError as error:
            self.error = error
        finally:
            if self.answer is None:
                if self.error is None:
                    self.error = Unavailable(CLIENT_GIVEN_UP, retry_after=1)
                self._settle()
        if self.answer is not None:
            if self.overdue is None:
                record.on_prefill_response()
            self._settle()

    def _settle(self) -> None:
        if not self._abandoned:
            self.settled.set()
            return
        attempt, answer = self._attempt, self.answer
        if answer is not None and _did_its_work(attempt, answer):
            if self.overdue is None:
                attempt.count_prompt(answer)
            if self.overdue is not None and attempt.placement.decode_lease.process_ended:
                attempt.release()
            else:
                self._release(attempt)
        else:
            attempt.release()


def _did_its_work(attempt: P2pAttempt, answer: CompleteResponse) -> bool:
    """Whether prefill computed the prompt, so that decode has its KV."""
    request = attempt.request
    try:
        return prefill_refusal(request.route, answer, request.prepared.choices, request.record.request_id) is None
    except EngineFailed:
        return False
