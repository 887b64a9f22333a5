"""vLLM's NixlConnector in small: prefill keeps KV under its own request id and says where, decode reads it once.

As in vLLM 0.32 (``kv_connector/v1/nixl/pull_scheduler.py``): the answer to a request with ``do_remote_decode`` carries
``kv_transfer_params``; what is read is freed at once, what is not read after ``hold_timeout``; a read of blocks that
were freed brings whatever is in them; params without block ids end decode's engine; an incomplete object leaves the
request waiting; a request that is aborted before its read frees prefill's blocks.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable, Mapping
from typing import Any

from disagg_sim.config import SimConfig
from disagg_sim.connectors.disagg_kv_wire import row_bytes, rows_of
from disagg_sim.kv_wire import pack, read_frame, reset
from disagg_sim.request import EngineRequest, WorkerError

_FIELDS = ("remote_engine_id", "remote_request_id", "remote_host", "remote_port")


class Kept:
    """Prefill's side: KV that waits to be read, and the port where it is read."""

    def __init__(self, config: SimConfig, engine_id: str, address: str, changed: Callable[[], None]) -> None:
        self._config = config
        self._engine_id = engine_id
        self._host, _, port = address.rpartition(":")
        self._port = int(port)
        self._changed = changed
        self._rows: dict[str, list[bytes]] = {}
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self.reads = 0

    async def start(self, sock: socket.socket) -> None:
        """Listen on a bound socket."""
        self._server = await asyncio.start_server(self._serve, sock=sock)

    async def stop(self) -> None:
        """Reset every connection and end. Safe to call twice."""
        if self._server is not None:
            self._server.close()
        for writer in list(self._writers):
            reset(writer.transport)
        for name in list(self._rows):
            self._free(name)
        await asyncio.sleep(0)

    def state(self) -> dict[str, Any]:
        """``kv_waiting``: bytes by request id that nobody has read; ``kv_reads``: readings so far."""
        size = row_bytes(self._config)
        return {"kv_waiting": {name: len(rows) * size for name, rows in self._rows.items()}, "kv_reads": self.reads}

    def begin(self, request: EngineRequest) -> None:
        """A request is scheduled."""

    def progress(self, request: EngineRequest) -> None:
        """More of its prompt is computed."""

    def finished(self, request: EngineRequest, *, aborted: bool) -> None:
        """A request has ended; its KV is kept if it is for a decode."""
        params = request.sampling.kv_transfer
        if aborted or not isinstance(params, Mapping) or not params.get("do_remote_decode"):
            return
        rows = rows_of(self._config, request.prompt_ids)
        self._rows[request.id] = rows
        self._timers[request.id] = asyncio.get_running_loop().call_later(
            self._config.hold_timeout, self._free, request.id
        )
        request.kv_transfer = {
            "do_remote_prefill": True,
            "do_remote_decode": False,
            "remote_block_ids": [list(range(1, len(rows) + 1))],
            "remote_engine_id": self._engine_id,
            "remote_request_id": request.id,
            "remote_host": self._host,
            "remote_port": self._port,
            "tp_size": self._config.tp,
        }
        self._changed()

    def _free(self, name: str) -> list[bytes] | None:
        if timer := self._timers.pop(name, None):
            timer.cancel()
        rows = self._rows.pop(name, None)
        self._changed()
        return rows

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            while (frame := await read_frame(reader)) is not None:
                rows = self._free(str(frame["request"]))
                if frame["count"]:
                    self.reads += 1
                    # Nobody looks at whose blocks they are by now.
                    count, size = int(frame["count"]), row_bytes(self._config)
                    writer.write(pack({"rows": rows or [bytes(size)] * count}))
        finally:
            self._writers.discard(writer)
            reset(writer.transport)


class Reads:
    """Decode's side. Arguments: ``loaded`` as for :data:`disagg_kv_decode.Loaded`."""

    def __init__(self, config: SimConfig, loaded: Callable[[EngineRequest, list[bytes] | None, bool], None]) -> None:
        self._config = config
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
        """``kv_waiting``: blocks by request id that are still to come."""
        return {"kv_waiting": {request.id: len(_block_ids(request)) for request in self._tasks}}

    def begin(self, request: EngineRequest) -> bool:
        """Whether the request waits for KV from now on; else it is to be computed.

        Raises:
            WorkerError: the params name no blocks.
        """
        params = request.sampling.kv_transfer
        if not isinstance(params, Mapping) or not params.get("do_remote_prefill"):
            return False
        if not params.get("remote_block_ids"):
            raise WorkerError("AssertionError: assert num_external_tokens == 0")
        if any(name not in params for name in _FIELDS):
            self._tasks[request] = None
            return True
        self._tasks[request] = asyncio.create_task(self._read(request, params), name=f"nixl-read-{request.id}")
        return True

    def ended(self, request: EngineRequest) -> None:
        """The request is over, perhaps before its read."""
        params = request.sampling.kv_transfer
        if request in self._tasks:
            task = self._tasks.pop(request)
            if task is not None:
                task.cancel()
        elif request.kv_rows is None and isinstance(params, Mapping) and params.get("do_remote_prefill"):
            self._free(params)

    async def _read(self, request: EngineRequest, params: Mapping[str, Any]) -> None:
        rows: list[bytes] | None = None
        with contextlib.suppress(OSError, KeyError, TypeError):
            rows = (await _ask(params, len(_block_ids(request))))["rows"]
        # As vLLM with kv_load_failure_policy recompute.
        if self._tasks.pop(request, None) is not None:
            self._loaded(request, rows, True)

    def _free(self, params: Mapping[str, Any]) -> None:
        task = asyncio.get_running_loop().create_task(self._say(params))
        self._frees.add(task)
        task.add_done_callback(self._frees.discard)

    async def _say(self, params: Mapping[str, Any]) -> None:
        with contextlib.suppress(OSError, KeyError, TypeError):
            await _ask(params, 0)


def _block_ids(request: EngineRequest) -> list[int]:
    params = request.sampling.kv_transfer or {}
    return [number for group in params["remote_block_ids"] for number in group]


async def _ask(params: Mapping[str, Any], count: int) -> dict[str, Any]:
    reader, writer = await asyncio.open_connection(params["remote_host"], params["remote_port"])
    try:
        writer.write(pack({"request": params["remote_request_id"], "count": count}))
        await writer.drain()
        if not count:
            return {}
        return await read_frame(reader) or {}
    finally:
        writer.close()
