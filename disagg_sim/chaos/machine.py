"""The system under test: a real proxy and its engines in this process, connected over real sockets.

It also does what the supervisor of ``test_single_machine.sh`` does: it restarts a decode together with every prefill
that has sent to it (both are down before both start), because such a prefill would freeze
(docs/engine-behaviour.md), and it restarts engines that the proxy reports as ``restart_wanted``.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import replace
from typing import Any, Literal

from disagg_proxy.cluster.unavailable import missing_roles
from disagg_proxy.config import Config
from disagg_proxy.runtime.within import within
from disagg_proxy.server.http_server import Server, listen, server_config
from disagg_proxy.services import Services
from disagg_sim import SimConfig
from disagg_sim.chaos.engines import Ledger, LedgerEngine, key_of
from disagg_sim.chaos.work import MAX_MODEL_LEN, MODEL

PING, EXPIRY = 0.5, 2.0
"""Seconds: four pings per expiry, similar to vLLM's 3 s and 10 s."""

LEG_TIMEOUT = 10.0
"""Seconds for a prefill, and maximum idle time of a decode's stream."""

FREEZE_AFTER = 3.0
"""Seconds of a stall after which the proxy counts an engine as frozen."""

_SUPERVISOR_INTERVAL = 0.25
"""Seconds between the supervisor's checks of ``restart_wanted``."""

_BIND_TRIES = 50

_DOWN = 0.3
"""Seconds that a frozen engine stays down."""

_MOMENT = 1.0
"""Maximum seconds to wait for the right time to end a prefill."""


