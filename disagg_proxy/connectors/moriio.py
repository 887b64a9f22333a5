"""vLLM's MoRIIOConnector (AMD GPUs): prefill first, then decode, which reads the KV or gets it written.

Read in vLLM 0.33 (``kv_connector/v1/moriio/``) and in its example proxy (``moriio_toy_proxy_server.py``), not run:

- Engines ping as P2pNcclConnector's do, with sizes, the mode, and another form of ``zmq_address``.
- Each engine finds the other one by its address in the request id, or by the params ``remote_host``,
  ``remote_handshake_port`` and ``remote_notify_port``. Params are sent here, so the id stays the client's.
- READ: decode reads the blocks that prefill's answer names, inside a step. Without ``do_remote_prefill`` it computes;
  before 0.33 it took the blocks for filled nevertheless.
- WRITE: decode notifies prefill of its blocks, and prefill writes them. The example proxy sends both legs at once; here
  decode gets the request after prefill's 200, because it waits without a time limit for blocks that are never written.
- KV that decode never asks for is freed after ``defer_timeout`` (60 s); a decode that is aborted before its transfer
  releases it.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Coroutine
from typing import Any

from disagg_proxy.address import Address, parse_address
from disagg_proxy.cluster.instance import Instance
from disagg_proxy.cluster.kv_kind import KvKind
from disagg_proxy.cluster.lease import Placement
from disagg_proxy.connectors.base import Announced, Engines, Failure, Fields, KvProtocol, Request, text_field
from disagg_proxy.connectors.kv_transfer_params import with_params
from disagg_proxy.connectors.prefill_first import PrefillFirstAttempt, answered_params, keeping_kv
from disagg_proxy.downstream.reply import Reply
from disagg_proxy.errors import EngineFailed

KIND: KvKind = KvKind("moriio")

OLDEST = (0, 33)
"""The first vLLM whose READ decode computes a prompt that comes without params. Older ones would answer from
uninitialised KV."""

_MODES = ("READ", "WRITE")
_MAX_SIZE = 1024
_NEEDED = {"remote_engine_id": str}
_OPTIONAL = ("remote_dp_rank", "remote_dp_size_local")
"""Numbers of prefill's answer: the data parallel rank that has the KV, and the ranks of one of its hosts."""

_VERSION = re.compile(r"(\d+)\.(\d+)")


def parse_kv_address(text: str) -> tuple[Address, int]:
    """Read ``host:IP,handshake:PORT,notify:PORT``.

    Returns:
        The address of the handshake port, and the notify port.

    Raises:
        ValueError, KeyError: a part is wrong, or missing.
    """
    fields = dict(part.split(":", 1) for part in text.split(","))
    handshake, notify = (parse_address(f"{fields['host']}:{fields[port]}") for port in ("handshake", "notify"))
    return handshake, notify.port


def read(fields: Fields) -> Announced | None:
    """Read a ping (vLLM 0.33, ``moriio_connector.py``, ``_start_heartbeat``); every engine sends all its fields."""
    text = text_field(fields, "zmq_address", "")
    if "protocol" in fields or not text.startswith("host:"):
        return None
    try:
        kv, notify = parse_kv_address(text)
    except (KeyError, ValueError) as error:
        raise ValueError(f"zmq_address: {error}") from None
    mode = text_field(fields, "transfer_mode").upper()
    if mode not in _MODES:
        raise ValueError(f"transfer_mode is {mode[:40]!r}, neither READ nor WRITE")
    peer: dict[str, str | int] = {
        "remote_host": kv.host, "remote_handshake_port": kv.port, "remote_notify_port": notify
    }  # fmt: skip
    for name in ("dp_size", "tp_size"):
        size = fields.get(name)
        if type(size) is not int or not 1 <= size <= _MAX_SIZE:
            raise ValueError(f"{name} is no number from 1 to {_MAX_SIZE}")
        peer[f"remote_{name}"] = size
    return Announced(KvKind(KIND.protocol, (("transfer_mode", mode),), peer_params=tuple(peer.items())), kv)


def prefill_params(transfer_id: str, decode: KvKind) -> dict[str, Any]:
    """``kv_transfer_params`` of the prefill leg: keep the KV for this decode."""
    return {
        "do_remote_decode": True,
        "do_remote_prefill": False,
        "remote_engine_id": None,
        "remote_block_ids": None,
        "transfer_id": transfer_id,
        **dict(decode.peer_params),
    }


def decode_params(transfer_id: str, prefill: KvKind, answer: bytes) -> dict[str, Any] | None:
    """``kv_transfer_params`` of the decode leg after prefill's ``answer``; None where that names no KV."""
    found = answered_params(answer, _NEEDED)
    if found is None or found.get("transfer_id") != transfer_id:
        return None
    return {
        "do_remote_decode": False,
        "do_remote_prefill": True,
        "remote_engine_id": found["remote_engine_id"],
        "remote_block_ids": found["remote_block_ids"],
        "transfer_id": transfer_id,
        **dict(prefill.peer_params),
        **{name: found[name] for name in _OPTIONAL if type(found.get(name)) is int},
    }


def too_old(instance: Instance) -> bool:
    """Whether its vLLM is known to be older than :data:`OLDEST`."""
    version = _VERSION.match(instance.version or "")
    # Builds from source call themselves 0.1.dev.
    return version is not None and (0, 2) <= (int(version[1]), int(version[2])) < OLDEST


class Moriio:
    """Serves requests on pairs of MoRIIOConnector engines, or on a decode alone."""

    def __init__(self, engines: Engines) -> None:
        self._engines = engines

    def run(self, request: Request, placement: Placement, reply: Reply) -> Coroutine[Any, Any, Failure | None]:
        """One attempt: see :class:`disagg_proxy.connectors.base.Connector`."""
        return MoriioAttempt(self._engines, request, placement).run(reply)


PROTOCOL: KvProtocol = KvProtocol(KIND, Moriio, read)


class MoriioAttempt(PrefillFirstAttempt):
    """The legs of one attempt, and its transfer. Each attempt has a transfer id of its own."""

    def __init__(self, engines: Engines, request: Request, placement: Placement) -> None:
        super().__init__(engines, request, placement)
        self._transfer_id = f"tx-{secrets.token_hex(16)}"

    async def serve(self, reply: Reply) -> None:
        """Prefill, decode, and the answer.

        Raises:
            EngineFailed: an engine is older than :data:`OLDEST`.
        """
        for instance in (self.placement.prefill, self.decode):
            if instance is not None and too_old(instance):
                needed = ".".join(map(str, OLDEST))
                raise EngineFailed(f"MoRIIOConnector needs vLLM {needed} or newer here, not {instance.version}.")
        await super().serve(reply)

    def prefill_body(self, body: bytes) -> bytes:
        """``body`` with :func:`prefill_params`."""
        return keeping_kv(body, prefill_params(self._transfer_id, self.decode.kind))

    def decode_body(self, body: bytes, prefilled: bytes) -> bytes:
        """``body`` with :func:`decode_params`."""
        prefill = self.placement.prefill
        params = None if prefill is None else decode_params(self._transfer_id, prefill.kind, prefilled)
        return body if params is None else with_params(body, params)
