"""What is sent to the two instances of one request: prefill, decode, and the drain. One call is one leg.

This module keeps the retry rule (docs/retry.md) and the count of legs on each instance; the order of the legs, and
what follows from each outcome, is the flight's.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Awaitable, Callable
from typing import Any

from disagg_proxy.cluster.instance import Instance, Role
from disagg_proxy.cluster.lease import KvClaim, Lease
from disagg_proxy.cluster.pairing import Pair
from disagg_proxy.cluster.pulse import Vigil
from disagg_proxy.cluster.registry import Registry
from disagg_proxy.config import Config
from disagg_proxy.errors import EngineDisconnected, EngineError, EngineFailed, EngineUnreachable, ProxyError
from disagg_proxy.flight.verdict import blame, end_lease
from disagg_proxy.observe.trace import Trace
from disagg_proxy.protocol.fields import Route
from disagg_proxy.protocol.p2p_nccl import new_request_id
from disagg_proxy.protocol.prepare import Prepared
from disagg_proxy.steps import Steps
from disagg_proxy.upstream import Answer, Enough, Upstream, WholeAnswer
from disagg_proxy.within import within

log = logging.getLogger(__name__)

_ABANDON_FACTOR = 2
"""A prefill that nobody waits for any more is given up after this many prefill timeouts: its instance is stuck."""


class NotAsked(Exception):
    """Decode cannot have received the request, so another pair may serve it; ``error`` is for when none can."""

    def __init__(self, error: EngineError) -> None:
        super().__init__(error.message)
        self.error = error


def decode_went_away() -> EngineError:
    """What the client gets for it when no other pair can serve the request."""
    return EngineFailed("The decode instance went away during the prefill.")


class Legs:
    """The legs of one try of a request, on one pair. Creating it takes its places on both instances.

    Args:
        tokens: estimated length of the prompts, in all.
        kv_bytes: what their KV is estimated to take on decode.
        trace: what both instances are told of the trace that the request belongs to.

    Attributes:
        when_prefill_stands: notified, while this leg waits for prefill, that no answer is to be expected: with the
            error when prefill is frozen, with None when prefill or decode is lost, which may be temporary. The leg
            itself continues: a prefill that was sent is never cancelled.
        abandoned: whether the request goes on elsewhere; then only the KV is left to see to.
        frozen: why decode was given up, None while it was not.
    """

    def __init__(
        self,
        upstream: Upstream,
        registry: Registry,
        config: Config,
        pair: Pair,
        route: Route,
        headers: bytes,
        prepared: Prepared,
        tokens: int = 0,
        kv_bytes: int = 0,
        trace: Trace | None = None,
    ) -> None:
        if pair.prefill.kv is None or pair.decode.kv is None:
            raise ValueError("an instance without a KV address cannot be in a pair")
        self.id = new_request_id(pair.prefill.kv, pair.decode.kv)
        self.route = route
        self.prepared = prepared
        self._upstream = upstream
        self._registry = registry
        self._config = config
        self._tokens = tokens
        lines = b"%sx-request-id: %s\r\n" % (headers, self.id.internal.encode())
        self._prefill_headers = lines if trace is None else lines + trace.prefill_lines
        self._decode_headers = lines if trace is None else lines + trace.decode_lines
        self.pair = pair
        self.prefill_lease = Lease(registry, pair.prefill, pair.prefill_tokens)
        self.decode_lease = Lease(registry, pair.decode, pair.decode_tokens)
        self.kv = KvClaim(registry, pair.prefill, pair.decode, kv_bytes)
        self.when_prefill_stands: Callable[[Legs, ProxyError | None], None] | None = None
        self.abandoned = False
        self.frozen: ProxyError | None = None
        self._decoding: Vigil | None = None
        self._waiting: Steps | asyncio.Task[Any] | None = None

    @property
    def decoding(self) -> Vigil:
        """The wait for decode, once it is asked."""
        if self._decoding is None:
            raise RuntimeError("decode has not been asked")
        return self._decoding

    def end_decode(self, *, failed: bool | None = None, received: bool = True) -> None:
        """The decode leg is over; only the first call counts. Arguments: :meth:`Lease.end`, :meth:`Vigil.end`."""
        self._waiting = None
        if self._decoding is not None:
            self._decoding.end(received=received)
        self.decode_lease.end(failed=failed)
        self.kv.release()

    def end_refused(self, status: int) -> None:
        """Decode answered, but not 200."""
        end_lease(self._registry, self.decode_lease, self.route, status)
        self.end_decode()

    def give_back(self) -> None:
        """Give up every place; harmless for those that were given back before."""
        self.prefill_lease.end()
        self.end_decode()

    def keep_for_release(self) -> None:
        """The request moves to another pair while this try's KV is, or may come to be, on decode: keep what its
        release needs, whatever becomes of the bodies that the tries share."""
        self.prepared = self.prepared.for_release()

    async def prefill(self) -> WholeAnswer:
        """Send the one-token body to prefill and read its whole answer.

        A reset on a kept connection is tried once more on a fresh one: vLLM 0.21 closes connections after some
        400s without saying so, and a prefill may be repeated with its id.

        Raises:
            EngineError, EngineDeadline: there is no answer.
        """
        lease = self.prefill_lease
        self._registry.exchange.sends_towards(self.pair.prefill, self.pair.decode)
        vigil = lease.pulse.begin(
            self._registry.now,
            tokens=self._tokens,
            give_up=self._prefill_stands,
            receiver=self.decode_lease,
            move=self._prefill_stands,
        )
        try:
            whole = (await self._prefilled()).read()
            if whole.status == 200:
                vigil.heard()
        except ProxyError as error:
            blame(self._registry, self.pair.prefill, error)
            lease.end(failed=True)
            raise
        except BaseException:
            lease.end()
            raise
        finally:
            vigil.end()
            self.when_prefill_stands = None
        end_lease(self._registry, lease, self.route, whole.status)
        return whole

    def _prefill_stands(self, error: ProxyError | None = None) -> None:
        if self.when_prefill_stands is not None:
            self.when_prefill_stands(self, error)

    async def _prefilled(self) -> Answer:
        try:
            return await self._send_prefill(self.pair.prefill, fresh=False)
        except EngineDisconnected as error:
            if not error.reused and not error.unsent:
                raise
        return await self._send_prefill(self.pair.prefill, fresh=True)

    def _send_prefill(self, instance: Instance, fresh: bool) -> Awaitable[Answer]:
        return self._upstream.request(
            "POST",
            instance,
            self.route.path,
            headers=self._prefill_headers,
            body=self.prepared.prefill_body,
            silence=self._config.prefill_timeout * _ABANDON_FACTOR,
            leg="prefill",
            fresh=fresh,
            enough=Enough.WHOLE,
        )

    async def replay(self) -> bool:
        """Prefill once more with the same id, for a decode that waits for KV which never came; True when it was done.

        Any prefill that can send to decode will do: the KV's name is the id, and the id says where it goes.
        """
        decode, registry = self.pair.decode, self._registry
        model = self.prepared.model or decode.default_model
        able = [p for p in registry.serving(Role.PREFILL, model) if registry.exchange.possible(p, decode)]
        if not able:
            return False
        prefill = self.pair.prefill if self.pair.prefill in able else min(able, key=lambda one: one.draining)
        registry.exchange.sends_towards(prefill, decode)
        lease = Lease(registry, prefill)
        # It may be the next one that stands still.
        deadline = prefill.pulse.deadline(self._config.freeze_after_min, self._config.freeze_after_max)
        try:
            async with within(deadline):
                answer = await self._send_prefill(prefill, fresh=True)
        except (ProxyError, asyncio.TimeoutError):
            return False
        finally:
            lease.end()
        return answer.status == 200

    async def decode(self) -> Answer:
        """Send the client's own body to decode and wait for the answer's beginning; all of it when it is not streamed.

        Repeated only when the request cannot have been received. When decode is found to stand still the wait is
        cancelled, with ``frozen`` set.

        Raises:
            NotAsked: the instance is gone, or another process than the KV was prefilled for, or not reached in time.
            EngineError, EngineDeadline: there is no answer.
        """
        if not self.decode_lease.same_process:
            raise NotAsked(decode_went_away())
        self._watch_decode(telling=self.prepared.streams)
        try:
            return await self._begun()
        except ProxyError as error:
            blame(self._registry, self.decode_lease.instance, error)
            if isinstance(error, EngineUnreachable):
                self.decoding.end(received=False)
                raise NotAsked(error) from error
            raise

    async def _begun(self) -> Answer:
        enough = Enough.BEGUN if self.prepared.streams else Enough.WHOLE
        try:
            return await self._send_decode(self.prepared.decode_body, enough, fresh=False)
        except EngineDisconnected as error:
            if not error.unsent:
                raise
        return await self._send_decode(self.prepared.decode_body, enough, fresh=True)

    def _watch_decode(self, telling: bool) -> None:
        self._waiting = Steps.running or asyncio.current_task()
        self._decoding = self.decode_lease.pulse.begin(
            self._registry.now,
            telling=telling,
            give_up=self._decode_stands,
            replay=self.replay,
            size=len(self.prepared.prefill_body) + len(self.prepared.decode_body),
        )

    def _decode_stands(self, error: ProxyError) -> None:
        self.frozen = error
        if self._waiting is not None:
            self._waiting.cancel()

    def _send_decode(self, body: bytes, enough: Enough, fresh: bool) -> Awaitable[Answer]:
        return self._upstream.request(
            "POST",
            self.decode_lease.instance,
            self.route.path,
            headers=self._decode_headers,
            body=body,
            silence=self._config.decode_timeout,
            leg="decode",
            fresh=fresh,
            enough=enough,
        )

    async def send_drain(self) -> WholeAnswer:
        """Ask decode for one token under the same id.

        Raises:
            EngineUnreachable: it cannot have been received.
            ProxyError: it may have been.
        """
        instance = self.decode_lease.instance
        self._watch_decode(telling=True)
        try:
            answer = (await self._send_decode(self.prepared.drain_body, Enough.WHOLE, fresh=True)).read()
            if answer.status == 200:
                self.decoding.heard()
            return answer
        except ProxyError as error:
            self.decoding.end(received=not isinstance(error, EngineUnreachable))
            blame(self._registry, instance, error)
            raise
        except asyncio.CancelledError:
            if self.frozen is None:
                raise
            _uncancel()
            raise self.frozen from None
        finally:
            self.decoding.end()


def _uncancel() -> None:
    """The task was cancelled to end one wait, and goes on."""
    task = asyncio.current_task()
    if task is not None and sys.version_info >= (3, 11):
        task.uncancel()
