"""``kv_transfer_params`` of a request: what the proxy says to each engine.

To prefill ``{"transfer_id": X}``; to decode ``{"transfer_id": X, "from": "ip:port"}`` with the KV address that the
prefill engine announced. Anything else a client may put there is ignored, and params that make no sense mean that the
request is simply computed: nothing from outside may raise inside the scheduler, where it would end the engine.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from disagg_kv.engine import versions
from disagg_kv.engine.adapters import Adapters
from disagg_kv.protocol.frames import WireError
from disagg_kv.protocol.keys import Key, fingerprint, transfer_id
from disagg_kv.settings import Settings

logger = logging.getLogger("vllm.disagg_kv")


UNCERTAIN = "?"
"""The digest of an adapter whose content is not certain. It equals neither another digest nor that of no adapter."""


@dataclass(frozen=True)
class Transfer:
    key: Key
    address: str = ""
    """Where decode finds the KV; "" on prefill."""
    adapter: str = ""
    """Digest of the request's LoRA adapter, "" without one, UNCERTAIN where there is none. No part of the key: prefill
    can only refuse at once what it can tell from a prompt that is still to come."""


def read(request: Any, decode: bool, settings: Settings, adapters: Adapters) -> Transfer | None:
    """The transfer that a request belongs to, or None if it is to be computed like any other."""
    params = getattr(request, "kv_transfer_params", None)
    if not isinstance(params, dict) or "transfer_id" not in params:
        return None
    try:
        tokens = versions.prompt_tokens(request)
        if not tokens:
            return None
        name, address = transfer_id(params["transfer_id"]), ""
        if decode:
            address = str(params.get("from") or "")
            if not settings.may_fetch_from(address):
                raise WireError(f"{address} is not among the peers that KV may come from (setting peers)")
        lora = getattr(request, "lora_request", None)
        adapter = "" if lora is None else adapters.digest(lora) or UNCERTAIN
        return Transfer(Key(name, fingerprint(tokens, versions.prompt_extras(request))), address, adapter)
    except Exception as error:
        logger.warning("kv_transfer_params of %s cannot be used: %s", request.request_id, str(error)[:200])
        return None
