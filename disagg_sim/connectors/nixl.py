"""vLLM's NixlConnector, simplified: prefill holds KV under its own request id, and decode reads it once.

As in vLLM 0.32 (``kv_connector/v1/nixl/pull_scheduler.py``):

- Prefill's answer to a request with ``do_remote_decode`` carries the ``kv_transfer_params`` that decode needs.
- Blocks that were read are freed at once, others after ``hold_timeout``.
- Reading blocks that have been freed yields whatever they hold by then.
- Params without block ids end decode's engine; a request whose params lack another field waits indefinitely.
- A request that is aborted before its read frees prefill's blocks.
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import Callable, Mapping
from typing import Any

from disagg_sim.config import SimConfig, split_address
from disagg_sim.connectors.blocks import row_bytes, rows_of
from disagg_sim.connectors.kv_port import KvPort
from disagg_sim.connectors.transfer_params import RowsLoaded, TransferParamsConnector
from disagg_sim.faults import Faults
from disagg_sim.kv_wire import pack, read_frame
from disagg_sim.request import EngineRequest, WorkerError


class Nixl(TransferParamsConnector):
    """Decode reads from the engine that the request's params name. Such engines do not ping."""

    def __init__(self, config: SimConfig, faults: Faults, kv_address: str, changed: Callable[[], None]) -> None:
        held = HeldKv(config, uuid.uuid4().hex, kv_address, changed)
        reads = None if config.is_producer else Reads(self._rows_loaded)
        super().__init__(config, KvPort(held.serve), held, reads)

    def announcement(self) -> None:
        return None


