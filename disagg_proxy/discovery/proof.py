"""Proves announcements that ALLOW_REGISTER does not permit by their addresses (the entry ``proven``).

An announcement counts once the handshake at its KV address has proved the shared secret and that the engine there sends
this announcement (``disagg_kv.protocol.proven``). Later pings with the same fields need no handshake.

What an unknown sender can cause is bounded: the number of handshakes at a time is limited by sender and in total, a
failed one is followed by a pause, and nothing is queued, since an engine's next ping comes 3 s later. A sender is
logged once.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import NamedTuple

from disagg_kv.control import Control
from disagg_kv.protocol.frames import WireError
from disagg_kv.protocol.handshake import Refused
from disagg_kv.protocol.proven import check_announced, digest_of
from disagg_proxy.discovery.announcement import Announcement, fields_of

log = logging.getLogger(__name__)

MAX_HANDSHAKES = 32
MAX_HANDSHAKES_OF_SENDER = 4

FAILURE_PAUSE = 1.0
"""Seconds for which a handshake that failed still counts against both limits."""

_MAX_PROVEN = 2048
"""Endpoints that are remembered; the one that was proven first is forgotten."""

_Endpoint = tuple[str, str]
"""HTTP address and KV address."""


class _Proof(NamedTuple):
    """Digest of the proven fields, and the names of those that are not proven."""

    digest: str
    without: tuple[str, ...]


class Proofs:
    """Passes proven announcements on. Runs on the event loop.

    Args:
        secret: shared with the engines.
        timeout: seconds for the connection, and again for the handshake.
        deliver: called with the announcements that count.
        drop: called with kind, sender and reason of each announcement that a handshake has refuted.
    """

    def __init__(
        self,
        secret: str,
        timeout: float,
        deliver: Callable[[list[Announcement]], None],
        drop: Callable[[str, str, str], None],
    ) -> None:
        self._secret, self.timeout = secret, timeout
        self._deliver, self._drop = deliver, drop
        self._proven: OrderedDict[_Endpoint, _Proof] = OrderedDict()
        self._running: dict[tuple[_Endpoint, str], asyncio.Task[None]] = {}
        """By sender too, so that a forged announcement does not hold up the engine's own."""
        self._by_sender: Counter[str] = Counter()

    def take(self, announcements: list[Announcement]) -> None:
        """Deliver the announcements that need no proof or have one; begin to prove the others."""
        if counting := [one for one in announcements if not one.unproven or self._is_proven(one)]:
            self._deliver(counting)
        for one in announcements:
            if one.unproven and one not in counting:
                self._begin(one)

    async def stop(self) -> None:
        """Cancel all handshakes."""
        tasks = list(self._running.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _is_proven(self, announcement: Announcement) -> bool:
        proof = self._proven.get(_endpoint(announcement))
        if proof is None:
            return False
        try:
            return digest_of(fields_of(announcement), proof.without) == proof.digest
        except ValueError:
            return False

    def _begin(self, announcement: Announcement) -> None:
        key = (_endpoint(announcement), announcement.sender)
        sender = announcement.sender
        if (
            key in self._running
            or len(self._running) >= MAX_HANDSHAKES
            or self._by_sender[sender] >= MAX_HANDSHAKES_OF_SENDER
        ):
            return
        self._by_sender[sender] += 1
        task = asyncio.get_running_loop().create_task(self._prove(announcement), name=f"proof of {key[0][1]}")
        self._running[key] = task
        task.add_done_callback(lambda _: self._ended(key))

    def _ended(self, key: tuple[_Endpoint, str]) -> None:
        del self._running[key]
        sender = key[1]
        self._by_sender[sender] -= 1
        if not self._by_sender[sender]:
            del self._by_sender[sender]

    async def _prove(self, announcement: Announcement) -> None:
        fields = fields_of(announcement)
        try:
            control = await Control.open(announcement.kv.text, self._secret, self.timeout)
            await control.close()
            without = tuple(check_announced(control.announced, fields))
        except (Refused, WireError, ValueError, OSError, asyncio.TimeoutError) as error:
            reason = str(error) or "no answer in time"
            self._drop("unproven", announcement.sender, f"{announcement.kv.text} does not prove it: {reason}")
            await asyncio.sleep(FAILURE_PAUSE)
            return
        endpoint = _endpoint(announcement)
        self._proven[endpoint] = _Proof(digest_of(fields, without), without)
        self._proven.move_to_end(endpoint)
        while len(self._proven) > _MAX_PROVEN:
            self._proven.popitem(last=False)
        log.info("The registration of %s %s is proven", announcement.role.value, announcement.http.text)
        self._deliver([announcement])


def _endpoint(announcement: Announcement) -> _Endpoint:
    return announcement.http.netloc, announcement.kv.text
