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

import logging
from collections.abc import Coroutine
from typing import Any

import msgspec

from disagg_proxy.cluster.kv_kind import KvKind
from disagg_proxy.cluster.lease import Placement
from disagg_proxy.connectors.base import Engines, Failure, KvProtocol, Request
from disagg_proxy.connectors.kv_transfer_params import with_params
from disagg_proxy.connectors.recomputing import RecomputingAttempt
from disagg_proxy.downstream.reply import Reply
from disagg_proxy.openai.prepare import Prepared, encode, parse_object
from disagg_proxy.upstream import CompleteResponse

log = logging.getLogger(__name__)

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


def fits(prepared: Prepared) -> bool:
    """Whether the request becomes one request in the engine: its params are those of one prompt, read once."""
    return prepared.choices == 1 and prepared.prompts == 1


def for_prefill(body: bytes) -> bytes:
    """Prefill's body: keep the KV for decode. Never streamed, since events carry no params."""
    if b'"stream":true' in body:
        fields = parse_object(body)
        fields["stream"] = False
        fields.pop("stream_options", None)
        body = encode(fields)
    return with_params(body, _FOR_PREFILL)


def for_decode(body: bytes, prefilled: bytes) -> bytes:
    """Decode's body: read the KV where ``prefilled``, the body of prefill's 200, says it is; ``body`` itself where that
    does not say."""
    params = transfer_params(prefilled)
    return body if params is None else with_params(body, params)


_Answer: Any = msgspec.defstruct("_Answer", [("kv_transfer_params", dict[str, Any] | None, None)])


def transfer_params(answer: bytes) -> dict[str, Any] | None:
    """Where prefill's answer says the KV is; None when it does not say, or not completely."""
    try:
        params = msgspec.json.decode(answer, type=_Answer).kv_transfer_params
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return None
    if params is None or params.get("do_remote_prefill") is not True:
        return None
    if any(type(params.get(name)) is not kind for name, kind in _NEEDED.items()):
        return None
    return params if _some_block(params.get("remote_block_ids")) else None


def _some_block(blocks: Any) -> bool:
    """Whether these are block numbers: one list for each group of layers (vLLM 0.18 and newer), or one for all."""
    if not isinstance(blocks, list):
        return False
    numbers = [number for group in blocks for number in (group if isinstance(group, list) else [group])]
    return bool(numbers) and all(type(number) is int for number in numbers)


class Nixl:
    """Serves requests on pairs of NixlConnector engines, or on a decode alone."""

    def __init__(self, engines: Engines) -> None:
        self._engines = engines

    def run(self, request: Request, placement: Placement, reply: Reply) -> Coroutine[Any, Any, Failure | None]:
        """One attempt: see :class:`disagg_proxy.connectors.base.Connector`."""
        return NixlAttempt(self._engines, request, placement, fits(request.prepared)).run(reply)


PROTOCOL: KvProtocol = KvProtocol(KIND, Nixl)


class NixlAttempt(RecomputingAttempt):
    """The legs of one attempt."""

    async def serve(self, reply: Reply) -> None:
        """Prefill, decode, and the answer."""
        prepared = self.request.prepared

        # 1. Prefill: keeps its KV and answers where it is.
        prefilled = None
        if self.placement.prefill is not None:
            prefilled = await self.prefill(for_prefill(prepared.prefill_body))

        # 2. Decode: reads the KV there, once, or computes.
        self.watch()
        answer = await self.request_decode(self._decode_body(prefilled), resend_body=prepared.decode_body)

        # 3. Answer.
        await self.answer(reply, answer)

    def _decode_body(self, prefilled: CompleteResponse | None) -> bytes:
        plain = self.request.prepared.decode_body
        if prefilled is None:
            return plain
        body = for_decode(plain, prefilled.body)
        prefill = self.placement.prefill
        if body is plain and prefill is not None:
            if not prefill.kv_missing:
                log.warning(
                    "%s prefills without saying where the KV is: which KV connector does it run?", prefill,
                    extra=self.log_fields,
                )  # fmt: skip
            prefill.kv_missing += 1
        return body
