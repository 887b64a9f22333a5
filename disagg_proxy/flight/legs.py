"""What is sent to the two instances of one request: prefill, decode, and the drain. One call is one leg.

This module keeps the retry rule (docs/retry.md) and the count of legs on each instance; the order of the legs, and
what follows from each outcome, is the flight's.
"""

from __future__ import annotations

import asyncio
import logging

from multidict import CIMultiDict

from disagg_proxy.cluster.instance import Instance, State
from disagg_proxy.cluster.lease import KvClaim, Lease
from disagg_proxy.cluster.pairing import Pair
from disagg_proxy.cluster.registry import Registry
from disagg_proxy.config import Config
from disagg_proxy.errors import EngineDisconnected, EngineError, EngineFailed, EngineUnreachable, ProxyError
from disagg_proxy.protocol.fields import MESSAGES, Route
from disagg_proxy.protocol.p2p_nccl import new_request_id
from disagg_proxy.protocol.prepare import Prepared
from disagg_proxy.stats import Drains
from disagg_proxy.upstream import Answer, Upstream, WholeAnswer

log = logging.getLogger(__name__)

_ABANDON_FACTOR = 2
"""A prefill that nobody waits for any more is given up after this many prefill timeouts: its instance is stuck."""


_DRAIN_PAUSES = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 0.0)
"""Seconds between the tries of a drain whose instance cannot be reached."""


class NotAsked(Exception):
    """Decode cannot have received the request, so another pair may serve it; ``error`` is for when none can."""

    def __init__(self, error: EngineError) -> None:
        super().__init__(error.message)
        self.error = error


