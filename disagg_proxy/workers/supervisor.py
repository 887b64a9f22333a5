"""The process that owns the ports and the workers. It serves no requests, so little can crash it.

The first signal shuts down all workers, the second one skips the grace time. The supervisor replaces a worker that dies
otherwise, at once if it ran for a while: it releases the worker's load and keeps its flags and counters.

SIGHUP reloads: the supervisor reads the configuration file and sends the settings to the workers.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import time
from collections.abc import Sequence
from functools import partial

from disagg_proxy.config.reload import LiveSettings
from disagg_proxy.discovery.allow import AllowList
from disagg_proxy.discovery.announcement import Announcement
from disagg_proxy.discovery.forward import Forwarder
from disagg_proxy.discovery.listener import Listener
from disagg_proxy.discovery.mailbox import Mailbox
from disagg_proxy.discovery.power import LocalReader, PackedReports
from disagg_proxy.discovery.proof import Proofs
from disagg_proxy.runtime.hangup import on_hangup
from disagg_proxy.runtime.shutdown import first_of
from disagg_proxy.server.http_server import listen
from disagg_proxy.telemetry.aggregate import RetiredTotals, retire, unpack
from disagg_proxy.telemetry.logs import configure_logging
from disagg_proxy.workers.channel import Message, Wakeups, new_wakeups
from disagg_proxy.workers.replay_log import ReplayLog, message_name
from disagg_proxy.workers.shared_engine_loads import LOAD
from disagg_proxy.workers.shared_load import RowIndex
from disagg_proxy.workers.shared_memory import SharedMemory
from disagg_proxy.workers.shared_table import RowHeader, now
from disagg_proxy.workers.worker_process import WorkerProcess

log = logging.getLogger(__name__)

_HEARTBEAT = 0.25
"""Seconds between two publications of the supervisor's totals."""

_AFTER_GRACE, _AFTER_SECOND_SIGNAL = 5.0, 3.0
"""Seconds after SHUTDOWN_GRACE, and after a second signal, before workers are killed."""

_MAX_FAILED_STARTS = 3
"""Starts of one worker after which the supervisor gives up if no worker has served yet."""


