"""Forwards pings to other proxies over the same engines, since an engine pings one address only.

Each ping goes unchanged, but for a mark, to the registration port of every other proxy. Marked pings are not forwarded
again, so proxies may name each other. Sending never blocks. What an unreachable proxy misses is repeated with the
engines' next pings, within 3 s.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

import zmq

from disagg_proxy.address import Address
from disagg_proxy.discovery.announcement import Announcement, passed_on

log = logging.getLogger(__name__)

_MAX_QUEUED = 1000
"""Messages that may be queued for one proxy."""


class Forwarder:
    """Sends pings to other proxies. Not thread-safe.

    Args:
        proxies: their registration ports.
    """

    def __init__(self, proxies: Iterable[Address]) -> None:
        self._proxies = list(proxies)
        self._context: zmq.Context[zmq.Socket[bytes]] | None = None
        self._sockets: list[zmq.Socket[bytes]] = []

    def open(self) -> None:
        """Connect; ZMQ reconnects when a proxy is back."""
        if not self._proxies:
            return
        self._context = zmq.Context()
        for proxy in self._proxies:
            socket = self._context.socket(zmq.DEALER)
            # Nothing is queued for an unreachable proxy: old pings would announce instances that are gone.
            options = {
                zmq.LINGER: 0,
                zmq.IMMEDIATE: 1,
                zmq.IPV6: 1,
                zmq.SNDHWM: _MAX_QUEUED,
                zmq.RECONNECT_IVL_MAX: 2000,
            }
            for option, value in options.items():
                socket.setsockopt(option, value)
            socket.connect(f"tcp://{proxy.netloc}")
            self._sockets.append(socket)
            log.info("Forwarding registrations to %s", proxy.text)

    def forward(self, announcements: Iterable[Announcement]) -> None:
        """Send the announcements that came from an engine directly."""
        if not self._sockets:
            return
        for announcement in announcements:
            if announcement.passed_on:
                continue
            text = passed_on(announcement)
            for socket in self._sockets:
                try:
                    socket.send(text, zmq.NOBLOCK)
                except zmq.Again:
                    continue

    def close(self) -> None:
        """Disconnect."""
        if self._context is not None:
            self._context.destroy(linger=0)
        self._sockets.clear()
