"""Connections of decode to prefill engines: one per address, opened when a request names it, dropped when it breaks.

Each has a thread that connects, does the handshake and receives, and one that writes the small messages, so that the
engine's thread never touches a socket. If a peer cannot be reached or a connection breaks, all loads from it fail at
once.
"""

from __future__ import annotations

import logging
import math
import queue
import threading
import time

from disagg_kv.decode.liveness import PROBES, Liveness
from disagg_kv.decode.pending_loads import Load, PendingLoads
from disagg_kv.protocol.frames import Kind, WireError, encode
from disagg_kv.protocol.handshake import Identity, Refused, check, check_proof, nonce, proof
from disagg_kv.protocol.keys import Key, parse_address
from disagg_kv.protocol.messages import PING, PINGS, Go, Gone, Release
from disagg_kv.transport.base import Transport
from disagg_kv.transport.channel import Channel, Closed
from disagg_kv.transport.factory import RankContext, open_transport
from disagg_kv.transport.fallback import TransportMemory
from disagg_kv.transport.place import FIELD as PLACE
from disagg_kv.transport.place import Place, rank_transports

logger = logging.getLogger("vllm.disagg_kv")
_CONNECT_SECONDS = 3.0
_OPEN_SECONDS = 30.0
"""A connection that is not ready after this long is given up; the next load opens another one."""


class _TryAgain(Exception):
    """The connection must be opened once more, with other transports."""