class Legs:
    """The legs of one try of a request, on one pair. Creating it takes its places on both instances.

    Args:
        kv_bytes: what the prompt's KV is estimated to take on decode.
    """

    def __init__(
        self,
        upstream: Upstream,
        registry: Registry,
        config: Config,
        drains: Drains,
        pair: Pair,
        route: Route,
        headers: CIMultiDict[str],
        prepared: Prepared,
        kv_bytes: int = 0,
    ) -> None:
        if pair.prefill.kv is None or pair.decode.kv is None:
            raise ValueError("an instance without a KV address cannot be in a pair")
        self.id = new_request_id(pair.prefill.kv, pair.decode.kv)
        self.route = route
        self.prepared = prepared
        self._upstream = upstream
        self._registry = registry
        self._config = config
        self._drains = drains
        self._headers = CIMultiDict(headers)
        self._headers["X-Request-Id"] = self.id.internal
        self.pair = pair
        self.prefill_lease = Lease(registry, pair.prefill)
        self.decode_lease = Lease(registry, pair.decode)
        self.kv = KvClaim(registry, pair.prefill, pair.decode, kv_bytes)

    def give_back(self) -> None:
        """Give up every place; harmless for those that were given back before."""
        self.prefill_lease.end()
        self.decode_lease.end()
        self.kv.release()

    async def prefill(self) -> WholeAnswer:
        """Send the one-token body to prefill and read its whole answer.

        A reset on a kept connection is tried once more on a fresh one: vLLM 0.21 closes connections after some
        400s without saying so, and a prefill may be repeated with its id.

        Raises:
            EngineError, EngineDeadline: there is no answer.
        """
        lease = self.prefill_lease
        self._registry.sends_towards(self.pair.prefill, self.pair.decode)
        try:
            try:
                whole = await self._send_prefill(fresh=False)
            except EngineDisconnected as error:
                if not error.reused and not error.unsent:
                    raise
                whole = await self._send_prefill(fresh=True)
        except ProxyError as error:
            self._blame(self.pair.prefill, error)
            lease.end(failed=True)
            raise
        except BaseException:
            lease.end()
            raise
        self.end_lease(lease, whole.status)
        return whole

    def is_failure(self, status: int) -> bool:
        """Whether an instance that answers ``status`` failed, so that another one may do better."""
        # vLLM 0.17 and newer answer /v1/messages with 500 also to a client's mistake.
        return status >= 500 and not (self.route is MESSAGES and status == 500)

    def end_lease(self, lease: Lease, status: int) -> None:
        """Give back a place after an answer with ``status``.

        Every version of vLLM answers some malformed requests with 500, and a client could have a healthy instance
        left alone that way. So a 500 has the instance looked at, which finds a dead engine, but trips no breaker.
        """
        lease.end(failed=self.is_failure(status), certain=status != 500)
        if status == 500:
            self._registry.look_again(lease.instance)

    async def _send_prefill(self, fresh: bool) -> WholeAnswer:
        answer = await self._upstream.request(
            "POST",
            self.pair.prefill,
            self.route.path,
            headers=self._headers,
            body=self.prepared.prefill_body,
            silence=self._config.prefill_timeout * _ABANDON_FACTOR,
            leg="prefill",
            fresh=fresh,
        )
        return await answer.whole()

    async def decode(self) -> Answer:
        """Send the client's own body to decode and wait for status and headers.

        Repeated only when the request cannot have been received.

        Raises:
            NotAsked: the instance is gone, or another process than the KV was prefilled for, or not reached in time.
            EngineError, EngineDeadline: there is no answer.
        """
        if not self.decode_lease.same_process:
            raise NotAsked(EngineFailed("The decode instance went away during the prefill."))
        try:
            try:
                return await self._send_decode(self.prepared.decode_body, fresh=False)
            except EngineDisconnected as error:
                if not error.unsent:
                    raise
                return await self._send_decode(self.prepared.decode_body, fresh=True)
        except ProxyError as error:
            self._blame(self.decode_lease.instance, error)
            if isinstance(error, EngineUnreachable):
                raise NotAsked(error) from error
            raise

    async def _send_decode(self, body: bytes, fresh: bool) -> Answer:
        return await self._upstream.request(
            "POST",
            self.decode_lease.instance,
            self.route.path,
            headers=self._headers,
            body=body,
            silence=self._config.decode_timeout,
            leg="decode",
            fresh=fresh,
        )

    async def drain(self) -> None:
        """Free KV whose decode will not come: decode one token of it and throw that away. Never raises.

        Only after a prefill that answered 200 and only while no decode of this id can have reached the instance;
        anything else would stall it. Tried again while the instance cannot be reached, for as long as it is the
        process that holds the KV. Measured on vLLM 0.21: 40 ms for 8,000 tokens.
        """
        self._drains.started += 1
        instance = self.decode_lease.instance
        for pause in _DRAIN_PAUSES:
            if instance.state is State.READY:
                try:
                    await self._drain_once()
                except EngineUnreachable as error:
                    self._blame(instance, error)
                except ProxyError as error:
                    self._drains.failed += 1
                    self._blame(instance, error)
                    log.warning("KV of %s stays on %s: %s", self.id.public, instance, error.message)
                    return
                else:
                    self._drains.done += 1
                    return
            if self.decode_lease.process_ended:
                break
            await asyncio.sleep(pause)
        self._drains.failed += 1
        log.info("%s went away, and with it what waited there for %s", instance, self.id.public)

    async def _drain_once(self) -> None:
        if self.decode_lease.process_ended:
            raise EngineUnreachable("The decode instance is another process by now.")
        answer = await (await self._send_decode(self.prepared.drain_body, fresh=True)).whole()
        if answer.status != 200:
            raise EngineFailed(f"it answered {answer.status}")

    def _blame(self, instance: Instance, error: ProxyError) -> None:
        """A refused connection takes the instance out at once; one that only timed out may come from a busy server."""
        if isinstance(error, EngineUnreachable) and error.refused:
            self._registry.lost_contact(instance, "its HTTP port cannot be reached")
        elif isinstance(error, EngineError):
            self._registry.look_again(instance)