class Supervisor:
    """Binds both ports on creation.

    Raises:
        BindError: one of them cannot be bound.
    """

    def __init__(self, settings: LiveSettings, argv: Sequence[str]) -> None:
        self._settings = settings
        config = self._config = settings.config
        self._listening: socket.socket = listen(config)
        self._mailbox = Mailbox(lambda announcements: self._proofs.take(announcements))
        try:
            allow = AllowList(config.allow_register)
            self._listener = Listener(config.zmq_host, config.zmq_port, allow, self._mailbox.put)
        except BaseException:
            self._listening.close()
            raise
        self._proofs = Proofs(config.kv_secret, config.connect_timeout, self._on_pings, self._listener.drop)
        self._forwarder = Forwarder(config.forward_registrations)
        self._reader = LocalReader(config, self._on_power)
        self._memory = SharedMemory.create(config.workers)
        self._row = self._memory.table.supervisor
        self._files = new_wakeups(config.workers + 1)
        self._wakeups = Wakeups(self._files, config.workers)
        self._replay_log = ReplayLog(config, RowIndex(self._memory.table))
        self._workers = [WorkerProcess(number, argv) for number in range(config.workers)]
        self._retired = RetiredTotals(time.monotonic(), 0, {}, [], [0] * config.workers, [])
        self._shutdown = asyncio.Event()
        self._second_signal = asyncio.Event()
        self._serving_logged = self._failed = False

    async def run(self) -> int:
        """Run the workers until a signal has ended all of them. Returns the exit code."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._signalled)
        self._row.head[RowHeader.PID] = os.getpid()
        self._mailbox.open()
        self._forwarder.open()
        self._wakeups.open(self._on_wakeup)
        heartbeat = loop.create_task(self._heartbeat())
        self._listener.start()
        self._reader.start()
        killer = loop.create_task(self._kill_in_time())
        try:
            with on_hangup(partial(self._settings.reload, self._reconfigure)):
                await asyncio.gather(*(self._keep_running(worker) for worker in self._workers))
        finally:
            for task in (heartbeat, killer):
                task.cancel()
            await asyncio.gather(heartbeat, killer, return_exceptions=True)
            await self._proofs.stop()
            self._wakeups.close()
            await loop.run_in_executor(None, self._listener.stop)
            await loop.run_in_executor(None, self._reader.stop)
            self.close()
        return 1 if self._failed else 0

    def close(self) -> None:
        """Close the sockets and descriptors."""
        self._forwarder.close()
        self._listening.close()
        for file in (self._memory.file, *self._files):
            os.close(file)

    # -- workers

    async def _keep_running(self, worker: WorkerProcess) -> None:
        """Start ``worker``, and restart it until the shutdown."""
        while not self._shutdown.is_set():
            try:
                await worker.start(
                    self._memory, self._files, self._listening, partial(self._on_message, worker), self._settings.file
                )
            except OSError as error:
                log.error("Cannot start worker %d: %s", worker.worker, error)
            else:
                for message, name in self._replay_log.replay(time.monotonic()):
                    worker.send(message, name)
                self._publish()
                code = await worker.ended()
                self._retire(worker)
                if self._shutdown.is_set():
                    return
                log.error("Worker %d has ended (%s) and is replaced", worker.worker, _describe(code))
            if not any(w.served for w in self._workers) and worker.incarnation >= _MAX_FAILED_STARTS:
                log.error("The workers do not start: see the lines above")
                self._failed = True
                self._stop()
                return
            await first_of(self._shutdown.wait(), seconds=worker.restart_pause())

    def _retire(self, worker: WorkerProcess) -> None:
        """Release the load of a dead worker and keep its counters and flags."""
        part = unpack(self._memory.totals[worker.worker].read())
        retire(part, self._retired, worker.worker, worker.incarnation)
        self._publish()
        self._memory.table.retire(worker.worker)
        self._row.head[RowHeader.FLAG_CHANGES] += 1
        self._wakeups.wake()

    def _on_message(self, worker: WorkerProcess, message: Message) -> None:
        if message[0] == "ready":
            worker.ready = worker.served = True
            if worker.incarnation > 1:
                log.info("Worker %d serves again", worker.worker)
            self._log_serving()
            return
        # Of no use to a worker that starts later, so it is not kept.
        forwarded = message if message[0] == LOAD else self._replay_log.on_message(message)
        if forwarded is not None:
            for other in self._workers:
                if other is not worker:
                    other.send(forwarded, message_name(forwarded))

    def _log_serving(self) -> None:
        if self._serving_logged or not all(worker.ready for worker in self._workers):
            return
        self._serving_logged = True
        host, port = self._listening.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        log.info("Serving on http://%s:%d with %d workers", shown, port, len(self._workers))
        log.info("Instances may register on %s:%d", self._config.zmq_host, self._listener.port)

    # -- instances

    def _on_pings(self, announcements: list[Announcement]) -> None:
        self._forwarder.forward(announcements)
        for announcement in announcements:
            message = self._replay_log.on_ping(announcement, time.monotonic())
            if message is not None:
                for worker in self._workers:
                    worker.send(message, ("ping", announcement.http.netloc, announcement.kv.text))

    def _on_power(self, reports: PackedReports) -> None:
        for worker in self._workers:
            worker.send(["power", reports])

    # -- reload

    def _reconfigure(self) -> None:
        """Use the settings of a reload here, and have each worker use them and read the files of its parts again."""
        before, config = self._config, self._settings.config
        self._config = config
        configure_logging(config)
        self._replay_log.expiry = config.instance_expiry
        if config.allow_register != before.allow_register:
            self._listener.allow = AllowList(config.allow_register)
        self._proofs.timeout = config.connect_timeout
        for worker in self._workers:
            worker.send(["settings", dict(self._settings.file)])

    # -- totals

    async def _heartbeat(self) -> None:
        while True:
            self._row.head[RowHeader.HEARTBEAT] = now()
            self._publish()
            await asyncio.sleep(_HEARTBEAT)

    def _on_wakeup(self) -> None:
        rows = self._memory.table.workers
        requested = max(row.head[RowHeader.REQUESTED] for row in rows)
        if requested > self._row.head[RowHeader.PUBLISHED]:
            self._publish()
            self._row.head[RowHeader.PUBLISHED] = requested
            self._wakeups.wake([i for i, row in enumerate(rows) if row.head[RowHeader.REQUESTED] == requested])

    def _publish(self) -> None:
        retired, registrations = self._retired, self._listener.traffic
        retired.messages, retired.dropped = registrations.messages, dict(registrations.dropped)
        retired.workers = [
            {"worker": w.worker, "pid": w.pid, "started": w.started, "restarts": max(0, w.incarnation - 1)}
            for w in self._workers
        ]
        self._memory.totals[-1].write(retired.pack())

    # -- shutdown

    def _signalled(self) -> None:
        if self._shutdown.is_set():
            log.warning("Stopping at once")
            self._second_signal.set()
            for worker in self._workers:
                worker.send(["stop_now"])
            return
        log.info("Stopping: requests in flight get %g s to finish (SHUTDOWN_GRACE)", self._config.shutdown_grace)
        self._stop()

    def _stop(self) -> None:
        self._shutdown.set()
        # The workers keep it open; connections are refused when the last of them has closed it.
        self._listening.close()
        for worker in self._workers:
            worker.send(["stop"])

    async def _kill_in_time(self) -> None:
        """Kill the workers that do not end in time after the shutdown has begun."""
        await self._shutdown.wait()
        await first_of(self._second_signal.wait(), seconds=self._config.shutdown_grace + _AFTER_GRACE)
        if self._second_signal.is_set():
            await asyncio.sleep(_AFTER_SECOND_SIGNAL)
        for worker in self._workers:
            if worker.pid:
                log.error("Worker %d did not end in time: killing it", worker.worker)
                worker.kill()


def _describe(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"