class PeerConnection:
    """One connection and its two threads. ``peer`` is its unique name, which its loads refer to."""

    def __init__(
        self, context: RankContext, pending: PendingLoads, peer: str, address: tuple[str, int], engine: str,
        transports: TransportMemory,
    ) -> None:  # fmt: skip
        """Args:
        address: of the engine's rank that has this one's number.
        engine: address of its rank 0, by which ``transports`` knows it.
        """
        self._context, self._pending, self.peer, self._address = context, pending, peer, address
        self._engine, self._transports = engine, transports
        self._opening = ""
        self._outgoing: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._channel: Channel | None = None
        self.boot = ""
        self.compares_adapters = True
        self.dead = False
        self.ready = False
        self._started = time.monotonic()
        self._lost_reason = ""
        self._receiving = False
        self._liveness: Liveness | None = None
        self._open_timer = threading.Timer(_OPEN_SECONDS, self._on_open_timeout)
        self._open_timer.daemon = True
        self._open_timer.start()
        threading.Thread(target=self._run, name="disagg-kv-receive", daemon=True).start()

    def enqueue(self, message: bytes) -> None:
        """Queue a message for the writer thread."""
        self._outgoing.put(message)

    @property
    def usable(self) -> bool:
        """Whether new loads may use this connection: not dead, and ready or still within its time to open."""
        return not self.dead and (self.ready or time.monotonic() - self._started < _OPEN_SECONDS)

    def close(self, reason: str = "closed") -> None:
        """End the connection; all its loads fail."""
        self.dead = True
        self._outgoing.put(None)
        if self._channel is not None:
            self._channel.close()

    def _run(self) -> None:
        reason, transport = "", None
        try:
            channel, transport = self._open()
            self.ready = True
            self._open_timer.cancel()
            if not self.compares_adapters:
                self._pending.refuse_adapters(self.peer)
            link = self._transports.running().get(self._engine, transport.name)
            logger.info("connected to prefill engine %s (%s, boot %s)", self.peer, link, self.boot[:8])
            threading.Thread(target=self._write, args=(channel,), name="disagg-kv-write", daemon=True).start()
            while not self.dead:
                self._receive(channel, transport)
        except Refused as refusal:
            reason = f"refused: {refusal}"
            logger.error("prefill engine %s refused the connection: %s", self.peer, refusal)
        except Closed:
            reason = "the prefill engine closed the connection"
        except (OSError, WireError, ValueError, RuntimeError) as error:
            reason = f"{type(error).__name__}: {error}"
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            logger.exception("connection to prefill engine %s failed", self.peer)
        finally:
            self._open_timer.cancel()
            reason = self._lost_reason or reason
            if not self.dead and not reason.startswith("refused: "):
                logger.warning("connection to prefill engine %s closed: %s", self.peer, reason)
            self.dead = True
            self._outgoing.put(None)
            if self._channel is not None:
                self._channel.close()
            if transport is not None:
                transport.close()
                self._transports.closed(self._engine, transport.name)
            self._pending.on_connection_lost(self.peer, reason or "closed")

    def _open(self) -> tuple[Channel, Transport]:
        """Connect; where a transport fails to open, connect again with the next one. Loads wait meanwhile."""
        for _ in range(len(self._context.transports()) + 1):
            if self.dead:
                break
            self._channel = channel = Channel.connect(
                self._address, self._context.settings.stall_timeout_s, _CONNECT_SECONDS
            )
            try:
                return channel, self._handshake(channel)
            except _TryAgain:
                channel.close()
        raise Closed("no transport could be opened")

    def _handshake(self, channel: Channel) -> Transport:
        context, secret = self._context, self._context.settings.secret
        offered, left_out = self._transports.offer(self._engine, context.transports())
        hello = {**context.identity.to_wire(), "nonce": nonce(), "transports": offered, "left_out": left_out,
                 "staging": context.staging_bytes, PLACE: context.place.to_wire()}  # fmt: skip
        channel.write(encode(Kind.HELLO, hello))
        kind, welcome = channel.next_frame(may_idle=False)
        _expect(kind, welcome, Kind.WELCOME)
        theirs = Identity.from_wire(welcome)
        check(context.identity, theirs)
        check_proof(proof(secret, theirs.role, hello, welcome), welcome.get("proof"))
        if self._transports.is_new_process(self._engine, theirs.boot):
            raise _TryAgain
        channel.write(encode(Kind.PROOF, {"proof": proof(secret, context.identity.role, hello, welcome)}))
        kind, ready = channel.next_frame(may_idle=False)
        _expect(kind, ready, Kind.READY)
        self.boot = theirs.boot
        if welcome.get(PINGS) is True:
            self._liveness = Liveness(context.settings.stall_timeout_s)
        self.compares_adapters = theirs.shape is not None and theirs.shape.digest is not None
        _, passed_over = rank_transports(offered, Place.from_wire(welcome.get(PLACE)), context.place)
        return self._open_transport(channel, ready, offered, passed_over)

    def _open_transport(
        self, channel: Channel, ready: dict[str, object], offered: list[str], passed_over: dict[str, str]
    ) -> Transport:
        name, start = str(ready.get("transport")), time.monotonic()
        self._opening = name if len(offered) > 1 else ""
        try:
            transport = open_transport(self._context, channel, ready)
        except WireError:
            raise
        except Exception as error:
            if not self._opening or self.dead:
                raise
            self._give_up_transport(f"{type(error).__name__}: {error}")
            raise _TryAgain from error
        self._opening = ""
        if not self.dead:
            preferred = offered[: offered.index(name)] if name in offered else []
            reasons = {other: why for other, why in passed_over.items() if other in preferred}
            self._transports.opened(self._engine, name, reasons)
            self._context.trace("opened", transport=name, seconds=time.monotonic() - start)
        return transport

    def _give_up_transport(self, reason: str) -> None:
        name, self._opening = self._opening, ""
        logger.warning("transport %s to prefill engine %s failed to open, another one is tried: %s", name, self.peer,
                       reason)  # fmt: skip
        self._transports.failed(self._engine, self.boot, name, reason)

    def _receive(self, channel: Channel, transport: Transport) -> None:
        kind, body = channel.next_frame()
        if self._liveness is not None:
            self._liveness.on_data()
        if kind is Kind.PONG:
            return
        if kind is Kind.GONE:
            gone = Gone.decode(body)
            logger.debug("KV of %s is gone: %s", gone.key.transfer, gone.reason)
            self._pending.on_gone(self.peer, gone.key, gone.reason)
            return
        if kind is not Kind.GO:
            raise WireError(f"unexpected {kind.name} on a decode engine")
        go, ok = Go.decode(body), False
        if go.count > self._context.cache.num_blocks:
            raise WireError(f"GO announces {go.count} blocks, more than the cache has")
        load = self._pending.on_go(self.peer, go)
        self._receiving = True
        self._context.trace("receive", key=go.key.transfer, blocks=go.count)
        try:
            blocks = None if load is None else load.blocks[load.filled : load.filled + go.count]
            transport.receive(blocks, go.count, None if load is None else load.fence, go.parts)
            ok = True
            self._context.trace("received", key=go.key.transfer, bytes=go.count * self._context.cache.block_bytes)
        finally:
            self._receiving = False
            if load is not None:
                if not ok:
                    transport.close()
                self._pending.on_received(load, go.count, ok)

    def _write(self, channel: Channel) -> None:
        """Send queued messages and, while loads wait, PING. An idle connection causes no wake-ups."""
        liveness, due = self._liveness, math.inf
        try:
            while True:
                if liveness is None or not self._pending.waits_for(self.peer):
                    due = math.inf
                elif due == math.inf:
                    due = time.monotonic() + liveness.interval
                    liveness.reset()
                message: bytes | None = PING
                try:
                    message = self._outgoing.get(timeout=None if due == math.inf else max(0.0, due - time.monotonic()))
                except queue.Empty:
                    assert liveness is not None
                    due = time.monotonic() + liveness.interval
                    if not liveness.check(self._receiving):
                        self._lost_reason = f"the prefill engine did not answer {PROBES} liveness probes"
                        channel.close()
                        return
                if message is None:
                    return
                with channel.write_lock:
                    channel.write(message)
        except OSError:
            channel.close()

    def _on_open_timeout(self) -> None:
        """Give up: NCCL waits indefinitely for a peer that stops while it initialises a communicator."""
        self.dead = True
        if not self.ready:
            # If the reader becomes ready now, it sees ``dead`` before it writes any block.
            reason = f"not connected within {_OPEN_SECONDS:.0f} s"
            if self._opening:
                self._give_up_transport(reason)
            logger.warning("gave up connecting to prefill engine %s: %s", self.peer, reason)
            self.close()
            self._pending.on_connection_lost(self.peer, reason)


