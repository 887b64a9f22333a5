"""Simulated engines with a ledger: which ids arrived, how often, and which failed because of an injected fault."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from disagg_proxy.runtime.within import within
from disagg_sim import Faults, SimConfig, SimEngine
from disagg_sim.chaos.work import CHAT, COMPLETIONS, MESSAGES, REFUSED_BY_DECODE
from disagg_sim.faults import Injected

ROUTES = (COMPLETIONS, CHAT, MESSAGES)
_KEY = re.compile(r"_([0-9a-f]{32})")
_TO = re.compile(r"___decode_addr_(.*?:\d+)_")
_RECENT = 1.0
"""A prefill that arrived within this time counts as unanswered when its engine is killed."""


def key_of(request_id: str) -> str:
    """Return the unique part of an id, which the proxy's and the engine's id share."""
    found = _KEY.search(request_id)
    return found[1] if found else request_id


@dataclass
class Ledger:
    """Observations on all engines of one run, and which of them injected faults explain.

    Attributes:
        excused: by key, why KV of that id may stay on its decode: the proxy cannot release it.
        twice: ids that one decode process received a second time.
        deaths: KV addresses of engines whose engine or KV listener died, and the cause.
        prefilled: keys of all prefills so far.
        repeated_to: KV addresses of decodes towards which a prefill was repeated; they count its KV twice.
        wedged: KV addresses of decodes whose listener waits for a prefill that was killed while sending.
    """

    excused: dict[str, str] = field(default_factory=dict)
    twice: list[str] = field(default_factory=list)
    deaths: list[tuple[str, str]] = field(default_factory=list)
    wedged: set[str] = field(default_factory=set)
    repeated_to: set[str] = field(default_factory=set)
    prefilled: set[str] = field(default_factory=set)
    prefills_repeated: int = 0
    injected: int = 0


class _Faults(Faults):
    def __init__(self, changed: Callable[[], None], note: Callable[[str, Injected | None], None]) -> None:
        super().__init__(changed)
        self._note = note

    def injected_for(self, path: str) -> Injected | None:
        # Not for probes: the kinds of faults that concern probes inject their own.
        injected = super().injected_for(path) if path in ROUTES else None
        self._note(path, injected)
        return injected

    def forget(self) -> None:
        """Remove injected faults that no request has met."""
        self._injected.clear()
        self._cuts.clear()


class LedgerEngine(SimEngine):
    """An engine that records requests in ``ledger`` instead of its list, which would grow with the bodies."""

    def __init__(self, config: SimConfig, ledger: Ledger) -> None:
        super().__init__(config)
        self._own_faults = _Faults(self._changed, self._note)
        self.faults = self._own_faults
        self.ledger = ledger
        self.sent_to: set[str] = set()
        self._seen: set[str] = set()
        self._refusable: set[str] = set()
        self._arrived: dict[str, float] = {}

    @property
    def name(self) -> str:
        """Role and HTTP address."""
        return f"{self.config.role} {self.http_address}"

    def forget_faults(self) -> None:
        """Remove injected faults and cuts that no request has met."""
        self._own_faults.forget()

    def _note(self, path: str, injected: Injected | None) -> None:
        record = self.requests.pop()
        if path not in ROUTES:
            return
        request_id = record.headers.get("X-Request-Id", "")
        key = key_of(request_id)
        self.ledger.injected += injected is not None
        if self.config.is_producer:
            self._note_prefill(request_id, key)
        else:
            self._note_decode(key, record.json, injected)

    def _note_prefill(self, request_id: str, key: str) -> None:
        now = asyncio.get_running_loop().time()
        to = _TO.search(request_id)
        if to is not None:
            self.sent_to.add(to[1])
        if key in self.ledger.prefilled:
            self.ledger.prefills_repeated += 1
            self.ledger.repeated_to.add(to[1] if to else "")
        self.ledger.prefilled.add(key)
        self._arrived[key] = now
        for old, at in list(self._arrived.items()):
            if now - at <= _RECENT:
                break
            del self._arrived[old]

    def _note_decode(self, key: str, body: Any, injected: Injected | None) -> None:
        if key in self._seen:
            if key in self._refusable:
                self._refusable.discard(key)
            else:
                self.ledger.twice.append(f"{key} on {self.name}")
        self._seen.add(key)
        if isinstance(body, dict) and body.get("user") == REFUSED_BY_DECODE and body.get("max_tokens") != 1:
            self._refusable.add(key)
        if injected is not None and injected.status in (429, 503) and injected.trick == "answer":
            # Rejected by the API server: a KV release may be repeated.
            self._refusable.add(key)
        if injected is not None:
            self.ledger.excused[key] = f"its decode failed by injection ({injected.trick}) before the engine got it"

    def in_progress(self) -> set[str]:
        """Keys of requests that this prefill computes or answered within the last second."""
        return {*self._arrived, *map(key_of, self.state()["running_ids"])}

    async def between_sends(self, seconds: float) -> None:
        """Let a prefill complete its KV transfer and start no other; times out after ``seconds`` if it is frozen."""
        self.faults.hold("forward")

        def between(state: dict[str, Any]) -> bool:
            at_rest = state["held_at"] == "forward" or not (state["running"] or state["waiting"])
            return at_rest and state["sender"] is None

        with suppress(asyncio.TimeoutError):
            async with within(seconds):
                await self.wait_until(between)

    async def while_sending(self, seconds: float) -> None:
        """Wait at most ``seconds`` until a prefill has announced a tensor but not sent it."""
        with suppress(asyncio.TimeoutError):
            async with within(seconds):
                await self.wait_until(lambda state: bool(state["sender"]))

    def record_end(self, how: str) -> None:
        """Record, before this engine ends, an earlier death and the prefills that end with it."""
        state = self.state()
        died = state["dead"] or (state["listener"] if state["listener"] != "alive" else None)
        if died:
            self.ledger.deaths.append((self.kv_address, f"{self.name}: {died}"))
        if self.config.is_producer:
            # Parts of their KV may have been sent and will not be requested; how much has arrived is unknown.
            if state["sender"]:
                self.ledger.wedged.add(state["sender"]["to"])
            for key in self.in_progress():
                self.ledger.excused[key] = f"its prefill was {how} before its 200"
