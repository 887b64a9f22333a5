"""The ZMQ socket that instances ping, in a thread of its own.

The socket is a DEALER, as the instances' own are: a ROUTER, which vLLM's example has here, files connections by the
identity that each peer gives itself, and instances use their KV address for it. A stranger with that identity is then
either listened to instead of the instance (ROUTER_HANDOVER), or keeps it out. This end sends nothing, so it needs none.

The thread only reads, decodes and hands over; registry and event loop stay on their own thread. Nothing that
arrives can end it: whatever is not a permitted ping is counted, logged once per sender and dropped.
"""

from __future__ import annotations

import ipaddress
import logging
import socket
import threading
from collections.abc import Callable

import zmq

from disagg_proxy.discovery.allow import AllowList
from disagg_proxy.discovery.announcement import Announcement, BadAnnouncement, decode
from disagg_proxy.telemetry.stats import RegistrationCounts

log = logging.getLogger(__name__)

_KEEPALIVE = 3
"""Seconds; half-open peers go after four of these. Not by ZMQ's own heartbeats: with those, libzmq 4.3.5 aborts the
whole process when a peer that it has stopped reading from goes away (``!_io_error``, ``stream_engine_base.cpp``), and
any stranger can bring that about."""

_MAX_WIRE_BYTES = 1024 * 1024
"""libzmq closes a connection that announces a longer message; shorter ones are counted as oversized."""

_MAX_REMEMBERED = 1024
"""Senders and pending announcements that are kept at most."""


class BindError(Exception):
    """The registration port cannot be opened."""


class Listener:
    """Socket on ``host:port``.

    Args:
        deliver: called in the listener's thread with all announcements that arrived together.
    """

    def __init__(self, host: str, port: int, allow: AllowList, deliver: Callable[[list[Announcement]], None]) -> None:
        self.traffic = RegistrationCounts()
        self._allow = allow
        self._deliver = deliver
        self._blamed: set[tuple[str, str]] = set()
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
        """Begin to read."""
        self._thread.start()

    def stop(self) -> None:
        """Close the socket and wait for the thread."""
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
                    log.exception("A registration message could not be handled")
        finally:
            stop.close(0)
            self._socket.close(0)

    def _read_all(self) -> None:
        """Take what is there, newest announcement of each instance last, and deliver it in one go."""
        found: dict[tuple[str, str], Announcement] = {}
        for _ in range(_MAX_REMEMBERED):
            try:
                frames = self._socket.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                break
            announcement = self._read_one(frames)
            if announcement is not None:
                found[(announcement.http.netloc, announcement.kv.text)] = announcement
        if found:
            self._deliver(list(found.values()))

    def _read_one(self, frames: list[zmq.Frame]) -> Announcement | None:
        self.traffic.messages += 1
        sender = _sender(frames)
        try:
            announcement = decode([frame.bytes for frame in frames])
            for host in (sender, announcement.http.host, announcement.kv.host):
                if not self._allow.permits(host):
                    raise BadAnnouncement("forbidden", f"{host} may not register (ALLOW_REGISTER)")
        except BadAnnouncement as error:
            self.drop(error.kind, sender, str(error))
            return None
        return announcement

    def drop(self, kind: str, sender: str, detail: str) -> None:
        """Count a message that is not used, and say so once per sender and kind."""
        self.traffic.dropped[kind] += 1
        if (sender, kind) not in self._blamed and len(self._blamed) < _MAX_REMEMBERED:
            self._blamed.add((sender, kind))
            log.warning("Dropped a %s registration from %s: %s", kind, sender, detail[:300])


def _sender(frames: list[zmq.Frame]) -> str:
    try:
        return str(frames[-1].get("Peer-Address")).removeprefix("::ffff:")
    except zmq.ZMQError:
        return "unknown"


def _endpoint(host: str, port: int) -> str:
    """libzmq binds addresses and device names only, so names are looked up here.

    Raises:
        OSError: the name is not known.
    """
    try:
        ipaddress.ip_address(host)
        address = host
    except ValueError:
        address = str(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0])
    shown = f"[{address}]" if ":" in address else address
    return f"tcp://{shown}:{port or '*'}"
