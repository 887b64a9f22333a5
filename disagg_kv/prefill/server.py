"""The KV port of an engine: accepts decode engines and the proxy, and sends what they want.

One thread listens; each connection has one that reads and, once a decode engine has proved itself, one that sends.
Whatever a connection does wrong ends that connection only. Decode engines listen too, but have nothing to send: their
port lets the proxy see that the process lives, and release transfers.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
from collections.abc import Callable
from typing import Any

from disagg_kv.prefill.outbox import Lane, Outbox, Segment
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
from disagg_kv.transport.base import Stalled, Transport
from disagg_kv.transport.channel import Channel, Closed
from disagg_kv.transport.factory import Node, open_transport, terms

logger = logging.getLogger("vllm.disagg_kv")
_HANDSHAKE_SECONDS = 5.0


class Server:
    """Listens from the start; ``close`` ends every connection."""

    def __init__(
        self, node: Node, outbox: Outbox, port: int, on_release: Callable[[str], None] | None = None,
        on_meet: Callable[[str], None] | None = None,
    ) -> None:  # fmt: skip
        """``on_release`` is told, besides the outbox, which transfers the proxy releases; ``on_meet`` to which prefill
        engine it wants a connection. OSError if the port cannot be bound."""
        self._on_release, self._on_meet = on_release, on_meet
        self._node, self._outbox = node, outbox
        family = socket.AF_INET6 if ":" in node.settings.listen else socket.AF_INET
        self._socket = socket.create_server((node.settings.listen, port), family=family, backlog=128)
        self.port: int = self._socket.getsockname()[1]
        self._lock = threading.Lock()
        self._channels: set[Channel] = set()
        self._closed = threading.Event()
        threading.Thread(target=self._listen, name="disagg-kv-listen", daemon=True).start()

    def close(self) -> None:
        self._closed.set()
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self.disconnect()

    def disconnect(self) -> None:
        """Ends every connection; new ones are still accepted."""
        with self._lock:
            channels = list(self._channels)
        for channel in channels:
            channel.close()

    def connections(self) -> int:
        with self._lock:
            return len(self._channels)

    def _listen(self) -> None:
        while not self._closed.is_set():
            try:
                sock, peer = self._socket.accept()
            except OSError as error:
                if self._closed.wait(0.1):
                    return
                logger.warning("the KV port cannot accept a connection: %s", error)
                continue
            channel: Channel | None = None
            try:
                channel = Channel(sock, min(_HANDSHAKE_SECONDS, self._node.settings.stall_timeout_s))
                with self._lock:
                    if self._closed.is_set() or len(self._channels) >= self._node.settings.max_connections:
                        logger.warning("a connection from %s is refused: there are too many", peer[0])
                        channel.close()
                        continue
                    self._channels.add(channel)
                threading.Thread(
                    target=self._serve, args=(channel, f"{peer[0]}:{peer[1]}"), name="disagg-kv-serve", daemon=True
                ).start()
            except Exception:
                logger.exception("a connection from %s could not be set up", peer)
                with self._lock:
                    self._channels = {kept for kept in self._channels if kept is not channel}
                sock.close()

    def _serve(self, channel: Channel, peer: str) -> None:
        """One connection, from its first byte to its end."""
        lane = self._outbox.attach(channel.close)
        try:
            identity, hello = self._handshake(channel)
            if identity.role == "control":
                self._control(channel)
            else:
                self._decode(channel, lane, peer, hello)
        except Refused as refusal:
            logger.warning("the engine at %s is refused: %s", peer, refusal)
            with contextlib.suppress(OSError):
                channel.write(encode(Kind.REFUSE, {"reason": str(refusal)[:1000]}))
        except Closed:
            logger.debug("%s has closed its connection", peer)
        except (OSError, WireError, ValueError, RuntimeError) as error:
            if self._closed.is_set() or lane.closed:
                return
            logger.warning("the connection of %s is ended: %s: %s", peer, type(error).__name__, error)
        except Exception:
            logger.exception("the connection of %s is ended", peer)
        finally:
            self._outbox.detach(lane)
            channel.close()
            with self._lock:
                self._channels.discard(channel)

    def _handshake(self, channel: Channel) -> tuple[Identity, dict[str, Any]]:
        kind, hello = channel.frame(patient=False)
        if kind is not Kind.HELLO:
            raise WireError(f"{kind.name} came before HELLO")
        identity = Identity.from_wire(hello)
        if identity.role == "prefill":
            raise Refused("a prefill engine has nothing to ask for")
        check(self._node.identity, identity)
        welcome = {**self._node.identity.to_wire(), "nonce": nonce(), PINGS: True}
        if identity.role == "decode":
            welcome["transport"] = choose_transport(self._node.transports(), hello.get("transports"))
        secret = self._node.settings.secret
        channel.write(
            encode(Kind.WELCOME, {**welcome, "proof": proof(secret, self._node.identity.role, hello, welcome)})
        )
        kind, answer = channel.frame(patient=False)
        if kind is not Kind.PROOF:
            raise WireError(f"{kind.name} came instead of PROOF")
        check_proof(proof(secret, identity.role, hello, welcome), answer.get("proof"))
        return identity, {**hello, "chosen": welcome.get("transport")}

    def _control(self, channel: Channel) -> None:
        channel.write(encode(Kind.READY, {}))
        while True:
            kind, body = channel.frame()
            if kind is Kind.MEET and self._on_meet is not None:
                address = str(body.get("from"))
                if not self._node.settings.may_fetch_from(address):
                    raise WireError(f"{address} is not among the peers that KV may come from (setting peers)")
                self._on_meet(address)
                continue
            if kind is not Kind.RELEASE:
                raise WireError(f"{kind.name} is not for a control connection")
            release = Release.decode(body)
            self._outbox.release(None, release)
            if self._on_release is not None:
                self._on_release(release.transfer)

    def _decode(self, channel: Channel, lane: Lane, peer: str, hello: dict[str, Any]) -> None:
        ready = terms(self._node, hello["chosen"], hello.get("staging"))
        channel.write(encode(Kind.READY, ready))
        sender = threading.Thread(
            target=self._send, args=(channel, lane, peer, ready), name="disagg-kv-send", daemon=True
        )
        sender.start()
        while True:
            kind, body = channel.frame()
            if kind is Kind.WANT:
                self._outbox.want(lane, Want.decode(body))
            elif kind is Kind.RELEASE:
                self._outbox.release(lane, Release.decode(body))
            elif kind is Kind.PING:
                # From this thread: the sender may be waiting for a long step. Only KV on its way delays the answer.
                if not channel.write_between(PONG):
                    self._outbox.post(lane, PONG)
            else:
                raise WireError(f"{kind.name} is not for a prefill engine")

    def _send(self, channel: Channel, lane: Lane, peer: str, ready: dict[str, Any]) -> None:
        """The sender thread of a decode connection; its end ends the connection."""
        transport: Transport | None = None
        try:
            transport = open_transport(self._node, channel, ready)
            logger.info("decode engine at %s is connected (%s)", peer, transport.name)
            while (item := self._outbox.next(lane)) is not None:
                if isinstance(item, bytes):
                    with channel.turn:
                        channel.write(item)
                else:
                    self._send_segment(channel, lane, transport, item)
        except Exception as error:
            if not lane.closed or isinstance(error, Stalled):
                logger.warning("sending to %s has ended: %s: %s", peer, type(error).__name__, error)
        finally:
            channel.close()
            if transport is not None:
                transport.close()

    def _send_segment(self, channel: Channel, lane: Lane, transport: Transport, segment: Segment) -> None:
        ok, trace, cache = False, self._node.trace, self._node.cache
        count = len(segment.blocks)
        try:
            parts = self._node.overlaps(transport.name) and cache.layered(segment.fence)
            cache.join(segment.fence, 1 if parts else cache.planes)
            trace("go", key=segment.key.transfer, blocks=count, last=segment.last, parts=parts)
            with channel.turn:
                channel.write(Go(segment.key, segment.first, count, segment.last, parts).encode())
                transport.send(segment.blocks, segment.fence, parts)
            if parts:
                cache.join(segment.fence, cache.planes)
            ok = True
            trace("sent", key=segment.key.transfer, bytes=count * cache.block_bytes, computed=transport.computed_at)
        finally:
            self._outbox.sent(lane, segment, ok)
