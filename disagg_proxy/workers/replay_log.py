"""The messages that the supervisor keeps for workers that start later: pings, and the history of KV transfers.

Nothing is validated here: each worker's registry does that.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass

from disagg_proxy.address import parse_address
from disagg_proxy.config import Config
from disagg_proxy.discovery.announcement import Announcement
from disagg_proxy.workers.channel import Message
from disagg_proxy.workers.shared_load import RowIndex

log = logging.getLogger(__name__)

_EXPIRE_SLOT_AFTER = 90.0
"""Seconds without a ping after which a slot may be reassigned if none is free. A registry that still keeps the former
instance, since it may be hung, then counts only its own load on it."""

_SAME_END = 5_000_000_000
"""Nanoseconds within which two workers that report an end mean the same one."""

_MAX_SENT = 65536
_MAX_ENDED = 4096


@dataclass(slots=True)
class _Ping:
    slot: int
    text: bytes
    at: float


class ReplayLog:
    """The messages for new workers.

    Attributes:
        expiry: seconds after which a ping is not repeated.
    """

    def __init__(self, config: Config, slots: RowIndex) -> None:
        self.expiry = config.instance_expiry
        self._slots = slots
        self._pings: dict[tuple[str, str], _Ping] = {}
        self._static: dict[str, int] = {}
        self._sent: dict[tuple[str, str], int] = {}
        self._ended: dict[str, tuple[str, int]] = {}
        for named in (*config.prefill, *config.decode):
            key = parse_address(named.http_address).netloc
            slot = slots.slot_of(key)
            if slot is not None:
                self._static[key] = slot

    def on_ping(self, announcement: Announcement, now: float) -> Message | None:
        """Keep a ping. Returns the message for all workers, None if there are too many instances."""
        key = announcement.http.netloc
        slot = self._slots.slot_of(key)
        if slot is None:
            self._free_slots(now)
            slot = self._slots.slot_of(key)
        if slot is None:
            log.warning("The registration of %s is not accepted: too many instances", announcement.http.text)
            return None
        self._pings[(key, announcement.kv.text)] = _Ping(slot, announcement.raw, now)
        return ["ping", slot, announcement.raw]

    def _free_slots(self, now: float) -> None:
        for name, ping in list(self._pings.items()):
            if now - ping.at > _EXPIRE_SLOT_AFTER:
                del self._pings[name]
        alive = {key for key, _ in self._pings} | self._static.keys()
        for key in self._slots.keys() - alive:
            self._slots.free(key)

    def on_message(self, message: Message) -> Message | None:
        """Keep a ``sent`` or ``ended`` message of a worker. Returns it for the other workers, None if it is known."""
        if message[0] == "sent":
            _, prefill, kv, at = message
            if self._sent.get((prefill, kv), 0) >= at or len(self._sent) >= _MAX_SENT:
                return None
            self._sent[(prefill, kv)] = at
            return message
        _, key, kv, at = message
        if at - self._ended.get(key, ("", -_SAME_END))[1] < _SAME_END:
            return None
        if len(self._ended) >= _MAX_ENDED:
            self._ended.pop(next(iter(self._ended)))
        self._ended[key] = (kv, at)
        for prefill, to in list(self._sent):
            if prefill == key and self._sent[(prefill, to)] < at:
                del self._sent[(prefill, to)]
        return message

    def replay(self, now: float) -> Iterator[tuple[Message, object]]:
        """All messages for a worker that starts, each with its name; ``synced`` is the last."""
        for key, slot in self._static.items():
            yield ["slot", slot, key], ("slot", slot)
        for key, (kv, at) in self._ended.items():
            yield ["ended", key, kv, at], ("ended", key)
        for (prefill, kv), at in self._sent.items():
            yield ["sent", prefill, kv, at], ("sent", prefill, kv)
        for name, ping in sorted(self._pings.items(), key=_slot):
            if now - ping.at < self.expiry:
                yield ["ping", ping.slot, ping.text], ("ping", *name)
        yield ["synced"], ("synced",)


def _slot(item: tuple[tuple[str, str], _Ping]) -> int:
    return item[1].slot


def message_name(message: Message) -> object:
    """The name of a message: a newer one of the same name replaces it, see :meth:`Channel.send`."""
    if message[0] == "sent":
        return ("sent", message[1], message[2])
    return (message[0], message[1])
