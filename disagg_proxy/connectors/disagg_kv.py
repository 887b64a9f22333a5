"""This project's connector (docs/connector.md): both legs at once, and decode fetches the KV from prefill.

The ``kv_transfer_params`` of both legs: :mod:`disagg_proxy.connectors.disagg_kv_params`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from disagg_proxy.cluster.instance import Instance
from disagg_proxy.cluster.placement import Placement
from disagg_proxy.connectors.base import Engines, Failure, Request
from disagg_proxy.connectors.disagg_kv_params import for_decode, for_prefill, new_transfer_id
from disagg_proxy.connectors.recomputing import RecomputingAttempt
from disagg_proxy.downstream.reply import Reply
from disagg_proxy.errors import EngineDeadline, EngineError
from disagg_proxy.openai.usage import tells_cache_use
from disagg_proxy.runtime.inline_coroutine import Event, InlineCoroutine
from disagg_proxy.upstream import CompleteResponse

Release = Callable[[Instance, str], Coroutine[Any, Any, None]]
"""Sends RELEASE: the transfer with that id is over on the instance. Never raises."""

_USAGE_WAIT = 1.0
"""Seconds for which a whole answer waits for prefill's count of cached tokens."""


class DisaggKv:
    """Serves requests on pairs of disagg_kv engines, or on a decode alone.

    Args:
        release: ends an engine's wait for, or hold of, a transfer.
    """

    def __init__(self, engines: Engines, release: Release) -> None:
        self._engines = engines
        self._release = release

    async def run(self, request: Request, placement: Placement, reply: Reply) -> Failure | None:
        """One attempt: see :class:`disagg_proxy.connectors.base.Connector`."""
        attempt = DisaggKvAttempt(self._engines, request, placement, self._release)
        try:
            await self._run(attempt, reply)
            return None
        except (EngineError, EngineDeadline) as error:
            return attempt.failed(error)
        finally:
            attempt.stop_prefill()
            attempt.release()

    async def _run(self, attempt: DisaggKvAttempt, reply: Reply) -> None:
        # 1. Prefill, if there is one: offers its KV under the transfer id. Its answer is not awaited.
        attempt.start_prefill()

        # 2. Decode: asks prefill for the KV, and computes what does not arrive.
        attempt.watch(waiting=attempt.prefilled)
        answer = await attempt.ask_decode(attempt.decode_body())

        # 3. Answer.
        await attempt.answer(reply, answer)


class DisaggKvAttempt(RecomputingAttempt):
    """The legs of one attempt, and its transfer. Each attempt has a transfer id of its own.

    Attributes:
        prefilled: prefill has nothing left to do for it, so that decode is waited for.
    """

    def __init__(self, engines: Engines, request: Request, placement: Placement, release: Release) -> None:
        super().__init__(engines, request, placement, fits=True)
        self._transfer_id = new_transfer_id()
        self._release = release
        self._leg: InlineCoroutine | None = None
        self._leg_ended = Event()
        self.prefilled = placement.prefill is None

    def decode_body(self) -> bytes:
        """Decode's body; it names prefill's KV address where there is a prefill."""
        prefill, body = self.placement.prefill, self.request.prepared.decode_body
        if prefill is None:
            return body
        if prefill.kv is None:
            raise ValueError("an instance without a KV address cannot be in a pair")
        return for_decode(body, self._transfer_id, prefill.kv.text)

    def start_prefill(self) -> None:
        """Send prefill's leg, if there is one, in a coroutine of its own."""
        if self.placement.prefill is not None:
            self._leg = self._engines.background.leg(self._prefill())
            self._leg.start()

    async def _prefill(self) -> None:
        answer = None
        try:
            answer = await self.prefill(for_prefill(self.request.prepared.prefill_body, self._transfer_id))
        finally:
            self._leg = None
            self._prefill_over()
        if answer is None:
            # Decode must not wait for KV that does not come.
            self._send_release(self.decode)

    def _prefill_over(self) -> None:
        self.prefilled = True
        self._leg_ended.set()
        pending = self._decoding
        if pending is not None and not pending.begun:
            pending.since = self._engines.registry.now()
            pending.listen()

    async def prompt_counted(self, whole: CompleteResponse) -> None:
        """Prefill's own answer may arrive a moment after decode's."""
        if self._leg is not None and tells_cache_use(self.request.route, whole.body):
            timer = asyncio.get_running_loop().call_later(_USAGE_WAIT, self._leg_ended.set)
            try:
                await self._leg_ended
            finally:
                timer.cancel()

    def stop_prefill(self) -> None:
        """The attempt is over: abort prefill's leg, and have prefill free KV that decode has not shown to have."""
        leg, self._leg = self._leg, None
        if leg is not None:
            leg.cancel()
        prefill, kv = self.placement.prefill, self.placement.kv
        if prefill is not None and kv is not None and not kv.released:
            self._send_release(prefill)

    def _send_release(self, instance: Instance) -> None:
        self._engines.background.spawn(self._release(instance, self._transfer_id), "RELEASE")
