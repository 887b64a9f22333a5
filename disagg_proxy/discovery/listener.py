"""The registration port: a ZMQ socket that instances ping, read by its own thread.

The socket is a DEALER, like those of the instances. A ROUTER, as in vLLM's example proxy, identifies connections by the
identity that the peer chooses, and instances use their KV address for it. Another sender with that identity would then
either replace the instance (ROUTER_HANDOVER) or block it. This end sends nothing, so it needs no identities.

The thread only reads, decodes and delivers; the registry stays on the event loop. No message can end the thread: what
is not a permitted ping is counted, logged once per sender and dropped.
"""

from __future__ import annotations

import ipaddress
import logging
import socket
import threading
from collections.abc import Callable
from dataclasses import replace

import zmq

from disagg_proxy.discovery.allow import AllowList
from disagg_proxy.discovery.announcement import Announcement, BadAnnouncement, decode
from disagg_proxy.telemetry.stats import RegistrationCounts

log = logging.getLogger(__name__)

_KEEPALIVE = 3
"""Seconds between TCP keepalives; a dead peer is closed after four of these. ZMQ heartbeats are not used: with them
libzmq 4.3.5 aborts the process when a peer that it has stopped reading from disconnects (``!_io_error``,
``stream_engine_base.cpp``), which any sender can provoke."""

_MAX_WIRE_BYTES = 1024 * 1024
"""libzmq closes a connection with a longer message. Messages between this and MAX_BYTES are counted as oversized."""

_MAX_SENDERS = 1024
"""Bound on the senders whose dropped messages are logged, and on the messages read in one batch."""


class BindError(Exception):
    """The registration port cannot be opened."""


class Listener:
    """Binds the registration port and reads pings from it.

    Args:
        host, port: the address to bind; 0 picks a free port.
        allow: who may register.
        deliver: called in the listener's thread with each batch of announcements.

    Attributes:
        traffic: counts of messages.
        port: the bound port.

    Raises:
        BindError: the port cannot be bound.
    """

    def __init__(self, host: str, port: int, allow: AllowList, deliver: Callable[[list[Announcement]], None]) -> None:
        self.traffic = RegistrationCounts()
        self.allow = allow
        self._deliver = deliver
        self._warned: set[tuple[str, str]] = set()
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._stop_name = f"inproc://stop-{id(self)}"
        self._stopper = self._context.socket(zmq.PAIR)
        self._stopper.bind(self._stop_name)
        self._configure()
        try:
            self._socket.bind(_endpoint(host, port))
        except (OSError, zmq.ZMQError) as error:
            self._context.destroy(linger=0)
            raise BindError(f"cannot listen for instances on {host}:{port} (PROXY_HOST, PROXY_PORT): {error}") from None
        endpoint = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self.port = int(endpoint.rpartition(":")[2])
        self._thread = threading.Thread(target=self._run, name="discovery", daemon=True)

    def _configure(self) -> None:
        options = {
            zmq.LINGER: 0,
            zmq.IPV6: 1,
            zmq.TCP_KEEPALIVE: 1,
            zmq.TCP_KEEPALIVE_IDLE: _KEEPALIVE,
            zmq.TCP_KEEPALIVE_INTVL: _KEEPALIVE,
            zmq.TCP_KEEPALIVE_CNT: 3,
            zmq.MAXMSGSIZE: _MAX_WIRE_BYTES,
            zmq.RCVHWM: 1000,
        }
        for option, value in options.items():
            self._socket.setsockopt(option, value)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread and close the socket."""
        if self._thread.is_alive():
            self._stopper.send(b"")
            self._thread.join()
        self._context.destroy(linger=0)

    def _run(self) -> None:
        stop = self._context.socket(zmq.PAIR)
        stop.connect(self._stop_name)
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(stop, zmq.POLLIN)
        try:
            while True:
                ready = dict(poller.poll())
                if stop in ready:
                    return
                try:
                    self._read_all()
                except Exception:
                    self.traffic.dropped["failed"] += 1
                    log.exception("Could not process a registration message")
        finally:
            stop.close(0)
            self._socket.close(0)

    def _read_all(self) -> None:
        """Read all messages that have arrived, and deliver the newest announcement of each instance as one batch."""
        found: dict[tuple[str, ...], Announcement] = {}
        for _ in range(_MAX_SENDERS):
            try:
                frames = self._socket.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                break
            announcement = self._read_one(frames)
            if announcement is not None:
                found[announcement.key] = announcement
        if found:
            self._deliver(list(found.values()))

    def _read_one(self, frames: list[zmq.Frame]) -> Announcement | None:
        self.traffic.messages += 1
        sender = _sender(frames)
        try:
            announcement = decode([frame.bytes for frame in frames])
            for host in (sender, announcement.http.host, announcement.kv.host):
                if self.allow.permits(host):
                    continue
                if self.allow.proven and announcement.provable:
                    return replace(announcement, unproven=True, sender=sender)
                raise BadAnnouncement("forbidden", f"{host} may not register (ALLOW_REGISTER)")
        except BadAnnouncement as error:
            self.drop(error.kind, sender, str(error))
            return None
        return announcement

    def drop(self, kind: str, sender: str, detail: str) -> None:
        """Count a dropped message, and log the first of each sender and kind."""
        self.traffic.dropped[kind] += 1
        if (sender, kind) not in self._warned and len(self._warned) < _MAX_SENDERS:
            self._warned.add((sender, kind))
            article = "an" if kind[0] in "aeiou" else "a"
            log.warning("Dropped %s %s registration from %s: %s", article, kind, sender, detail[:300])


def _sender(frames: list[zmq.Frame]) -> str:
    try:
        return str(frames[-1].get("Peer-Address")).removeprefix("::ffff:")
    except zmq.ZMQError:
        return "unknown"


def _endpoint(host: str, port: int) -> str:
    """The ZMQ endpoint for an address. libzmq binds addresses and device names only, so host names are resolved here.

    Raises:
        OSError: the name cannot be resolved.
    """
    try:
        ipaddress.ip_address(host)
        address = host
    except ValueError:
        address = str(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0])
    shown = f"[{address}]" if ":" in address else address
    return f"tcp://{shown}:{port or '*'}"
