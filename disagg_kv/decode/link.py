"""Connections of decode to prefill engines: one per address, made when a request names it, dropped when it breaks.

Each has a thread that connects, shakes hands and then receives, and one that writes the small messages, so that the
engine's own thread never touches a socket. A peer that cannot be reached, or a connection that breaks, fails every
load from there at once.
"""

from __future__ import annotations

import logging
import math
import queue
import threading
import time

from disagg_kv.decode.inbox import Inbox, Load
from disagg_kv.decode.liveness import PROBES, Liveness
from disagg_kv.protocol.frames import Kind, WireError, encode
from disagg_kv.protocol.handshake import Identity, Refused, check, check_proof, nonce, proof
from disagg_kv.protocol.keys import Key, parse_address
from disagg_kv.protocol.messages import PING, PINGS, Go, Gone, Release
from disagg_kv.transport.base import Transport
from disagg_kv.transport.channel import Channel, Closed
from disagg_kv.transport.factory import Node, open_transport

logger = logging.getLogger("vllm.disagg_kv")
_CONNECT_SECONDS = 3.0
_OPEN_SECONDS = 30.0
"""After this long without being ready, a connection that is still being made is given up and made anew."""


class Link:
    """One connection and its two threads. ``peer`` names it, and the loads that wait for it: no other link has it."""

    def __init__(self, node: Node, inbox: Inbox, peer: str, address: tuple[str, int]) -> None:
        self._node, self._inbox, self.peer, self._address = node, inbox, peer, address
        self._outgoing: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._channel: Channel | None = None
        self.boot = ""
        self.compares_adapters = True
        self.dead = False
        self.ready = False
        self._started = time.monotonic()
        self._lost = ""
        self._receiving = False
        self._liveness: Liveness | None = None
        self._opening = threading.Timer(_OPEN_SECONDS, self._not_opened)
        self._opening.daemon = True
        self._opening.start()
        threading.Thread(target=self._run, name="disagg-kv-receive", daemon=True).start()

    def post(self, message: bytes) -> None:
        self._outgoing.put(message)

    @property
    def usable(self) -> bool:
        return not self.dead and (self.ready or time.monotonic() - self._started < _OPEN_SECONDS)

    def close(self, reason: str = "closed") -> None:
        """Ends the connection; every load that waits for it fails."""
        self.dead = True
        self._outgoing.put(None)
        if self._channel is not None:
            self._channel.close()

    def _run(self) -> None:
        reason, transport = "", None
        try:
            self._channel = channel = Channel.connect(
                self._address, self._node.settings.stall_timeout_s, _CONNECT_SECONDS
            )
            transport = self._handshake(channel)
            self.ready = True
            self._opening.cancel()
            if not self.compares_adapters:
                self._inbox.refuse_adapters(self.peer)
            logger.info("prefill engine %s is connected (%s, boot %s)", self.peer, transport.name, self.boot[:8])
            threading.Thread(target=self._write, args=(channel,), name="disagg-kv-write", daemon=True).start()
            while not self.dead:
                self._receive(channel, transport)
        except Refused as refusal:
            reason = f"refused: {refusal}"
            logger.error("no KV can be had from %s: %s", self.peer, refusal)
        except Closed:
            reason = "the prefill engine closed the connection"
        except (OSError, WireError, ValueError, RuntimeError) as error:
            reason = f"{type(error).__name__}: {error}"
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            logger.exception("the connection to %s is ended", self.peer)
        finally:
            self._opening.cancel()
            reason = self._lost or reason
            if not self.dead:
                logger.warning("the connection to prefill engine %s has ended: %s", self.peer, reason)
            self.dead = True
            self._outgoing.put(None)
            if self._channel is not None:
                self._channel.close()
            if transport is not None:
                transport.close()
            self._inbox.lost(self.peer, reason or "closed")

    def _handshake(self, channel: Channel) -> Transport:
        node, secret = self._node, self._node.settings.secret
        hello = {**node.identity.to_wire(), "nonce": nonce(), "transports": node.transports(),
                 "staging": node.staging_bytes}  # fmt: skip
        channel.write(encode(Kind.HELLO, hello))
        kind, welcome = channel.frame(patient=False)
        _expect(kind, welcome, Kind.WELCOME)
        theirs = Identity.from_wire(welcome)
        check(node.identity, theirs)
        check_proof(proof(secret, theirs.role, hello, welcome), welcome.get("proof"))
        channel.write(encode(Kind.PROOF, {"proof": proof(secret, node.identity.role, hello, welcome)}))
        kind, ready = channel.frame(patient=False)
        _expect(kind, ready, Kind.READY)
        self.boot = theirs.boot
        if welcome.get(PINGS) is True:
            self._liveness = Liveness(node.settings.stall_timeout_s)
        self.compares_adapters = theirs.shape is not None and theirs.shape.digest is not None
        return open_transport(node, channel, ready)

    def _receive(self, channel: Channel, transport: Transport) -> None:
        kind, body = channel.frame()
        if self._liveness is not None:
            self._liveness.heard()
        if kind is Kind.PONG:
            return
        if kind is Kind.GONE:
            gone = Gone.decode(body)
            logger.debug("KV of %s is gone: %s", gone.key.transfer, gone.reason)
            self._inbox.gone(self.peer, gone.key, gone.reason)
            return
        if kind is not Kind.GO:
            raise WireError(f"{kind.name} is not for a decode engine")
        go, ok = Go.decode(body), False
        if go.count > self._node.cache.num_blocks:
            raise WireError(f"{go.count} blocks are more than the cache has")
        load = self._inbox.go(self.peer, go)
        self._receiving = True
        self._node.trace("receive", key=go.key.transfer, blocks=go.count)
        try:
            blocks = None if load is None else load.blocks[load.filled : load.filled + go.count]
            transport.receive(blocks, go.count, None if load is None else load.fence, go.parts)
            ok = True
            self._node.trace("received", key=go.key.transfer, bytes=go.count * self._node.cache.block_bytes)
        finally:
            self._receiving = False
            if load is not None:
                if not ok:
                    transport.close()
                self._inbox.arrived(load, go.count, ok)

    def _write(self, channel: Channel) -> None:
        """Sends what is posted and, while loads wait, PING. An idle connection wakes nobody."""
        liveness, due = self._liveness, math.inf
        try:
            while True:
                if liveness is None or not self._inbox.waits_for(self.peer):
                    due = math.inf
                elif due == math.inf:
                    due = time.monotonic() + liveness.interval
                    liveness.begin()
                message: bytes | None = PING
                try:
                    message = self._outgoing.get(timeout=None if due == math.inf else max(0.0, due - time.monotonic()))
                except queue.Empty:
                    assert liveness is not None
                    due = time.monotonic() + liveness.interval
                    if not liveness.probe(self._receiving):
                        self._lost = f"the prefill engine has not answered {PROBES} liveness probes"
                        channel.close()
                        return
                if message is None:
                    return
                channel.write(message)
        except OSError:
            channel.close()

    def _not_opened(self) -> None:
        """NCCL waits indefinitely for a peer that stops while their communicator is made."""
        self.dead = True
        if not self.ready:
            # A reader that gets ready now sees ``dead`` before it writes any block.
            reason = f"not connected within {_OPEN_SECONDS:.0f} s"
            logger.warning("the connection to prefill engine %s is given up: %s", self.peer, reason)
            self.close()
            self._inbox.lost(self.peer, reason)


