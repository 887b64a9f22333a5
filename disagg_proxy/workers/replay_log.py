"""What the supervisor remembers for workers that start later: who has announced itself, and who has sent to whom.

It judges nothing: each worker's registry does.
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

_FORGET_AFTER = 90.0
"""Seconds without a ping after which a slot may be given to another instance, where none is free. A registry that still
remembers the one before, as it may be hung, then counts only its own load on it."""

_SAME_END = 5_000_000_000
"""Nanoseconds within which several workers notice the same end of a process."""

_MAX_SENT = 65536
_MAX_ENDED = 4096


@dataclass(slots=True)
class _Known:
    slot: int
    text: bytes
    at: float


class ReplayLog:
    """All that is passed on.

    Args:
        expiry: seconds for which a ping is worth telling.
    """

    def __init__(self, config: Config, slots: RowIndex) -> None:
        self._expiry = config.instance_expiry
        self._slots = slots
        self._known: dict[tuple[str, str], _Known] = {}
        self._static: dict[str, int] = {}
        self._sent: dict[tuple[str, str], int] = {}
        self._ended: dict[str, tuple[str, int]] = {}
        for named in (*config.prefill, *config.decode):
            key = parse_address(named.http_address).netloc
            slot = slots.of(key)
            if slot is not None:
                self._static[key] = slot

    def announced(self, announcement: Announcement, now: float) -> Message | None:
        """What to tell all workers of a ping; None when there are too many instances."""
        key = announcement.http.netloc
        slot = self._slots.of(key)
        if slot is None:
            self._make_room(now)
            slot = self._slots.of(key)
        if slot is None:
            log.warning("The registration of %s is not accepted: too many instances", announcement.http.text)
            return None
        self._known[(key, announcement.kv.text)] = _Known(slot, announcement.raw, now)
        return ["ping", slot, announcement.raw]

    def _make_room(self, now: float) -> None:
        for name, known in list(self._known.items()):
            if now - known.at > _FORGET_AFTER:
                del self._known[name]
        alive = {key for key, _ in self._known} | self._static.keys()
        for key in self._slots.keys() - alive:
            self._slots.free(key)

    def heard(self, message: Message) -> Message | None:
        """What to tell all workers of one worker's message; None when it is known."""
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

    def all_of_it(self, now: float) -> Iterator[tuple[Message, object]]:
        """Everything for a worker that starts, each message with its name."""
        for key, slot in self._static.items():
            yield ["slot", slot, key], ("slot", slot)
        for key, (kv, at) in self._ended.items():
            yield ["ended", key, kv, at], ("ended", key)
        for (prefill, kv), at in self._sent.items():
            yield ["sent", prefill, kv, at], ("sent", prefill, kv)
        for name, known in sorted(self._known.items(), key=_slot):
            if now - known.at < self._expiry:
                yield ["ping", known.slot, known.text], ("ping", *name)
        yield ["whole"], ("whole",)


def _slot(item: tuple[tuple[str, str], _Known]) -> int:
    return item[1].slot


def name_of(message: Message) -> object:
    """Under which name a message may be replaced by a newer one."""
    if message[0] == "sent":
        return ("sent", message[1], message[2])
    return (message[0], message[1])
