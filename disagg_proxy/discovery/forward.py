"""Passing pings on to other proxies beside this one, since engines can ping one address only.

Each ping goes to every other proxy's registration port as it came, with a mark, and one that carries the mark is never
passed on again: proxies may name each other. Sending never waits. What a proxy that is away misses is repeated with the
engines' next pings, within 3 s.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

import zmq

from disagg_proxy.address import Address
from disagg_proxy.discovery.announcement import Announcement, passed_on

log = logging.getLogger(__name__)

_AT_ONCE = 1000
"""Messages that may wait for one proxy's connection to take them."""


class Forwarder:
    """Used by one thread.

    Args:
        proxies: their registration ports.
    """

    def __init__(self, proxies: Iterable[Address]) -> None:
        self._proxies = list(proxies)
        self._context: zmq.Context[zmq.Socket[bytes]] | None = None
        self._sockets: list[zmq.Socket[bytes]] = []

    def open(self) -> None:
        """Connect, now and whenever a proxy comes back."""
        if not self._proxies:
            return
        self._context = zmq.Context()
        for proxy in self._proxies:
            socket = self._context.socket(zmq.DEALER)
            # Nothing is kept for a proxy that is away: old pings would say that instances live that do not.
            options = {zmq.LINGER: 0, zmq.IMMEDIATE: 1, zmq.IPV6: 1, zmq.SNDHWM: _AT_ONCE, zmq.RECONNECT_IVL_MAX: 2000}
            for option, value in options.items():
                socket.setsockopt(option, value)
            socket.connect(f"tcp://{proxy.netloc}")
            self._sockets.append(socket)
            log.info("Registrations are passed on to %s", proxy.text)

    def pass_on(self, announcements: Iterable[Announcement]) -> None:
        """Send those that have come from an engine itself."""
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
