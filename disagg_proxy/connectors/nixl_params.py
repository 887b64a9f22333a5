"""What vLLM's NixlConnector wants on the two legs: prefill is told to keep its KV and answers where it is, decode gets
that answer's ``kv_transfer_params`` whole. Nothing of the request id.

Read in vLLM 0.32, ``kv_connector/v1/nixl/pull_scheduler.py``, and run against it (docs/nixl.md):

- Prefill's params are those of one engine request: of a list of prompts only the first one's come back. It frees the
  KV when it has been read as often as it expects from one request, so the children of ``n`` > 1 cannot share it, and
  a second decode of the same params may read blocks that have new owners.
- An object that lacks one of the fields, but says ``do_remote_prefill``, ends decode's engine (an assertion in
  ``update_state_after_alloc``). So what is not whole is left out, and decode computes.
- Nobody needs to be told when KV is not read: an aborted prefill frees it, a decode aborted before its read tells
  prefill, and after ``kv_lease_duration`` (30 s, prolonged by decode while it queues) prefill frees it by itself.
"""

from __future__ import annotations

from typing import Any

import msgspec

from disagg_proxy.connectors.kv_transfer_params import with_params
from disagg_proxy.openai.prepare import Prepared, encode, parse_object

_FOR_PREFILL = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}
_NEEDED = {"remote_engine_id": str, "remote_request_id": str, "remote_host": str, "remote_port": int}
"""Fields without which decode cannot find the KV, beside the blocks. ``remote_request_id`` is missing from vLLM 0.10
and before, where blocks were freed by another name."""


def fits(prepared: Prepared) -> bool:
    """Whether the request becomes one request in the engine: its params are those of one prompt, read once."""
    return prepared.choices == 1 and prepared.prompts == 1


def for_prefill(body: bytes) -> bytes:
    """Prefill's body: it keeps its KV for decode. Its answer must come in one piece, since events carry no params."""
    if b'"stream":true' in body:
        fields = parse_object(body)
        fields["stream"] = False
        fields.pop("stream_options", None)
        body = encode(fields)
    return with_params(body, _FOR_PREFILL)


def for_decode(body: bytes, prefilled: bytes) -> bytes:
    """Decode's body: it reads the KV where ``prefilled``, the body of prefill's 200, says it is; unchanged where that
    does not say."""
    params = transfer_params(prefilled)
    return body if params is None else with_params(body, params)


_Answer: Any = msgspec.defstruct("_Answer", [("kv_transfer_params", dict[str, Any] | None, None)])


def transfer_params(answer: bytes) -> dict[str, Any] | None:
    """Where prefill's answer says the KV is; None when it does not, or not all of it."""
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