def _expect(kind: Kind, body: dict[str, object], wanted: Kind) -> None:
    if kind is Kind.REFUSE:
        raise Refused(str(body.get("reason", ""))[:1000])
    if kind is not wanted:
        raise WireError(f"received {kind.name}, expected {wanted.name}")


class PeerConnections:
    """All connections of one rank. Only ``connect`` may be called from other threads than the engine's."""

    def __init__(self, context: RankContext, pending: PendingLoads) -> None:
        self._context, self._pending = context, pending
        self._connections: dict[str, PeerConnection] = {}
        self._opened = 0
        self.transports = TransportMemory()
        self._lock = threading.Lock()

    def connect(self, address: str) -> None:
        """Open a connection to the engine at this address, unless there is one."""
        self._connection(address)

    def start(self, load: Load, address: str) -> None:
        """Request the blocks of a load from the engine at ``address`` (of its rank 0).

        The load fails at once if no request can be sent.
        """
        connection = self._connection(address)
        load.peer = connection.peer if connection is not None else ""
        self._pending.start(load)
        if connection is None:
            self._pending.on_gone("", load.key, "too many connections")
        elif not load.failed:
            self._context.trace("want", key=load.key.transfer, blocks=len(load.blocks), ready=connection.ready)
            connection.enqueue(load.want().encode())
            if connection.dead:
                self._pending.on_gone(connection.peer, load.key, "the connection broke")
            elif not connection.compares_adapters:
                self._pending.refuse_adapters(connection.peer)

    def release(self, address: str, key: Key) -> None:
        """Send RELEASE for a key, if there is a connection to the engine."""
        connection = self._connections.get(address)
        if connection is not None and connection.usable:
            connection.enqueue(Release(key.transfer, key).encode())

    def give_up(self, unwanted: tuple[tuple[str, Key], ...]) -> None:
        """Send RELEASE for the ``unwanted`` loads of ``Collected``, which name connections."""
        if not unwanted:
            return
        with self._lock:
            by_name = {connection.peer: connection for connection in self._connections.values()}
        for peer, key in unwanted:
            if peer in by_name:
                by_name[peer].enqueue(Release(key.transfer, key).encode())

    def close(self) -> None:
        """Close all connections."""
        with self._lock:
            connections = list(self._connections.values())
        for connection in connections:
            connection.close()

    def _connection(self, address: str) -> PeerConnection | None:
        with self._lock:
            return self._find_or_open(address)

    def _find_or_open(self, address: str) -> PeerConnection | None:
        connection = self._connections.get(address)
        if connection is not None and connection.usable:
            return connection
        if connection is not None:
            connection.close()
        elif len(self._connections) >= self._context.settings.max_connections:
            self._connections = {
                name: connection for name, connection in self._connections.items() if connection.usable
            }
            if len(self._connections) >= self._context.settings.max_connections:
                return None
        host, port = parse_address(address)
        self._opened += 1
        connection = PeerConnection(
            self._context,
            self._pending,
            f"{address}#{self._opened}",
            (host, port + self._context.identity.rank),
            address,
            self.transports,
        )
        self._connections[address] = connection
        return connection
