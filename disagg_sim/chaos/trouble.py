"""Injects each kind of fault into an engine, and removes it again."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from disagg_sim.chaos.engines import LedgerEngine
from disagg_sim.chaos.machine import Machine, Slot
from disagg_sim.chaos.plan import Trouble

log = logging.getLogger(__name__)

_WEDGED = 30.0
"""Seconds within which a decode whose KV listener hangs is detected and restarted under load."""

_STOP, _GO = 0.05, 0.02
"""Seconds that a slowed engine pauses and runs, alternately."""


@dataclass(frozen=True)
class Window:
    """When a fault was present, in seconds since the start of the run."""

    kind: str
    begun: float
    ended: float


class TroubleMaker:
    """Injects faults into ``machine``.

    Args:
        now: the run's clock.
        supervised: whether prefills are restarted together with a killed decode.

    Attributes:
        done: number of faults by kind; "KIND skipped" if the engine was down or had that fault already.
        orphaned_prefills: KV addresses of decodes that were restarted while prefills that know them kept running.
    """

    def __init__(self, machine: Machine, now: Callable[[], float], *, supervised: bool) -> None:
        self._machine = machine
        self._now = now
        self._supervised = supervised
        self._present: set[tuple[str, Slot]] = set()
        self.done: Counter[str] = Counter()
        self.windows: list[Window] = []
        self.orphaned_prefills: set[str] = set()
        self.prefills_restarted = 0

    async def make(self, trouble: Trouble) -> None:
        """Inject one fault; returns when it is over."""
        machine = self._machine
        slot = (machine.prefills if trouble.role == "prefill" else machine.decodes)[trouble.target]
        begun = self._now()
        if not slot.up or (trouble.kind, slot) in self._present:
            self.done[f"{trouble.kind} skipped"] += 1
            return
        log.info("%s: %s", trouble.kind, slot.engine.name)
        self.done[trouble.kind] += 1
        self._present.add((trouble.kind, slot))
        try:
            await _KINDS[trouble.kind](self, slot, trouble)
        finally:
            self._present.discard((trouble.kind, slot))
            self.windows.append(Window(trouble.kind, begun, self._now()))

    # For the next requests; removed at the end if there were none.

    async def _fail(self, slot: Slot, trouble: Trouble) -> None:
        slot.engine.faults.fail_next(trouble.status, times=trouble.times)
        await self._clear(slot.engine, trouble.seconds)

    async def _reset(self, slot: Slot, trouble: Trouble) -> None:
        slot.engine.faults.reset_next(times=trouble.times)
        await self._clear(slot.engine, trouble.seconds)

    async def _clear(self, engine: LedgerEngine, seconds: float) -> None:
        await asyncio.sleep(seconds)
        engine.forget_faults()

    async def _cut(self, slot: Slot, trouble: Trouble) -> None:
        slot.engine.faults.cut_stream_after(trouble.tokens, times=trouble.times)
        await self._clear(slot.engine, trouble.seconds)

    # For a limited time.

    async def _refuse(self, slot: Slot, trouble: Trouble) -> None:
        engine = slot.engine
        engine.faults.refuse_connections()
        await asyncio.sleep(trouble.seconds)
        if slot.up and slot.engine is engine:
            self._machine.excuse_waiting(slot)
        while slot.up and slot.engine is engine:
            try:
                engine.faults.accept_connections()
                break
            except OSError:
                # The kernel chose this port, so an outgoing connection may use it for a short time.
                await asyncio.sleep(0.1)

    async def _slow(self, slot: Slot, trouble: Trouble) -> None:
        faults, end = slot.engine.faults, self._now() + trouble.seconds
        while self._now() < end:
            with faults.held("schedule"):
                await asyncio.sleep(_STOP)
            await asyncio.sleep(_GO)

    async def _freeze(self, slot: Slot, trouble: Trouble) -> None:
        with slot.engine.faults.held("forward"):
            await asyncio.sleep(trouble.seconds)

    async def _hang(self, slot: Slot, trouble: Trouble) -> None:
        engine = slot.engine
        engine.faults.hold("forward")
        if not self._supervised:
            await asyncio.sleep(trouble.seconds)
            engine.faults.release("forward")
        # The proxy detects it only while the engine has work.
        await self._until_healed(engine, slot, lambda: engine.faults.held_at is None, give_up=60.0)
        engine.faults.release("forward")

    async def _lose_kv(self, slot: Slot, trouble: Trouble) -> None:
        engine = slot.engine
        engine.faults.lose_kv(trouble.times)
        await asyncio.sleep(trouble.seconds)
        engine.faults.keep_kv()
        await self._until_healed(engine, slot, lambda: engine.state()["stalled_on"] is None, give_up=60.0)

    async def _until_healed(self, engine: LedgerEngine, slot: Slot, healed: Callable[[], bool], give_up: float) -> None:
        """Wait until an engine makes progress or was replaced, at most ``give_up`` seconds."""
        end = self._now() + give_up
        while slot.engine is engine and slot.up and not healed() and self._now() < end:
            await asyncio.sleep(0.1)

    async def _pings(self, slot: Slot, trouble: Trouble) -> None:
        faults = slot.engine.faults
        faults.pings = False
        await asyncio.sleep(trouble.seconds)
        faults.pings = True

    # With a restart.

    async def _kill_prefill(self, slot: Slot, trouble: Trouble) -> None:
        await self._machine.restart_prefill(slot, "killed", trouble.seconds)

    async def _kill_sending(self, slot: Slot, trouble: Trouble) -> None:
        await self._machine.restart_prefill(slot, "killed", trouble.seconds, while_sending=True)
        # The receiver is detected by the next two prefills that send to it.
        wedged = set(self._machine.ledger.wedged)
        end = self._now() + _WEDGED
        while wedged & self._machine.ledger.wedged and self._now() < end:
            await asyncio.sleep(0.1)

    async def _stop_prefill(self, slot: Slot, trouble: Trouble) -> None:
        await self._machine.restart_prefill(slot, "stopped", trouble.seconds)

    async def _kill_decode(self, slot: Slot, trouble: Trouble) -> None:
        if not self._supervised:
            self.orphaned_prefills.add(slot.engine.kv_address)
        self.prefills_restarted += await self._machine.kill_decode(slot, trouble.seconds, supervised=self._supervised)


_KINDS: dict[str, Callable[[TroubleMaker, Slot, Trouble], Awaitable[None]]] = {
    "5xx": TroubleMaker._fail,
    "reset": TroubleMaker._reset,
    "cut": TroubleMaker._cut,
    "refuse": TroubleMaker._refuse,
    "refuse-decode": TroubleMaker._refuse,
    "slow": TroubleMaker._slow,
    "freeze": TroubleMaker._freeze,
    "hang": TroubleMaker._hang,
    "lose-kv": TroubleMaker._lose_kv,
    "pings": TroubleMaker._pings,
    "kill-prefill": TroubleMaker._kill_prefill,
    "kill-sending": TroubleMaker._kill_sending,
    "stop-prefill": TroubleMaker._stop_prefill,
    "kill-decode": TroubleMaker._kill_decode,
}
