"""One simulated vLLM engine: start, stop, death, and the state that tests read."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from disagg_sim.config import SimConfig, join_address, split_address
from disagg_sim.connectors import make_connector
from disagg_sim.exchange import RecordedRequest
from disagg_sim.faults import Faults
from disagg_sim.gpu import EngineGpu
from disagg_sim.http import HttpSide
from disagg_sim.metrics import Counters, KvCache, exposition
from disagg_sim.ping import Pinger
from disagg_sim.step_loop import StepLoop

State = dict[str, Any]


class SimEngine:
    """A prefill or decode engine with its own sockets, in the running event loop.

    Attributes:
        faults: the controls for tests.
        http_address, kv_address: ``host:port``; known after :meth:`start`.
    """

    def __init__(self, config: SimConfig) -> None:
        self.config = config
        self.faults = Faults(self._changed)
        self.http_address = ""
        self.kv_address = ""
        self.ready = False
        self._counters = Counters()
        self._watchers: list[tuple[Callable[[State], bool], asyncio.Future[None]]] = []
        self._started = False
        self._worker_gone = False
        self._exited = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Bind both ports, begin to ping, and answer HTTP after ``startup_seconds``.

        Raises:
            OSError: when a port cannot be bound.
        """
        if self._started:
            raise RuntimeError("an engine starts once; see restarted()")
        config = self.config
        with contextlib.ExitStack() as undo:
            http_sock = undo.enter_context(_bound(config.host, config.port))
            kv_sock = undo.enter_context(_bound(config.host, config.kv_port))
            self.http_address = join_address(config.host, http_sock.getsockname()[1])
            self.kv_address = join_address(config.host, kv_sock.getsockname()[1])
            undo.pop_all()
        self._connector = make_connector(config, self.faults, self.kv_address, self._changed)
        self._gpu = None if config.gpu is None else EngineGpu(config.gpus_file, config.gpu)
        self._loop = StepLoop(
            config, self.faults, self._connector, self._counters, self._changed, self._on_death, self._gpu
        )
        self._http = HttpSide(
            config, self._loop, self.faults, state=self.state, metrics=self.metrics, changed=self._changed
        )
        announce = self._connector.announcement
        self._pinger = Pinger(
            config, self.http_address, self.kv_address, announce, lambda: self.faults.pings, self._changed,
            None if self._gpu is None else self._gpu.reports,
        )  # fmt: skip
        self._connector.announced(self._pinger.fields())
        self.faults.on_refuse = self._refuse
        self._started = True
        await self._connector.start(kv_sock)
        self._loop.start()
        if self._gpu is not None:
            self._gpu.start()
        if announce() is not None:
            self._pinger.start()
        try:
            if config.startup_seconds:
                await asyncio.sleep(config.startup_seconds)
            await self._http.start(http_sock)
        except BaseException:
            http_sock.close()
            await self.kill()
            raise
        self.ready = True
        self._changed()

    async def stop(self) -> None:
        """End as on SIGTERM: what still runs is answered 500. Safe to call twice, or on a dead engine."""
        if not self._started:
            return
        self.ready = False
        self._http.refuse()
        await self._http.settle()
        await self._loop.stop()
        await self._http.stop()
        await self._end_worker()
        self._finish()

    async def kill(self) -> None:
        """End as on kill -9: every connection is reset at once, without further output."""
        if not self._started:
            return
        self.ready = False
        self._http.refuse()
        await self._http.settle()
        self._http.close_connections()
        await self._end_worker()
        await self._http.stop()
        await self._loop.stop()
        self._finish()

    def restarted(self) -> SimEngine:
        """A new engine, not started, on the addresses of this one (which must have ended)."""
        port, kv_port = (int(address.rpartition(":")[2]) for address in (self.http_address, self.kv_address))
        return SimEngine(replace(self.config, port=port, kv_port=kv_port))

    async def wait_exited(self) -> None:
        """Return when the engine has been stopped, killed, or has ended after its death."""
        await self._exited.wait()

    async def _end_worker(self) -> None:
        if self._gpu is not None:
            await self._gpu.stop()
        await self._pinger.stop()
        await self._connector.stop()
        await asyncio.sleep(0)

    def _finish(self) -> None:
        current = asyncio.current_task()
        for task in self._tasks:
            if task is not current:
                task.cancel()
        self._exited.set()
        self._changed()

    def _on_death(self) -> None:
        # The worker's process ends, and with it pings and KV transfer; the API server's process lives on.
        self._spawn(self._after_death())

    async def _after_death(self) -> None:
        await self._end_worker()
        self._worker_gone = True
        self._changed()
        if self.config.exit_after_death_seconds is not None:
            await asyncio.sleep(self.config.exit_after_death_seconds)
            await self.stop()

    def _refuse(self, refuse: bool) -> None:
        if not self._started:
            raise RuntimeError("the engine has not been started")
        if refuse:
            self._http.refuse()
            self._spawn(self._http.settle())
        else:
            self._spawn(self._http.listen(_bound(*split_address(self.http_address))))

    def _spawn(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # What a test can see.

    @property
    def requests(self) -> list[RecordedRequest]:
        """Every HTTP request that arrived, oldest first."""
        return self._http.requests

    def received(self, path: str) -> list[RecordedRequest]:
        """The requests to one path."""
        return [request for request in self.requests if request.path == path]

    def metrics(self) -> str:
        """The text of /metrics."""
        config = self.config
        running, waiting = self._loop.last_step
        return exposition(
            self._counters,
            model=config.models[0],
            running=running,
            waiting=waiting,
            steps=self._loop.steps,
            kv_cache=KvCache(
                config.kv_block_size, config.kv_blocks, self._loop.kv_blocks_used, config.rules.kv_cache_size_label
            ),
            prefix_caching=config.prefix_cache_blocks > 0,
            transfers=self._connector.outcomes(),
        )

    def state(self) -> State:
        """The engine's state as JSON types; /sim/state serves the same.

        - ``dead``: why the engine died, or None; ``worker_gone``: its pings and KV port have ended too.
        - ``stalled_on``: id of the request whose KV the current step waits for, or sends.
        - ``running``, ``waiting``: number of requests in the batch and before it; ``aborting``: aborts that have not
          taken effect yet.
        - ``steps``: number of steps completed; constant while the engine hangs.
        - ``held_at``: the hold that the step loop waits at.
        - ``tokens_by_source``: prompt tokens, as in /metrics.
        - ``kv_waiting``: by request id. P2pNcclConnector: bytes received and not loaded. Otherwise on prefill the bytes
          promised or held for decode, on decode the number of blocks still to arrive.
        - ``listener``: "alive" or why the KV listener died; ``sender``: see :meth:`KvSender.state`, None when idle.
        """
        if not self._started:
            return {"role": self.config.role, "ready": False, "dead": None}
        loop, counters = self._loop, self._counters
        return {
            "role": self.config.role,
            "http_address": self.http_address,
            "kv_address": self.kv_address,
            "models": list(self.config.models),
            "ready": self.ready,
            "accepting": self._http.listening,
            "dead": loop.death,
            "worker_gone": self._worker_gone,
            "stalled_on": self._connector.stalled_on,
            "held_at": self.faults.held_at,
            "running": len(loop.running),
            "running_ids": [request.id for request in loop.running],
            "waiting": loop.pending,
            "aborting": loop.aborting,
            "steps": loop.steps,
            **self._connector.state(),
            "tokens_by_source": {
                "local_compute": counters.local_compute,
                "local_cache_hit": counters.local_cache_hit,
                "external_kv_transfer": counters.external_kv_transfer,
            },
            "http_requests": self._http.requests_total,
            "finished": sum(self._counters.success.values()),
            "aborted": self._counters.aborted,
            "pings": self._pinger.sent,
            "profiling": self._http.profiling,
        }

    async def wait_until(self, condition: Callable[[State], bool]) -> State:
        """Return the state as soon as ``condition`` holds for it, looking at every change, however short."""
        state = self.state()
        if condition(state):
            return state
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        entry = (condition, future)
        self._watchers.append(entry)
        try:
            await future
        finally:
            self._watchers.remove(entry)
        return self.state()

    def _changed(self) -> None:
        if not self._watchers:
            return
        state = self.state()
        for condition, future in list(self._watchers):
            if not future.done() and condition(state):
                future.set_result(None)


def _bound(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
    except OSError as error:
        sock.close()
        raise OSError(error.errno, f"cannot bind {join_address(host, port)}: {error.strerror}") from None
    return sock
