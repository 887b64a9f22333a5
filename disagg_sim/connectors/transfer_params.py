"""What ``disagg_kv`` and NixlConnector have in common: ``kv_transfer_params``, and loads outside of steps."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from disagg_sim.config import SimConfig
from disagg_sim.connectors.base import KvConnector
from disagg_sim.connectors.blocks import received
from disagg_sim.connectors.kv_port import KvPort
from disagg_sim.request import EngineRequest

RowsLoaded = Callable[[EngineRequest, list[bytes] | None, bool], None]
"""Called once for a request whose load has ended: the request, the bytes of its blocks (None: compute the prompt), and
whether this request loaded them; False when it shares what another request loaded."""


class PrefillSide(Protocol):
    """The half of a connector that has KV to give."""

    def begin(self, request: EngineRequest) -> None:
        """Called when a request is scheduled."""

    def progress(self, request: EngineRequest) -> None:
        """Called when a step has computed the request's prompt, or a chunk of it."""

    def finished(self, request: EngineRequest, *, aborted: bool) -> None:
        """Called when the request has ended."""

    @property
    def held_blocks(self) -> int:
        """As :attr:`KvConnector.held_blocks`."""
        ...

    def stop(self) -> None:
        """Cancel every timer. Safe to call twice."""

    def state(self) -> dict[str, Any]:
        """As :meth:`KvConnector.state`."""


class DecodeSide(Protocol):
    """The half of a connector that fetches KV."""

    def begin(self, request: EngineRequest) -> bool:
        """As :meth:`KvConnector.begin`."""

    def finished(self, request: EngineRequest) -> None:
        """Called when the request has ended, perhaps during its load."""

    async def stop(self) -> None:
        """End every load. Safe to call twice."""

    def state(self) -> dict[str, Any]:
        """As :meth:`KvConnector.state`."""


class TransferParamsConnector(KvConnector):
    """A connector that reads ``kv_transfer_params``. A request with KV under way waits outside the batch, so no step
    waits for KV. Either role computes any prompt, decode also one whose KV does not come.

    Args:
        decode: decode's side; None on a prefill engine.
    """

    def __init__(self, config: SimConfig, port: KvPort, prefill: PrefillSide, decode: DecodeSide | None) -> None:
        self._config = config
        self._port = port
        self._prefill = prefill
        self._decode = decode

    async def start(self, sock: socket.socket) -> None:
        await self._port.start(sock)

    async def stop(self) -> None:
        await self._port.stop()
        self._prefill.stop()
        if self._decode is not None:
            await self._decode.stop()

    def state(self) -> dict[str, Any]:
        side = self._prefill if self._decode is None else self._decode
        return {"kv_buffer_used": 0, "listener": "alive", "sender": None, **side.state()}

    @property
    def held_blocks(self) -> int:
        return self._prefill.held_blocks

    def begin(self, request: EngineRequest) -> bool:
        if self._decode is not None:
            return self._decode.begin(request)
        self._prefill.begin(request)
        return False

    def finished(self, request: EngineRequest, *, aborted: bool) -> None:
        if self._decode is not None:
            self._decode.finished(request)
        else:
            self._prefill.finished(request, aborted=aborted)

    async def save(self, computed: Sequence[EngineRequest]) -> None:
        if self._decode is None:
            for request in computed:
                self._prefill.progress(request)

    def _rows_loaded(self, request: EngineRequest, rows: list[bytes] | None, loader: bool) -> None:
        self.loaded(request, None if rows is None else received(self._config, request.prompt_ids, rows), loader)
