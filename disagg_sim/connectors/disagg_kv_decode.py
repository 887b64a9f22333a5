"""Decode's side of ``disagg_kv``: requests that wait for KV, and connections to prefill engines.

The real connector's state machine (``disagg_kv/decode/pending_loads.py``) decides how a load proceeds and ends. This
module is its engine and its connections, on one event loop. Requests share a load when they need the same KV;
otherwise none waits for the KV of another.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from disagg_kv.decode.liveness import PROBES, Liveness
from disagg_kv.decode.pending_loads import Load, PendingLoads
from disagg_kv.outcomes import RECOMPUTED, Outcomes
from disagg_kv.protocol.frames import Kind, WireError
from disagg_kv.protocol.handshake import Identity, Refused, check, check_proof, nonce, proof
from disagg_kv.protocol.keys import Key, parse_address
from disagg_kv.protocol.messages import PING, PINGS, Go, Gone, Release
from disagg_kv.within import within
from disagg_sim.config import SimConfig
from disagg_sim.connectors.blocks import blocks_of, row_bytes
from disagg_sim.connectors.disagg_kv_wire import (
    HANDSHAKE_SECONDS,
    TICK,
    expect,
    read_frame,
    read_transfer,
    send,
)
from disagg_sim.connectors.transfer_params import RowsLoaded
from disagg_sim.kv_wire import reset
from disagg_sim.request import EngineRequest

logger = logging.getLogger(__name__)
_CONNECT_SECONDS = 3.0
_MAX_REMEMBERED = 8192


class _PeerConnection:
    """One connection to a prefill engine, from the attempt to connect to its end.

    Attributes:
        peer: name of this connection, unlike that of any other to the same engine.
        ready: the handshake is done.
        dead: the connection has ended.
    """

    def __init__(self, loads: Loads, address: str, peer: str) -> None:
        self._loads = loads
        self._address = address
        self.peer = peer
        self.ready = False
        self.dead = False
        self._unsent: list[bytes] = []
        self._liveness = Liveness(loads.config.stall_timeout)
        self._answers_pings = False
        self._timed_out = False
        self._writer: asyncio.StreamWriter | None = None
        self.task = asyncio.create_task(self._run(), name=f"disagg-kv-connection-{address}")

    def enqueue(self, message: bytes) -> None:
        if self.ready and self._writer is not None:
            self._writer.write(message)
        else:
            self._unsent.append(message)

    async def _run(self) -> None:
        reason = "closed"
        try:
            host, port = parse_address(self._address)
            async with within(_CONNECT_SECONDS):
                reader, writer = await asyncio.open_connection(host, port)
            self._writer = writer
            async with within(HANDSHAKE_SECONDS):
                await self._handshake(reader, writer)
            self.ready = True
            for message in self._unsent:
                writer.write(message)
            self._loads.changed()
            probing = asyncio.create_task(self._probe(writer)) if self._answers_pings else None
            try:
                while True:
                    await self._receive(reader)
            finally:
                if probing is not None:
                    probing.cancel()
        except Refused as refusal:
            reason = f"refused: {refusal}"
        except (OSError, asyncio.TimeoutError, WireError) as error:
            reason = f"{type(error).__name__}: {error}"
            if self._timed_out:
                reason = f"the prefill engine did not answer {PROBES} liveness probes"
        finally:
            self.dead = True
            if self._writer is not None:
                reset(self._writer.transport)
            self._loads.lost(self, reason)

    async def _handshake(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        config, mine = self._loads.config, self._loads.identity
        hello = {**mine.to_wire(), "nonce": nonce(), "transports": list(config.kv_transports),
                 "staging": max(1 << 20, row_bytes(config))}  # fmt: skip
        send(writer, Kind.HELLO, hello)
        welcome = await expect(reader, Kind.WELCOME)
        theirs = Identity.from_wire(welcome)
        check(mine, theirs)
        check_proof(proof(config.kv_secret, theirs.role, hello, welcome), welcome.get("proof"))
        send(writer, Kind.PROOF, {"proof": proof(config.kv_secret, mine.role, hello, welcome)})
        await expect(reader, Kind.READY)
        self._answers_pings = welcome.get(PINGS) is True

    async def _probe(self, writer: asyncio.StreamWriter) -> None:
        """Send PING while loads wait, as the writer thread of ``disagg_kv/decode/peer_connection.py`` does.

        Resets the connection when none of the last probes was answered.
        """
        while True:
            self._liveness.reset()
            while self._loads.wait_for(self.peer):
                await asyncio.sleep(self._liveness.interval)
                if not self._liveness.check():
                    self._timed_out = True
                    reset(writer.transport)
                    return
                writer.write(PING)
            await asyncio.sleep(self._liveness.interval)

    async def _receive(self, reader: asyncio.StreamReader) -> None:
        kind, body = await read_frame(reader)
        self._liveness.on_data()
        if kind is Kind.PONG:
            return
        if kind is Kind.GONE:
            self._loads.gone(self, Gone.decode(body))
            return
        if kind is not Kind.GO:
            raise WireError(f"unexpected {kind.name} on a decode engine")
        go, size = Go.decode(body), row_bytes(self._loads.config)
        try:
            data = await reader.readexactly(go.count * size)
        except asyncio.IncompleteReadError:
            raise ConnectionError("the other side closed the connection") from None
        self._loads.arrived(self, go, [data[at : at + size] for at in range(0, len(data), size)])


@dataclass(eq=False)
class _Waiting:
    """A load, the blocks that have arrived, and the requests that wait for it; the first one is the loader."""

    load: Load
    timer: asyncio.TimerHandle
    requests: list[EngineRequest]
    rows: list[bytes] = field(default_factory=list)


class Loads:
    """Requests whose KV is being loaded.

    Args:
        identity: this engine in handshakes.
        loaded: called once for each request whose load has ended, unless the request was aborted before.
        changed: called after every change of :meth:`state`.
        outcomes: counts how loads end.
    """

    def __init__(
        self,
        config: SimConfig,
        identity: Identity,
        loaded: RowsLoaded,
        changed: Callable[[], None],
        outcomes: Outcomes,
    ) -> None:
        self.config = config
        self.identity = identity
        self.changed = changed
        self._loaded = loaded
        self._outcomes = outcomes
        self._pending = PendingLoads()
        self._connections: dict[str, _PeerConnection] = {}
        self._numbers = itertools.count()
        self._waiting: dict[Key, _Waiting] = {}
        self._ended_keys: OrderedDict[Key, None] = OrderedDict()
        self._closing = False

    async def stop(self) -> None:
        """End every connection. Safe to call twice."""
        self._closing = True
        for waiting in self._waiting.values():
            waiting.timer.cancel()
        tasks = [connection.task for connection in self._connections.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def state(self) -> dict[str, Any]:
        """The connector's part of the engine's state.

        ``kv_waiting``: number of blocks still to arrive, by request id. ``kv_links``: addresses of connected engines.
        """
        return {
            "kv_waiting": {
                request.id: len(waiting.load.blocks) - waiting.load.filled
                for waiting in self._waiting.values()
                for request in waiting.requests
            },
            "kv_links": self.links(),
        }

    def links(self) -> list[str]:
        """Addresses of the prefill engines to which there is a connection."""
        return [address for address, one in self._connections.items() if one.ready and not one.dead]

    # The engine.

    def begin(self, request: EngineRequest) -> bool:
        """Start to load the request's KV; False when its prompt is to be computed instead."""
        transfer = read_transfer(request, decode=True)
        if transfer is None:
            return False
        key, address = transfer
        if key in self._waiting:
            self._waiting[key].requests.append(request)
            return True
        if key in self._ended_keys:
            return False
        tokens, config = len(request.prompt_ids), self.config
        if tokens <= config.kv_block_size or request.sampling.prompt_logprobs is not None:
            self._end(key)
            connection = self._connections.get(address)
            if connection is not None and not connection.dead:
                connection.enqueue(Release(key.transfer, key).encode())
            return False
        connection = self._connection(address)
        deadline = time.monotonic() + config.load_timeout
        load = Load(key, str(next(self._numbers)), range(blocks_of(config, tokens)), 0, deadline, connection.peer)
        timer = asyncio.get_running_loop().call_later(config.load_timeout + TICK, self._collect)
        self._waiting[key] = _Waiting(load, timer, [request])
        self._pending.start(load)
        if not load.failed:
            connection.enqueue(load.want().encode())
        self._collect()
        return True

    def finished(self, request: EngineRequest) -> None:
        """Forget a request that has ended; a load that no other request waits for is cancelled."""
        for waiting in list(self._waiting.values()):
            if request in waiting.requests:
                waiting.requests.remove(request)
                if not waiting.requests:
                    self._pending.cancel(waiting.load.request)
                self._collect()

    def release(self, transfer: str) -> None:
        """Handle the proxy's RELEASE: the KV of this transfer will not arrive."""
        self._pending.release(transfer)
        self._collect()

    def meet(self, address: str) -> None:
        """Handle the proxy's MEET: connect to the prefill engine at ``address`` (``host:port``).

        Raises:
            WireError: ``address`` is malformed.
        """
        parse_address(address)
        self._connection(address)

    def wait_for(self, peer: str) -> bool:
        """Whether a load waits for KV from this connection."""
        return self._pending.waits_for(peer)

    def _connection(self, address: str) -> _PeerConnection:
        connection = self._connections.get(address)
        if connection is None or connection.dead:
            connection = self._connections[address] = _PeerConnection(self, address, f"{address}#{next(self._numbers)}")
        return connection

    # A connection to a prefill engine.

    def arrived(self, connection: _PeerConnection, go: Go, rows: list[bytes]) -> None:
        """Handle blocks that arrived on ``connection``.

        Raises:
            WireError: they are not the requested blocks.
        """
        load = self._pending.on_go(connection.peer, go)
        if load is not None:
            self._waiting[load.key].rows.extend(rows)
            self._pending.on_received(load, go.count, True)
        self._collect()

    def gone(self, connection: _PeerConnection, gone: Gone) -> None:
        """Handle a GONE: the prefill engine will not send these blocks."""
        self._pending.on_gone(connection.peer, gone.key, gone.reason)
        self._collect()

    def lost(self, connection: _PeerConnection, reason: str) -> None:
        """Fail the loads that waited for a connection that has ended."""
        logger.info("KV connection to %s closed: %s", connection.peer, reason)
        if not self._closing:
            self._pending.on_connection_lost(connection.peer, reason)
            self._collect()

    def _end(self, key: Key) -> None:
        self._ended_keys[key] = None
        if len(self._ended_keys) > _MAX_REMEMBERED:
            self._ended_keys.popitem(last=False)

    def _collect(self) -> None:
        """Report loads that have ended to the step loop, and send RELEASE for KV that is not needed any more."""
        found = self._pending.collect()
        self._outcomes.loaded(len(found.loaded))
        self._outcomes.ended(RECOMPUTED, found.reasons)
        for peer, key in found.unwanted:
            for connection in self._connections.values():
                if connection.peer == peer and not connection.dead:
                    connection.enqueue(Release(key.transfer, key).encode())
        for waiting in [waiting for waiting in self._waiting.values() if waiting.load.request in found.requests]:
            load = waiting.load
            del self._waiting[load.key]
            waiting.timer.cancel()
            self._end(load.key)
            for number, request in enumerate(waiting.requests):
                self._loaded(request, None if load.failed else waiting.rows, number == 0)
        self.changed()