def _expect(kind: Kind, body: dict[str, object], wanted: Kind) -> None:
    if kind is Kind.REFUSE:
        raise Refused(str(body.get("reason", ""))[:1000])
    if kind is not wanted:
        raise WireError(f"{kind.name} came instead of {wanted.name}")


class Links:
    """All connections of one rank. Only ``meet`` may be called by another thread than the engine's."""

    def __init__(self, node: Node, inbox: Inbox) -> None:
        self._node, self._inbox = node, inbox
        self._links: dict[str, Link] = {}
        self._made = 0
        self._lock = threading.Lock()

    def meet(self, address: str) -> None:
        """Connects to the engine at this address, if there is no connection yet."""
        self._link(address)

    def start(self, load: Load, address: str) -> None:
        """Asks the engine at ``address`` (of its rank 0) for the blocks. A load that cannot even be asked for fails."""
        link = self._link(address)
        load.peer = link.peer if link is not None else ""
        self._inbox.start(load)
        if link is None:
            self._inbox.gone("", load.key, "too many connections")
        elif not load.failed:
            link.post(load.want().encode())
            if link.dead:
                self._inbox.gone(link.peer, load.key, "the connection broke")
            elif not link.compares_adapters:
                self._inbox.refuse_adapters(link.peer)

    def release(self, address: str, key: Key) -> None:
        """Tells an engine, if there is a connection to it, that the key is not needed."""
        link = self._links.get(address)
        if link is not None and link.usable:
            link.post(Release(key.transfer, key).encode())

    def give_up(self, unwanted: tuple[tuple[str, Key], ...]) -> None:
        """The same for loads that the inbox has given up; they are named by link."""
        if not unwanted:
            return
        with self._lock:
            by_name = {link.peer: link for link in self._links.values()}
        for peer, key in unwanted:
            if peer in by_name:
                by_name[peer].post(Release(key.transfer, key).encode())

    def close(self) -> None:
        with self._lock:
            links = list(self._links.values())
        for link in links:
            link.close()

    def _link(self, address: str) -> Link | None:
        with self._lock:
            return self._find_or_make(address)

    def _find_or_make(self, address: str) -> Link | None:
        link = self._links.get(address)
        if link is not None and link.usable:
            return link
        if link is not None:
            link.close()
        elif len(self._links) >= self._node.settings.max_connections:
            self._links = {name: link for name, link in self._links.items() if link.usable}
            if len(self._links) >= self._node.settings.max_connections:
                return None
        host, port = parse_address(address)
        self._made += 1
        link = Link(self._node, self._inbox, f"{address}#{self._made}", (host, port + self._node.identity.rank))
        self._links[address] = link
        return link
