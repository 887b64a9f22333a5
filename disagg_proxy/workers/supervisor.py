"""The process that has the ports and the workers. It serves no request, so there is little that can end it.

Signals: the first begins the end of all workers, the next one cuts it short. A worker that dies before is buried - its
load released, what it had found out and counted kept - and replaced, at once if it had lived for a while.
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

from disagg_proxy.config import Config
from disagg_proxy.discovery.allow import AllowList
from disagg_proxy.discovery.announcement import Announcement
from disagg_proxy.discovery.forward import Forwarder
from disagg_proxy.discovery.listener import Listener
from disagg_proxy.discovery.mailbox import Mailbox
from disagg_proxy.runtime.shutdown import first_of
from disagg_proxy.server.http_server import listen
from disagg_proxy.telemetry.aggregate import RetiredTotals, retire, unpack
from disagg_proxy.workers.channel import Message
from disagg_proxy.workers.replay_log import ReplayLog, name_of
from disagg_proxy.workers.shared_load import RowIndex
from disagg_proxy.workers.shared_memory import SharedMemory
from disagg_proxy.workers.shared_table import SharedTableHeader, now
from disagg_proxy.workers.wakeup import Wakeups, new_pokes
from disagg_proxy.workers.worker_process import WorkerProcess

log = logging.getLogger(__name__)

_BEAT = 0.25
_AFTER_GRACE, _AFTER_HURRY = 5.0, 3.0
"""Seconds that workers get beyond their time before they are killed."""

_VAIN_STARTS = 3
"""Starts of one worker that may fail before any has served."""


class Supervisor:
    """Has both ports from its creation on.

    Raises:
        BindError: one of them cannot be opened.
    """

    def __init__(self, config: Config, argv: Sequence[str]) -> None:
        self._config = config
        self._listening: socket.socket = listen(config)
        self._mailbox = Mailbox(self._announced)
        try:
            allow = AllowList(config.allow_register)
            self._listener = Listener(config.zmq_host, config.zmq_port, allow, self._mailbox.put)
        except BaseException:
            self._listening.close()
            raise
        self._forwarder = Forwarder(config.forward_registrations)
        self._memory = SharedMemory.create(config.workers)
        self._row = self._memory.table.supervisor
        self._files = new_pokes(config.workers + 1)
        self._pokes = Wakeups(self._files, config.workers)
        self._book = ReplayLog(config, RowIndex(self._memory.table))
        self._places = [WorkerProcess(number, argv) for number in range(config.workers)]
        self._ground = RetiredTotals(time.monotonic(), 0, {}, [], [0] * config.workers, [])
        self._shutdown = asyncio.Event()
        self._hurry = asyncio.Event()
        self._told = self._failed = False

    async def run(self) -> int:
        """Until a signal, and the end that it begins. The exit code."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._signalled)
        self._row.head[SharedTableHeader.PID] = os.getpid()
        self._mailbox.open()
        self._forwarder.open()
        self._pokes.open(self._on_poke)
        beating = loop.create_task(self._beat())
        self._listener.start()
        ending = loop.create_task(self._end_in_time())
        try:
            await asyncio.gather(*(self._keep(place) for place in self._places))
        finally:
            for task in (beating, ending):
                task.cancel()
            await asyncio.gather(beating, ending, return_exceptions=True)
            self._pokes.close()
            await loop.run_in_executor(None, self._listener.stop)
            self.close()
        return 1 if self._failed else 0

    def close(self) -> None:
        """Let go of what was opened."""
        self._forwarder.close()
        self._listening.close()
        for file in (self._memory.file, *self._files):
            os.close(file)

    # -- workers

    async def _keep(self, place: WorkerProcess) -> None:
        """One place: a process in it as long as the proxy runs."""
        while not self._shutdown.is_set():
            try:
                await place.start(self._memory, self._files, self._listening, partial(self._heard, place))
            except OSError as error:
                log.error("Worker %d cannot be started: %s", place.worker, error)
            else:
                for message, name in self._book.all_of_it(time.monotonic()):
                    place.tell(message, name)
                self._publish()
                code = await place.ended()
                self._bury(place)
                if self._shutdown.is_set():
                    return
                log.error("Worker %d has ended (%s) and is replaced", place.worker, _how(code))
            if not any(p.served for p in self._places) and place.incarnation >= _VAIN_STARTS:
                log.error("The workers do not start; the log has the cause")
                self._failed = True
                self._stop()
                return
            await first_of(self._shutdown.wait(), seconds=place.pause())

    def _bury(self, place: WorkerProcess) -> None:
        """Nothing of a dead worker's load is left, and nothing else is lost."""
        part = unpack(self._memory.areas[place.worker].read())
        retire(part, self._ground, place.worker, place.incarnation)
        self._publish()
        self._memory.table.bury(place.worker)
        self._row.head[SharedTableHeader.NEWS] += 1
        self._pokes.poke()

    def _heard(self, place: WorkerProcess, message: Message) -> None:
        if message[0] == "ready":
            place.ready = place.served = True
            if place.incarnation > 1:
                log.info("Worker %d serves again", place.worker)
            self._say_serving()
            return
        news = self._book.heard(message)
        if news is not None:
            for other in self._places:
                if other is not place:
                    other.tell(news, name_of(news))

    def _say_serving(self) -> None:
        if self._told or not all(place.ready for place in self._places):
            return
        self._told = True
        host, port = self._listening.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        log.info("Serving on http://%s:%d with %d workers", shown, port, len(self._places))
        log.info("Instances may register on %s:%d", self._config.zmq_host, self._listener.port)

    # -- instances

    def _announced(self, announcements: list[Announcement]) -> None:
        self._forwarder.forward(announcements)
        for announcement in announcements:
            message = self._book.announced(announcement, time.monotonic())
            if message is not None:
                for place in self._places:
                    place.tell(message, ("ping", announcement.http.netloc, announcement.kv.text))

    # -- numbers

    async def _beat(self) -> None:
        while True:
            self._row.head[SharedTableHeader.BEAT] = now()
            self._publish()
            await asyncio.sleep(_BEAT)

    def _on_poke(self) -> None:
        rows = self._memory.table.workers
        wanted = max(row.head[SharedTableHeader.WANTED] for row in rows)
        if wanted > self._row.head[SharedTableHeader.PUBLISHED]:
            self._publish()
            self._row.head[SharedTableHeader.PUBLISHED] = wanted
            self._pokes.poke([i for i, row in enumerate(rows) if row.head[SharedTableHeader.WANTED] == wanted])

    def _publish(self) -> None:
        ground, traffic = self._ground, self._listener.traffic
        ground.messages, ground.dropped = traffic.messages, dict(traffic.dropped)
        ground.workers = [
            {"worker": p.worker, "pid": p.pid, "started": p.started, "restarts": max(0, p.incarnation - 1)}
            for p in self._places
        ]
        self._memory.areas[-1].write(ground.pack())

    # -- the end

    def _signalled(self) -> None:
        if self._shutdown.is_set():
            log.warning("Stopping at once")
            self._hurry.set()
            for place in self._places:
                place.tell(["hurry"])
            return
        log.info("Stopping; what was accepted gets %g s (SHUTDOWN_GRACE)", self._config.shutdown_grace)
        self._stop()

    def _stop(self) -> None:
        self._shutdown.set()
        # The workers have it; when the last of them lets go of it, clients find nobody.
        self._listening.close()
        for place in self._places:
            place.tell(["stop"])

    async def _end_in_time(self) -> None:
        """Kill what does not end."""
        await self._shutdown.wait()
        await first_of(self._hurry.wait(), seconds=self._config.shutdown_grace + _AFTER_GRACE)
        if self._hurry.is_set():
            await asyncio.sleep(_AFTER_HURRY)
        for place in self._places:
            if place.pid:
                log.error("Worker %d did not end in time and is killed", place.worker)
                place.kill()


def _how(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"
