"""What the connectors share whose prefill answers first, and says where its KV is (``nixl``, ``moriio``).

Prefill's body says that another engine will read its KV, and its answer has ``kv_transfer_params`` for decode. They are
those of one engine request, so a list of prompts and ``n`` > 1 are computed by decode alone. What decode gets without
them, or without a part of them, it computes.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import msgspec

from disagg_proxy.cluster.lease import Placement
from disagg_proxy.connectors.base import Engines, Request
from disagg_proxy.connectors.kv_transfer_params import with_params
from disagg_proxy.connectors.recomputing import RecomputingAttempt
from disagg_proxy.downstream.reply import Reply
from disagg_proxy.openai.prepare import Prepared, encode, parse_object
from disagg_proxy.upstream import CompleteResponse

log = logging.getLogger(__name__)


def fits(prepared: Prepared) -> bool:
    """Whether the request becomes one request in the engine: its params are those of one prompt, read once."""
    return prepared.choices == 1 and prepared.prompts == 1


def keeping_kv(body: bytes, params: Mapping[str, Any]) -> bytes:
    """Prefill's body with ``params``. Never streamed, since events carry no params."""
    if b'"stream":true' in body:
        fields = parse_object(body)
        fields["stream"] = False
        fields.pop("stream_options", None)
        body = encode(fields)
    return with_params(body, params)


_Answer: Any = msgspec.defstruct("_Answer", [("kv_transfer_params", dict[str, Any] | None, None)])


def answered_params(answer: bytes, needed: Mapping[str, type]) -> dict[str, Any] | None:
    """Where ``answer``, the body of prefill's 200, says the KV is; None when it does not say, or not completely.

    Args:
        needed: fields without which decode cannot find the KV, besides the blocks, with their types.
    """
    try:
        params: dict[str, Any] | None = msgspec.json.decode(answer, type=_Answer).kv_transfer_params
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return None
    if params is None or params.get("do_remote_prefill") is not True:
        return None
    if any(type(params.get(name)) is not kind for name, kind in needed.items()):
        return None
    return params if _some_block(params.get("remote_block_ids")) else None


def _some_block(blocks: Any) -> bool:
    """Whether these are block numbers: one list for each group of layers (vLLM 0.18 and newer), or one for all."""
    if not isinstance(blocks, list):
        return False
    numbers = [number for group in blocks for number in (group if isinstance(group, list) else [group])]
    return bool(numbers) and all(type(number) is int for number in numbers)


class PrefillFirstAttempt(RecomputingAttempt):
    """The legs of one attempt, one after the other. A connector's subclass makes their bodies."""

    def __init__(self, engines: Engines, request: Request, placement: Placement) -> None:
        super().__init__(engines, request, placement, fits(request.prepared))

    def prefill_body(self, body: bytes) -> bytes:
        """``body`` with what makes prefill keep its KV."""
        raise NotImplementedError

    def decode_body(self, body: bytes, prefilled: bytes) -> bytes:
        """``body`` with where ``prefilled``, the body of prefill's 200, says the KV is; ``body`` itself where that does
        not say."""
        raise NotImplementedError

    async def serve(self, reply: Reply) -> None:
        """Prefill, decode, and the answer."""
        prepared = self.request.prepared

        # 1. Prefill: keeps its KV and answers where it is.
        prefilled = None
        if self.placement.prefill is not None:
            prefilled = await self.prefill(self.prefill_body(prepared.prefill_body))

        # 2. Decode: reads the KV there, once, or computes.
        self.watch()
        answer = await self.request_decode(self._decode_body(prefilled), resend_body=prepared.decode_body)

        # 3. Answer.
        await self.answer(reply, answer)

    def _decode_body(self, prefilled: CompleteResponse | None) -> bytes:
        plain = self.request.prepared.decode_body
        if prefilled is None:
            return plain
        body = self.decode_body(plain, prefilled.body)
        prefill = self.placement.prefill
        if body is plain and prefill is not None:
            if not prefill.kv_missing:
                log.warning(
                    "%s prefills without saying where the KV is: which KV connector does it run?", prefill,
                    extra=self.log_fields,
                )  # fmt: skip
            prefill.kv_missing += 1
        return body