class HeldKv:
    """Prefill's side: KV that decode has not read yet.

    Args:
        address: ``host:port`` of this engine's KV port.

    Attributes:
        reads: number of reads so far.
    """

    def __init__(self, config: SimConfig, engine_id: str, address: str, changed: Callable[[], None]) -> None:
        self._config = config
        self._engine_id = engine_id
        self._host, self._port = split_address(address)
        self._changed = changed
        self._rows: dict[str, list[bytes]] = {}
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self.reads = 0

    def stop(self) -> None:
        """Free all KV. Safe to call twice."""
        for name in list(self._rows):
            self._free(name)

    def state(self) -> dict[str, Any]:
        """``kv_waiting``: bytes of unread KV by request id; ``kv_reads``: number of reads so far."""
        size = row_bytes(self._config)
        return {"kv_waiting": {name: len(rows) * size for name, rows in self._rows.items()}, "kv_reads": self.reads}

    @property
    def held_blocks(self) -> int:
        return sum(map(len, self._rows.values()))

    def begin(self, request: EngineRequest) -> None:
        """Nothing is promised before the request has ended."""

    def progress(self, request: EngineRequest) -> None:
        """Nothing is sent before the request has ended."""

    def finished(self, request: EngineRequest, *, aborted: bool) -> None:
        """Hold the KV of a request with ``do_remote_decode`` and put the params for decode into its answer."""
        params = request.sampling.kv_transfer
        if aborted or not isinstance(params, Mapping) or not params.get("do_remote_decode"):
            return
        rows, name = rows_of(self._config, request.prompt_ids), self.name_of(request)
        self._rows[name] = rows
        self._timers[name] = asyncio.get_running_loop().call_later(self._config.hold_timeout, self._free, name)
        request.kv_transfer = {
            "do_remote_prefill": True,
            "do_remote_decode": False,
            "remote_block_ids": [list(range(1, len(rows) + 1))],
            "remote_engine_id": self._engine_id,
            "remote_host": self._host,
            "tp_size": self._config.tp,
            **self.own_params(request),
        }
        self._changed()

    def name_of(self, request: EngineRequest) -> str:
        """The name under which decode finds the request's KV."""
        return request.id

    def own_params(self, request: EngineRequest) -> dict[str, Any]:
        """Fields of the answer's params besides those that both protocols have."""
        return {"remote_request_id": request.id, "remote_port": self._port}

    def _free(self, name: str) -> list[bytes] | None:
        if timer := self._timers.pop(name, None):
            timer.cancel()
        rows = self._rows.pop(name, None)
        self._changed()
        return rows

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer the reads of one decode engine; a read of 0 blocks only frees them."""
        while (frame := await read_frame(reader)) is not None:
            rows = self._free(str(frame["request"]))
            if frame["count"]:
                self.reads += 1
                # Nothing checks whose blocks these are by now.
                count, size = int(frame["count"]), row_bytes(self._config)
                writer.write(pack({"rows": rows or [bytes(size)] * count}))


class Reads:
    """Decode's side: requests whose KV is being read.

    Attributes:
        needed: params without which the KV cannot be found.
        name, port: params with the name of the KV and the port to read it from.
    """

    needed: tuple[str, ...] = ("remote_engine_id", "remote_request_id", "remote_host", "remote_port")
    name, port = "remote_request_id", "remote_port"

    def __init__(self, loaded: RowsLoaded) -> None:
        self._loaded = loaded
        self._tasks: dict[EngineRequest, asyncio.Task[None] | None] = {}
        self._frees: set[asyncio.Task[None]] = set()

    async def stop(self) -> None:
        """End every read. Safe to call twice."""
        tasks = [task for task in (*self._tasks.values(), *self._frees) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def state(self) -> dict[str, Any]:
        """``kv_waiting``: number of blocks still to be read, by request id."""
        return {
            "kv_waiting": {
                request.id: self.count(request, request.sampling.kv_transfer or {}) for request in self._tasks
            }
        }

    def begin(self, request: EngineRequest) -> bool:
        """Start to read the KV that the request's params name; False without such params: the prompt is computed.

        Raises:
            WorkerError: the params name no blocks.
        """
        params = request.sampling.kv_transfer
        if not isinstance(params, Mapping) or not params.get("do_remote_prefill"):
            return False
        self.count(request, params)
        if any(name not in params for name in self.needed):
            self._tasks[request] = None
            return True
        self._tasks[request] = asyncio.create_task(self._read(request, params), name=f"nixl-read-{request.id}")
        return True

    def finished(self, request: EngineRequest) -> None:
        """End the request's read, or free prefill's blocks if there was none."""
        params = request.sampling.kv_transfer
        if request in self._tasks:
            task = self._tasks.pop(request)
            if task is not None:
                task.cancel()
        elif request.received is None and isinstance(params, Mapping) and params.get("do_remote_prefill"):
            task = asyncio.get_running_loop().create_task(self._free(params))
            self._frees.add(task)
            task.add_done_callback(self._frees.discard)

    async def _read(self, request: EngineRequest, params: Mapping[str, Any]) -> None:
        rows: list[bytes] | None = None
        with contextlib.suppress(OSError, KeyError, TypeError):
            rows = (await self.ask(params, self.count(request, params)))["rows"]
        # Without rows the prompt is computed, as with vLLM's kv_load_failure_policy "recompute".
        if self._tasks.pop(request, None) is not None:
            self._loaded(request, rows, True)

    async def _free(self, params: Mapping[str, Any]) -> None:
        with contextlib.suppress(OSError, KeyError, TypeError):
            await self.ask(params, 0)

    def count(self, request: EngineRequest, params: Mapping[str, Any]) -> int:
        """Number of blocks to read.

        Raises:
            WorkerError: the params name no blocks.
        """
        if not params.get("remote_block_ids"):
            raise WorkerError("AssertionError: assert num_external_tokens == 0")
        return sum(len(group) for group in params["remote_block_ids"])

    async def ask(self, params: Mapping[str, Any], count: int) -> dict[str, Any]:
        """Read ``count`` blocks from the engine that ``params`` name; {} if it closes the connection instead."""
        reader, writer = await asyncio.open_connection(params["remote_host"], params[self.port])
        try:
            writer.write(pack({"request": params[self.name], "count": count}))
            await writer.drain()
            if not count:
                return {}
            return await read_frame(reader) or {}
        finally:
            writer.close()