class _Server(Server):
    """A server that installs no signal handlers."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class Slot:
    """Successive engines on the same ports; ``lives`` counts them."""

    def __init__(self, engine: LedgerEngine) -> None:
        self.engine = engine
        self.lives = 1
        self.up = False

    async def start(self) -> None:
        """Start the current engine."""
        await self.engine.start()
        self.up = True

    async def end(self, how: Literal["killed", "stopped"], *, while_sending: bool = False) -> None:
        """End the engine.

        Args:
            while_sending: end a prefill during a KV transfer instead of between two. The receiving decode waits
                indefinitely for the rest, and so do all prefills that send to it.
        """
        engine = self.engine
        if engine.config.is_producer:
            await (engine.while_sending(_MOMENT) if while_sending else engine.between_sends(_MOMENT))
        self.up = False
        self.engine.record_end(how)
        await (self.engine.kill() if how == "killed" else self.engine.stop())

    async def restart(self) -> None:
        """Start a new engine on the addresses of the old one."""
        old = self.engine
        port, kv_port = (int(address.rpartition(":")[2]) for address in (old.http_address, old.kv_address))
        config = replace(old.config, port=port, kv_port=kv_port)
        for left in reversed(range(_BIND_TRIES)):
            self.engine = LedgerEngine(config, old.ledger)
            try:
                await self.start()
                break
            except OSError:
                # The kernel chose these ports, so an outgoing connection may use one of them for a short time.
                if not left:
                    raise
                await asyncio.sleep(0.2)
        self.lives += 1
        old.ledger.wedged.discard(old.kv_address)


class Machine:
    """Proxy and engines."""

    def __init__(self, settings: dict[str, Any]) -> None:
        local: dict[str, Any] = {"http_host": "127.0.0.1", "http_port": 0, "zmq_host": "127.0.0.1", "zmq_port": 0}
        timing: dict[str, Any] = {
            "instance_expiry": EXPIRY,
            "probe_interval": 1.0,
            "connect_timeout": 2.0,
            "prefill_timeout": LEG_TIMEOUT,
            "decode_timeout": LEG_TIMEOUT,
            "freeze_after_min": FREEZE_AFTER,
            "freeze_after_max": FREEZE_AFTER,
            "shutdown_grace": 5.0,
        }
        config = Config(**{**local, **timing, **settings})
        self.ledger = Ledger()
        self.socket = listen(config)
        self.services = Services(config, asyncio.get_running_loop().time)
        self.server = _Server(server_config(config, self.services), self.services)
        self.url = "http://{}:{}".format(*self.socket.getsockname()[:2])
        self.prefills: list[Slot] = []
        self.decodes: list[Slot] = []
        self._restarting = asyncio.Lock()
        self.frozen_restarted: Counter[str] = Counter()
        self._changed = asyncio.Event()
        self.services.registry.watch(changed=lambda instance: self._changed.set())

    @property
    def slots(self) -> Sequence[Slot]:
        """All slots, prefills first."""
        return [*self.prefills, *self.decodes]

    @property
    def engines(self) -> Sequence[LedgerEngine]:
        """Engines that run now."""
        return [slot.engine for slot in self.slots if slot.up]

    async def until_ready(self, seconds: float) -> bool:
        """Wait until every prefill and decode is ready; False if that takes longer than ``seconds``."""
        return await self._until(
            lambda: self.services.selection.ready_pairs() == len(self.prefills) * len(self.decodes), seconds
        )

    async def _until(self, condition: Callable[[], bool], seconds: float) -> bool:
        async def wait() -> None:
            while not condition():
                self._changed.clear()
                await self._changed.wait()

        with suppress(asyncio.TimeoutError):
            async with within(seconds):
                await wait()
        return condition()

    async def restart_prefill(
        self, slot: Slot, how: Literal["killed", "stopped"], down: float, *, while_sending: bool = False
    ) -> None:
        """End a prefill and restart it after ``down`` seconds."""
        async with self._restarting:
            await slot.end(how, while_sending=while_sending)
            await asyncio.sleep(down)
            await slot.restart()

    async def kill_decode(self, slot: Slot, down: float, *, supervised: bool) -> int:
        """Kill a decode and restart it; return how many prefills were restarted with it."""
        async with self._restarting:
            return await self._restart_decode(slot, down, supervised=supervised)

    async def _restart_decode(self, slot: Slot, down: float, *, supervised: bool) -> int:
        address = slot.engine.kv_address
        with_it = [p for p in self.prefills if supervised and address in p.engine.sent_to]
        await asyncio.gather(*(one.end("killed") for one in (slot, *with_it)))
        await asyncio.sleep(down)
        await asyncio.gather(*(one.restart() for one in (slot, *with_it)))
        return len(with_it)

    async def supervise(self) -> None:
        """Restart engines that the proxy reports as ``restart_wanted``, until cancelled."""
        while True:
            await asyncio.sleep(_SUPERVISOR_INTERVAL)
            for instance in self.services.registry.instances():
                slot = next((s for s in self.slots if s.engine.http_address == instance.http.text), None)
                if slot is None or not instance.restart_wanted:
                    continue
                async with self._restarting:
                    if not instance.restart_wanted or not slot.up:
                        continue
                    self.frozen_restarted[slot.engine.config.role] += 1
                    if slot in self.decodes:
                        await self._restart_decode(slot, _DOWN, supervised=True)
                    else:
                        await slot.end("killed")
                        await asyncio.sleep(_DOWN)
                        await slot.restart()
                # Wait until the proxy has noticed that the old process ended.
                await self._until(lambda gone=instance: not gone.restart_wanted, 5)  # type: ignore[misc]

    def excuse_waiting(self, slot: Slot) -> None:
        """Excuse KV on a decode that refuses connections: the proxy counts the decode and its KV as lost."""
        if slot not in self.decodes:
            return
        in_progress = [name for prefill in self.prefills if prefill.up for name in prefill.engine.in_progress()]
        for name in (*slot.engine.state()["kv_waiting"], *in_progress):
            self.ledger.excused[key_of(name)] = "its decode refused connections, as a process that has ended does"

    async def until_idle(self, seconds: float) -> list[str]:
        """Wait until no work is in progress; after ``seconds`` return descriptions of what still is."""
        end = asyncio.get_running_loop().time() + seconds
        while busy := self._busy():
            if asyncio.get_running_loop().time() >= end:
                return busy
            await asyncio.sleep(0.05)
        return []

    def _busy(self) -> list[str]:
        services, busy = self.services, []
        if count := len(services.background):
            busy.append(f"{count} background tasks of the proxy")
        if services.stats.in_flight:
            busy.append(f"{services.stats.in_flight} requests in flight in the proxy")
        busy += [f"{i.in_flight} legs counted on {i}" for i in services.registry.instances() if i.in_flight]
        for engine in self.engines:
            state = engine.state()
            if not state["dead"] and (state["running"] or state["waiting"] or state["aborting"] or state["sender"]):
                busy.append(
                    f"{engine.name}: {state['running']} running, {state['waiting']} waiting, "
                    f"stalled on {state['stalled_on']}, sender {state['sender']}"
                )
        return busy


@asynccontextmanager
async def running_machine(
    prefills: int, decodes: int, settings: dict[str, Any], knobs: dict[str, Any]
) -> AsyncIterator[Machine]:
    """Run a system that is ready, and end it with the block.

    Args:
        settings: additional settings of the proxy.
        knobs: settings of the engines; ``gpu`` is the GPU of the first one, the others have the following ones.

    Raises:
        RuntimeError: it does not become ready.
    """
    machine = Machine(settings)
    serving = asyncio.ensure_future(machine.server.serve(sockets=[machine.socket]))
    try:
        while not machine.server.started and not serving.done():
            await asyncio.sleep(0.01)
        proxy = f"127.0.0.1:{machine.services.discovery.listener.port}"
        common: dict[str, Any] = {
            "proxy": proxy,
            "models": (MODEL,),
            "ping_seconds": PING,
            "startup_seconds": 0.2,
            "prefill_tokens_per_second": 20_000.0,
            "time_per_output_token": 0.005,
            "max_model_len": MAX_MODEL_LEN,
            "max_num_batched_tokens": MAX_MODEL_LEN,
            **knobs,
        }
        for role, count, slots in (("prefill", prefills, machine.prefills), ("decode", decodes, machine.decodes)):
            for _ in range(count):
                config = SimConfig(role=role, **common)  # type: ignore[arg-type]
                if config.gpu is not None:
                    config = replace(config, gpu=config.gpu + len(machine.prefills) + len(machine.decodes))
                slots.append(Slot(LedgerEngine(config, machine.ledger)))
        await asyncio.gather(*(slot.start() for slot in machine.slots))
        if not await machine.until_ready(10):
            raise RuntimeError(f"not ready: {missing_roles(machine.services.registry)}")
        yield machine
    finally:
        machine.server.on_signal()
        await asyncio.gather(serving, return_exceptions=True)
        await asyncio.gather(*(slot.engine.stop() for slot in machine.slots))
        machine.socket.close()
