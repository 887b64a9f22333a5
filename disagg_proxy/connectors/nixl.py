"""vLLM's NixlConnector: prefill first, its answer says where its KV is, and decode reads it there.

Prefill's body asks it to keep its KV, and decode gets the ``kv_transfer_params`` of prefill's answer unchanged. The
request id says nothing of it, and the engines announce nothing (docs/nixl.md). Read in vLLM 0.32,
``kv_connector/v1/nixl/pull_scheduler.py``, and run against it:

- Prefill's params are those of one engine request: of a list of prompts only the first one's come back. It frees the
  KV when it has been read as often as it expects from one request, so the children of ``n`` > 1 cannot share it, and
  a second decode of the same params may read blocks that have new owners.
- An object without one of the fields, but with ``do_remote_prefill``, ends decode's engine (an assertion in
  ``update_state_after_alloc``). So incomplete params are dropped, and decode computes.
- KV that is not read needs no release: an aborted prefill frees it, a decode that is aborted before its read notifies
  prefill, and after ``kv_lease_duration`` (30 s, extended by decode while it queues) prefill frees it.
"""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Any

from disagg_proxy.cluster.kv_kind import KvKind
from disagg_proxy.cluster.lease import Placement
from disagg_proxy.connectors.base import Engines, Failure, KvProtocol, Request
from disagg_proxy.connectors.kv_transfer_params import with_params
from disagg_proxy.connectors.prefill_first import PrefillFirstAttempt, answered_params, keeping_kv
from disagg_proxy.downstream.reply import Reply

KIND: KvKind = KvKind("nixl", needs_address=False)

_FOR_PREFILL = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}
_NEEDED = {"remote_engine_id": str, "remote_request_id": str, "remote_host": str, "remote_port": int}
"""Fields without which decode cannot find the KV, besides the blocks. ``remote_request_id`` is missing from vLLM 0.10
and before, where blocks were freed by another name."""


def for_prefill(body: bytes) -> bytes:
    """Prefill's body: keep the KV for decode."""
    return keeping_kv(body, _FOR_PREFILL)


def for_decode(body: bytes, prefilled: bytes) -> bytes:
    """Decode's body: read the KV where ``prefilled``, the body of prefill's 200, says it is; ``body`` itself where that
    does not say."""
    params = transfer_params(prefilled)
    return body if params is None else with_params(body, params)


def transfer_params(answer: bytes) -> dict[str, Any] | None:
    """Where prefill's answer says the KV is; None when it does not say, or not completely."""
    return answered_params(answer, _NEEDED)


class Nixl:
    """Serves requests on pairs of NixlConnector engines, or on a decode alone."""

    def __init__(self, engines: Engines) -> None:
        self._engines = engines

    def run(self, request: Request, placement: Placement, reply: Reply) -> Coroutine[Any, Any, Failure | None]:
        """One attempt: see :class:`disagg_proxy.connectors.base.Connector`."""
        return NixlAttempt(self._engines, request, placement).run(reply)


PROTOCOL: KvProtocol = KvProtocol(KIND, Nixl)


class NixlAttempt(PrefillFirstAttempt):
    """The legs of one attempt."""

    def prefill_body(self, body: bytes) -> bytes:
        """See :func:`for_prefill`."""
        return for_prefill(body)

    def decode_body(self, body: bytes, prefilled: bytes) -> bytes:
        """See :func:`for_decode`."""
        return for_decode(body, prefilled)
