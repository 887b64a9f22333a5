"""The KV port of an engine: accepts decode engines and the proxy, and sends requested KV.

One thread listens. Each connection has a reader thread and, after the handshake with a decode engine, a sender thread.
A protocol error ends only its own connection. Decode engines listen too, for the proxy: their port shows that the
process lives, and takes RELEASE and MEET.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
from collections.abc import Callable
from typing import Any

from disagg_kv.prefill.admission import OpenConnections
from disagg_kv.prefill.send_queue import DecodePeer, Segment, SendQueue
from disagg_kv.protocol.frames import Kind, WireError, encode
from disagg_kv.protocol.handshake import (
    Identity,
    Refused,
    check,
    check_proof,
    choose_transport,
    nonce,
    proof,
)
from disagg_kv.protocol.messages import PINGS, PONG, Go, Release, Want
from disagg_kv.protocol.proven import ANNOUNCED, announced_field
from disagg_kv.tally import Tally
from disagg_kv.transport.base import Stalled, Transport
from disagg_kv.transport.channel import Channel, Closed
from disagg_kv.transport.factory import RankContext, offer_transport, open_transport
from disagg_kv.transport.place import FIELD as PLACE
from disagg_kv.transport.place import Place, rank_transports

logger = logging.getLogger("vllm.disagg_kv")
_HANDSHAKE_SECONDS = 10.0
_READ_SECONDS = 5.0


class Server:
    """Listens from construction on; ``close`` ends every connection."""

    def __init__(
        self, context: RankContext, send_queue: SendQueue, port: int, on_release: Callable[[str], None] | None = None,
        on_meet: Callable[[str], None] | None = None,
    ) -> None:  # fmt: skip
        """Bind the port and start to accept.

        Args:
            on_release: called with the transfer id of each RELEASE from the proxy, besides the send queue.
            on_meet: called with the address of each MEET; None on a prefill engine.

        Raises:
            OSError: the port cannot be bound.
        """
        self._on_release, self._on_meet = on_release, on_meet
        self._context, self._send_queue = context, send_queue
        family = socket.AF_INET6 if ":" in context.settings.listen else socket.AF_INET
        self._socket = socket.create_server((context.settings.listen, port), family=family, backlog=128)
        self.port: int = self._socket.getsockname()[1]
        self._connections = OpenConnections(context.settings.max_connections)
        self._rejected = Tally("connections to the KV port were rejected", logger.warning)
        if context.settings.peers_too_narrow:
            logger.warning("listen is %s, but peers has loopback only: connections from other hosts are refused",
                           context.settings.listen)  # fmt: skip
        self._closed = threading.Event()
        threading.Thread(target=self._listen, name="disagg-kv-listen", daemon=True).start()

    def close(self) -> None:
        self._closed.set()
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self.disconnect()

    def disconnect(self) -> None:
        """End every connection; new ones are still accepted."""
        for channel in self._connections.all():
            channel.close()

    def connections(self) -> int:
        return len(self._connections.all())

    def _listen(self) -> None:
        while not self._closed.is_set():
            try:
                sock, peer = self._socket.accept()
            except OSError as error:
                if self._closed.wait(0.1):
                    return
                logger.warning("cannot accept a connection on the KV port: %s", error)
                continue
            channel: Channel | None = None
            try:
                if not self._context.settings.may_connect(peer[0]):
                    self._rejected.add([f"{peer[0]} is not in the networks of the setting peers"])
                    sock.close()
                    continue
                channel = Channel(sock, min(_READ_SECONDS, self._context.settings.stall_timeout_s))
                oldest = self._connections.add(channel)
                if oldest is not None:
                    self._rejected.add(["too many connections without a completed handshake"])
                    oldest.close()
                if self._closed.is_set():
                    channel.close()
                threading.Thread(
                    target=self._serve, args=(channel, f"{peer[0]}:{peer[1]}"), name="disagg-kv-serve", daemon=True
                ).start()
            except Exception:
                logger.exception("could not set up a connection from %s", peer)
                if channel is not None:
                    self._connections.remove(channel)
                sock.close()

    def _serve(self, channel: Channel, peer: str) -> None:
        """Serve one connection until it closes."""
        decode_peer = self._send_queue.attach(channel.close)
        try:
            channel.limit(_HANDSHAKE_SECONDS)
            identity, hello = self._handshake(channel)
            self._connections.prove(channel)
            channel.limit(None)
            if identity.role == "control":
                self._control(channel)
            else:
                self._decode(channel, decode_peer, peer, hello)
        except Refused as refusal:
            logger.warning("refused the engine at %s: %s", peer, refusal)
            with contextlib.suppress(OSError):
                channel.write(encode(Kind.REFUSE, {"reason": str(refusal)[:1000]}))
        except Closed:
            logger.debug("%s closed its connection", peer)
        except (OSError, WireError, ValueError, RuntimeError) as error:
            if self._closed.is_set() or decode_peer.closed:
                return
            logger.warning("closed the connection from %s: %s: %s", peer, type(error).__name__, error)
        except Exception:
            logger.exception("closed the connection from %s", peer)
        finally:
            self._send_queue.detach(decode_peer)
            channel.close()
            self._connections.remove(channel)

    def _handshake(self, channel: Channel) -> tuple[Identity, dict[str, Any]]:
        kind, hello = channel.next_frame(may_idle=False)
        if kind is not Kind.HELLO:
            raise WireError(f"received {kind.name} before HELLO")
        identity = Identity.from_wire(hello)
        if identity.role == "prefill":
            raise Refused("a prefill engine cannot fetch KV")
        check(self._context.identity, identity)
        welcome = {**self._context.identity.to_wire(), "nonce": nonce(), PINGS: True}
        if identity.role == "decode":
            here = self._context.place
            names, _ = rank_transports(self._context.transports(), here, Place.from_wire(hello.get(PLACE)))
            welcome |= {PLACE: here.to_wire(), "transport": choose_transport(names, hello.get("transports"))}
        elif identity.role == "control" and self._context.announcement is not None:
            welcome[ANNOUNCED] = announced_field(self._context.announcement())
        secret = self._context.settings.secret
        channel.write(
            encode(Kind.WELCOME, {**welcome, "proof": proof(secret, self._context.identity.role, hello, welcome)})
        )
        kind, answer = channel.next_frame(may_idle=False)
        if kind is not Kind.PROOF:
            raise WireError(f"received {kind.name}, expected PROOF")
        check_proof(proof(secret, identity.role, hello, welcome), answer.get("proof"))
        return identity, {**hello, "chosen": welcome.get("transport")}

    def _control(self, channel: Channel) -> None:
        channel.write(encode(Kind.READY, {}))
        while True:
            kind, body = channel.next_frame()
            if kind is Kind.MEET and self._on_meet is not None:
                address = str(body.get("from"))
                if not self._context.settings.may_fetch_from(address):
                    raise WireError(f"{address} is not in the networks of the setting peers")
                self._on_meet(address)
                continue
            if kind is not Kind.RELEASE:
                raise WireError(f"unexpected {kind.name} on a control connection")
            release = Release.decode(body)
            self._send_queue.on_release(None, release)
            if self._on_release is not None:
                self._on_release(release.transfer)

    def _decode(self, channel: Channel, decode_peer: DecodePeer, peer: str, hello: dict[str, Any]) -> None:
        ready = offer_transport(self._context, hello["chosen"], hello.get("staging"))
        channel.write(encode(Kind.READY, ready))
        sender = threading.Thread(
            target=self._send, args=(channel, decode_peer, peer, hello, ready), name="disagg-kv-send", daemon=True
        )
        sender.start()
        while True:
            kind, body = channel.next_frame()
            if kind is Kind.WANT:
                self._send_queue.on_want(decode_peer, Want.decode(body))
            elif kind is Kind.RELEASE:
                self._send_queue.on_release(decode_peer, Release.decode(body))
            elif kind is Kind.PING:
                # Answered by this thread, because the sender may wait for a long step. Only KV being sent delays PONG.
                if not channel.try_write(PONG):
                    self._send_queue.enqueue(decode_peer, PONG)
            elif kind is Kind.DONE:
                channel.on_acknowledgement()
            else:
                raise WireError(f"unexpected {kind.name} on a prefill engine")

    def _send(
        self, channel: Channel, decode_peer: DecodePeer, peer: str, hello: dict[str, Any], ready: dict[str, Any]
    ) -> None:
        """Run the sender thread of a decode connection; its end ends the connection."""
        transport: Transport | None = None
        try:
            transport = open_transport(self._context, channel, ready)
            logger.info("decode engine at %s connected (%s%s)", peer, transport.name, _left_out(hello))
            while (item := self._send_queue.next(decode_peer)) is not None:
                if isinstance(item, bytes):
                    with channel.write_lock:
                        channel.write(item)
                else:
                    self._send_segment(channel, decode_peer, transport, item)
        except Exception as error:
            if not decode_peer.closed or isinstance(error, Stalled):
                logger.warning("stopped sending to %s: %s: %s", peer, type(error).__name__, error)
        finally:
            channel.close()
            if transport is not None:
                transport.close()

    def _send_segment(self, channel: Channel, decode_peer: DecodePeer, transport: Transport, segment: Segment) -> None:
        ok, trace, cache = False, self._context.trace, self._context.cache
        count = len(segment.blocks)
        try:
            parts = self._context.overlaps(transport.name) and cache.layered(segment.fence)
            cache.join(segment.fence, 1 if parts else cache.planes)
            trace("go", key=segment.key.transfer, blocks=count, last=segment.last, parts=parts)
            with channel.write_lock:
                channel.write(Go(segment.key, segment.first, count, segment.last, parts).encode())
                transport.send(segment.blocks, segment.fence, parts)
            if parts:
                cache.join(segment.fence, cache.planes)
            ok = True
            trace("sent", key=segment.key.transfer, bytes=count * cache.block_bytes, computed=transport.computed_at)
        finally:
            self._send_queue.on_sent(decode_peer, segment, ok)


def _left_out(hello: dict[str, Any]) -> str:
    """Which transports decode does not offer because they failed to open before."""
    reasons = hello.get("left_out")
    if not isinstance(reasons, dict):
        return ""
    return "".join(f"; {str(name)[:20]} failed: {str(why)[:200]}" for name, why in list(reasons.items())[:4])
