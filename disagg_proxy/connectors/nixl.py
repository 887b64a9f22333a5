"""vLLM's NixlConnector: prefill first, its answer says where its KV is, and decode reads it there.

The ``kv_transfer_params`` of both legs: :mod:`disagg_proxy.connectors.nixl_params`.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable

from disagg_proxy.cluster.placement import Placement
from disagg_proxy.connectors.base import Engines, Failure, Request
from disagg_proxy.connectors.nixl_params import fits, for_decode, for_prefill
from disagg_proxy.connectors.recomputing import RecomputingAttempt
from disagg_proxy.downstream.reply import Reply
from disagg_proxy.errors import EngineDeadline, EngineError
from disagg_proxy.upstream import CompleteResponse, Response

log = logging.getLogger(__name__)


class Nixl:
    """Serves requests on pairs of NixlConnector engines, or on a decode alone."""

    def __init__(self, engines: Engines) -> None:
        self._engines = engines

    async def run(self, request: Request, placement: Placement, reply: Reply) -> Failure | None:
        """One attempt: see :class:`disagg_proxy.connectors.base.Connector`."""
        attempt = RecomputingAttempt(self._engines, request, placement, fits(request.prepared))
        try:
            await self._run(attempt, reply)
            return None
        except (EngineError, EngineDeadline) as error:
            return attempt.failed(error)
        finally:
            attempt.release()

    async def _run(self, attempt: RecomputingAttempt, reply: Reply) -> None:
        prepared = attempt.request.prepared

        # 1. Prefill: keeps its KV and answers where it is.
        prefilled = None
        if attempt.placement.prefill is not None:
            prefilled = await attempt.prefill(for_prefill(prepared.prefill_body))

        # 2. Decode: reads the KV there, once, or computes.
        attempt.watch()
        answer = await self._ask_decode(attempt, prefilled)

        # 3. Answer.
        await attempt.answer(reply, answer)

    def _ask_decode(self, attempt: RecomputingAttempt, prefilled: CompleteResponse | None) -> Awaitable[Response]:
        plain = body = attempt.request.prepared.decode_body
        if prefilled is not None:
            body = for_decode(plain, prefilled.body)
            if body is plain:
                _kv_missing(attempt)
        return attempt.ask_decode(body, again=plain)


def _kv_missing(attempt: RecomputingAttempt) -> None:
    prefill = attempt.placement.prefill
    if prefill is None:
        return
    if not prefill.kv_missing:
        log.warning("%s prefills without saying where the KV is: which KV connector does it run?", prefill)
    prefill.kv_missing += 1
