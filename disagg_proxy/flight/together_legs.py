"""The two legs of a request between instances of this project's own connector, or decode's alone.

Both may be sent at once. Decode fetches the KV under the transfer's name and computes by itself what does not come,
so nothing can stall, a leg may be cancelled at any time, and no KV needs a drain: what nobody fetches expires.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from multidict import CIMultiDict

from disagg_proxy.cluster.lease import KvClaim, Lease
from disagg_proxy.cluster.pairing import Alone, Pair
from disagg_proxy.cluster.pulse import Vigil
from disagg_proxy.cluster.registry import Registry
from disagg_proxy.config import Config
from disagg_proxy.errors import EngineDisconnected, ProxyError
from disagg_proxy.flight.verdict import blame, end_lease
from disagg_proxy.protocol.disagg_kv import for_decode, for_prefill, new_transfer_id
from disagg_proxy.protocol.fields import Route
from disagg_proxy.protocol.p2p_nccl import RequestId
from disagg_proxy.protocol.prepare import Prepared
from disagg_proxy.upstream import Answer, Upstream, WholeAnswer

Release = Callable[[str, str], Awaitable[None]]
"""Told a KV address and a transfer id: the transfer is over there."""


class TogetherLegs:
    """The legs of one try. Creating it takes its places.

    Args:
        release: ends waits for KV.
        request_id: what both engines and the client call the request.
        tokens: estimated length of the prompts, in all.

    Attributes:
        frozen: why a leg was given up because its instance stands still, None while none was.
    """

    def __init__(
        self,
        upstream: Upstream,
        registry: Registry,
        config: Config,
        release: Release,
        found: Pair | Alone,
        route: Route,
        headers: CIMultiDict[str],
        prepared: Prepared,
        request_id: str,
        tokens: int = 0,
    ) -> None:
        prefill = found.prefill if isinstance(found, Pair) and not prepared.prefill_answers else None
        self.id = RequestId(request_id, request_id)
        self.transfer_id = new_transfer_id()
        self.route = route
        self.prepared = prepared
        self.decode = found.decode
        self.prefill = prefill
        self._upstream = upstream
        self._registry = registry
        self._config = config
        self._release = release
        self._tokens = tokens
        self._headers = CIMultiDict(headers)
        self._headers["X-Request-Id"] = request_id
        self.decode_lease = Lease(registry, found.decode)
        self.prefill_lease = None if prefill is None else Lease(registry, prefill)
        self._kv = None if prefill is None else KvClaim(registry, prefill, found.decode, 0)
        self.frozen: ProxyError | None = None
        self._decoding: Vigil | None = None

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
        lease = self.prefill_lease
        if lease is None:
            return None
        task = asyncio.current_task()

        def give_up(error: ProxyError) -> None:
            if task is not None:
                task.cancel()

        vigil = lease.pulse.begin(self._registry.now, tokens=self._tokens, give_up=give_up, receiver=None)
        body = for_prefill(self.prepared.prefill_body, self.transfer_id)
        try:
            try:
                whole = await self._post(lease, body, "prefill", self._config.prefill_timeout, fresh=False)
            except EngineDisconnected as error:
                if not error.reused and not error.unsent:
                    raise
                whole = await self._post(lease, body, "prefill", self._config.prefill_timeout, fresh=True)
            if whole.status == 200:
                vigil.heard()
                lease.end(failed=False)
                return whole
            end_lease(self._registry, lease, self.route, whole.status)
        except ProxyError as error:
            blame(self._registry, lease.instance, error)
            lease.end(failed=True)
        finally:
            vigil.end()
            lease.end()
        await self._decode_alone()
        return None

    async def _decode_alone(self) -> None:
        if self.decode.kv is not None:
            await self._release(self.decode.kv.text, self.transfer_id)

    async def _post(self, lease: Lease, body: bytes, leg: str, silence: float, fresh: bool) -> WholeAnswer:
        return await (await self._send(lease, body, leg, silence, fresh)).whole()

    async def _send(self, lease: Lease, body: bytes, leg: str, silence: float, fresh: bool) -> Answer:
        return await self._upstream.request(
            "POST",
            lease.instance,
            self.route.path,
            headers=self._headers,
            body=body,
            silence=silence,
            leg=leg,
            fresh=fresh,
        )

    async def ask_decode(self) -> Answer:
        """Status and headers of decode's answer. When decode stands still the task is cancelled, with ``frozen`` set.

        Raises:
            EngineError, EngineDeadline: there is no answer. Another decode may be asked: the client has seen nothing.
        """
        task = asyncio.current_task()

        def give_up(error: ProxyError) -> None:
            self.frozen = error
            if task is not None:
                task.cancel()

        self._decoding = self.decode_lease.pulse.begin(
            self._registry.now, tokens=self._tokens, telling=self.prepared.streams, give_up=give_up
        )
        body, silence = self.prepared.decode_body, self._config.decode_timeout
        if self.prefill is not None and self.prefill.kv is not None:
            body = for_decode(body, self.transfer_id, self.prefill.kv.text)
        try:
            try:
                return await self._send(self.decode_lease, body, "decode", silence, fresh=False)
            except EngineDisconnected as error:
                if not error.reused and not error.unsent:
                    raise
                return await self._send(self.decode_lease, body, "decode", silence, fresh=True)
        except ProxyError as error:
            blame(self._registry, self.decode, error)
            raise

    def end_refused(self, status: int) -> None:
        """Decode answered, but not 200."""
        end_lease(self._registry, self.decode_lease, self.route, status)
