"""``kv_transfer_params`` of a request, as the proxy sends them to each engine.

Prefill gets ``{"transfer_id": X}``, decode ``{"transfer_id": X, "from": "ip:port"}`` with the KV address that the
prefill engine announced. Other fields are ignored. A request with invalid params is computed like one without any:
no input may raise inside the scheduler, which would end the engine.
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
"""Stands for the digest of an adapter whose content is uncertain; never equal to a digest, nor to "" (no adapter)."""


@dataclass(frozen=True)
class Transfer:
    """The transfer that a request belongs to."""

    key: Key
    address: str = ""
    """``ip:port`` of the prefill engine that has the KV; "" on prefill."""
    adapter: str = ""
    """Digest of the request's LoRA adapter, "" without an adapter, UNCERTAIN without a digest. Not part of the key:
    prefill could not tell a WANT with another adapter from one whose prompt is still to come, and refuse it at once."""


def names_peer(request: Any) -> bool:
    """Whether the request's params name an engine to fetch KV from, as those of the decode leg do."""
    params = getattr(request, "kv_transfer_params", None)
    return isinstance(params, dict) and "from" in params


def read(request: Any, decode: bool, settings: Settings, adapters: Adapters) -> Transfer | None:
    """Return the request's transfer, or None if it is to be computed like any other request."""
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
                raise WireError(f"{address} is not in the networks of the setting peers")
        lora = getattr(request, "lora_request", None)
        adapter = "" if lora is None else adapters.digest(lora) or UNCERTAIN
        return Transfer(Key(name, fingerprint(tokens, versions.prompt_extras(request))), address, adapter)
    except Exception as error:
        logger.warning("ignored invalid kv_transfer_params of %s: %s", request.request_id, str(error)[:200])
        return None
