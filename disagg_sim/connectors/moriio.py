"""vLLM's MoRIIOConnector, simplified: prefill holds KV under the transfer id that both legs get.

As in vLLM 0.33 (``kv_connector/v1/moriio/``):

- An engine finds the other one in the request id or in the params ``remote_host``, ``remote_handshake_port`` and
  ``remote_notify_port``; it ends where neither names one.
- READ: decode reads inside a step, which waits for it.
- WRITE: decode names its blocks outside of steps, and prefill writes them when it has computed the prompt. Decode waits
  without a limit, also for a prompt that prefill never computes.
- Prefill frees KV that was fetched, or released by a decode that was aborted, at once; other KV after ``hold_timeout``.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from disagg_sim.config import SimConfig, split_address
from disagg_sim.connectors.blocks import blocks_of, received
from disagg_sim.connectors.kv_port import KvPort
from disagg_sim.connectors.nixl import HeldKv, Reads
from disagg_sim.connectors.transfer_params import RowsLoaded, TransferParamsConnector
from disagg_sim.faults import Faults
from disagg_sim.kv_wire import pack, read_frame
from disagg_sim.request import EngineRequest, WorkerError

_PEER = {
    True: re.compile(r"___decode_addr_(.+)_[0-9a-f]{32}(?:-.*)?$"),
    False: re.compile(r"___prefill_addr_(.+?)___decode_addr_"),
}
"""Address of the peer in a request id, for a producer and for a consumer (``moriio_common.py``)."""


class Moriio(TransferParamsConnector):
    """Prefill holds, decode reads or gets written what the request's params name. One port serves both purposes."""

    def __init__(self, config: SimConfig, faults: Faults, kv_address: str, changed: Callable[[], None]) -> None:
        self._address = kv_address
        self._reads = _Fetches(config, self._rows_loaded)
        held = _Held(config, uuid.uuid4().hex, kv_address, changed)
        super().__init__(config, KvPort(held.serve), held, None if config.is_producer else self._reads)

    def announcement(self) -> dict[str, Any]:
        host, port = split_address(self._address)
        return {
            "zmq_address": f"host:{host},handshake:{port},notify:{port}",
            "dp_size": 1,
            "tp_size": self._config.tp,
            "transfer_mode": "READ" if self._config.read_mode else "WRITE",
        }

    def begin(self, request: EngineRequest) -> bool:
        params = request.sampling.kv_transfer
        if isinstance(params, Mapping) and (params.get("do_remote_prefill") or params.get("do_remote_decode")):
            _check(request, params, self._config)
        if self._decode is not None and self._config.read_mode:
            if isinstance(params, Mapping) and params.get("do_remote_prefill"):
                request.external_tokens = len(request.prompt_ids) - 1
            return False
        return super().begin(request)

    async def load(self, fresh: Sequence[EngineRequest]) -> None:
        for request in fresh:
            if not self._config.read_mode or not request.external_tokens:
                continue
            params, rows = request.sampling.kv_transfer or {}, None
            self.stalled_on = request.id
            with contextlib.suppress(OSError, KeyError, TypeError):
                rows = (await self._reads.ask(params, self._reads.count(request, params)))["rows"]
            self.stalled_on = None
            if rows is None:
                # Its blocks are reported as not loaded, and computed (``kv_load_failure_policy`` "recompute").
                request.external_tokens = 0
            else:
                request.received = received(self._config, request.prompt_ids, rows)


def _check(request: EngineRequest, params: Mapping[str, Any], config: SimConfig) -> None:
    """Check the params as ``MoRIIOConnectorMetadata.add_new_req`` does.

    Raises:
        WorkerError: the engine ends.
    """
    named = _PEER[config.is_producer].search(request.id)
    if named is None and not all(params.get(f"remote_{name}") for name in ("host", "handshake_port", "notify_port")):
        raise WorkerError(f"ValueError: request_id {request.id!r} does not embed a peer zmq_address")
    for name in ("transfer_id", "remote_block_ids", "remote_engine_id"):
        if name not in params:
            raise WorkerError(f"KeyError: {name!r}")


class _Held(HeldKv):
    """Prefill's side, under transfer ids."""

    def __init__(self, config: SimConfig, engine_id: str, address: str, changed: Callable[[], None]) -> None:
        super().__init__(config, engine_id, address, changed)
        self._computed = asyncio.Event()

    def name_of(self, request: EngineRequest) -> str:
        return str((request.sampling.kv_transfer or {})["transfer_id"])

    def own_params(self, request: EngineRequest) -> dict[str, Any]:
        return {
            "remote_handshake_port": self._port,
            "remote_notify_port": self._port,
            "remote_dp_rank": 0,
            "remote_dp_rank_override": True,
            "remote_dp_size": 1,
            "remote_dp_size_local": 1,
            "transfer_id": self.name_of(request),
        }

    def finished(self, request: EngineRequest, *, aborted: bool) -> None:
        super().finished(request, aborted=aborted)
        self._computed.set()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve the reads and the block notifications of one decode engine; one of 0 blocks only frees them."""
        if self._config.read_mode:
            await super().serve(reader, writer)
            return
        while (frame := await read_frame(reader)) is not None:
            name = str(frame["request"])
            while frame["count"] and name not in self._rows:
                self._computed.clear()
                await self._computed.wait()
            rows = self._free(name)
            if frame["count"]:
                self.reads += 1
                writer.write(pack({"rows": rows}))


class _Fetches(Reads):
    """Decode's side: its own blocks, which prefill is to write or has computed."""

    needed = ("transfer_id", "remote_host", "remote_notify_port")
    name, port = "transfer_id", "remote_notify_port"

    def __init__(self, config: SimConfig, loaded: RowsLoaded) -> None:
        super().__init__(loaded)
        self._config = config

    def count(self, request: EngineRequest, params: Mapping[str, Any]) -> int:
        return blocks_of(self._config, len(request.prompt_ids))
