"""One worker's process, as the supervisor sees it."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import disagg_proxy
from disagg_proxy.workers.channel import Channel, Message
from disagg_proxy.workers.shared_memory import SharedMemory
from disagg_proxy.workers.worker_env import WorkerEnv

_ROOT = str(Path(disagg_proxy.__file__).resolve().parents[1])
_LIVED = 10.0
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 10.0
"""Seconds after which a worker has lived, and pauses before one that has not is replaced again."""


class WorkerProcess:
    """A place among the workers, taken by one process after another.

    Attributes:
        incarnation: how many there were, with the present one.
        pid, started: of the present one (Unix time); 0 without one.
        ready: whether the present one serves; served: whether any did.
    """

    def __init__(self, worker: int, argv: Sequence[str]) -> None:
        self.worker = worker
        self.incarnation = self.pid = 0
        self.started = 0.0
        self.ready = self.served = False
        self._argv = argv
        self._channel: Channel | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._begun = 0.0
        self._short_lives = 0

    async def start(
        self, memory: SharedMemory, pokes: Sequence[int], listening: socket.socket, take: Callable[[Message], None]
    ) -> None:
        """Start the next process. It gets the terminal's signals by way of the supervisor only.

        Raises:
            OSError: the system does not let it.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.incarnation += 1
        files = (memory.file, tuple(pokes), listening.fileno(), theirs.fileno())
        seat = WorkerEnv(self.worker, len(pokes) - 1, self.incarnation, *files)
        path = os.pathsep.join(filter(None, (_ROOT, os.environ.get("PYTHONPATH"))))
        self._begun = time.monotonic()
        try:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "disagg_proxy.workers", *self._argv,
                env={**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1", **seat.environ()},
                pass_fds=seat.files, stdin=asyncio.subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
        except OSError:
            ours.close()
            raise
        finally:
            theirs.close()
        self.pid, self.started = self._process.pid, time.time()
        self._channel = Channel(ours, take)
        self._channel.open()

    async def ended(self) -> int:
        """The exit code, once the process is gone."""
        assert self._process is not None
        code = await self._process.wait()
        # What it said last is read before it is forgotten.
        await asyncio.sleep(0)
        self.pid, self.ready = 0, False
        if self._channel is not None:
            self._channel.close()
            self._channel = None
        return code

    def tell(self, message: Message, name: object = None) -> None:
        """Send it, now or when the worker takes it."""
        if self._channel is not None:
            self._channel.send(message, name)

    def kill(self) -> None:
        """End the process, whatever it does."""
        if self.pid and self._process is not None and self._process.returncode is None:
            self._process.send_signal(signal.SIGKILL)

    def pause(self) -> float:
        """Seconds before the next start: none for one that has lived."""
        if time.monotonic() - self._begun >= _LIVED:
            self._short_lives = 0
        pause = min(_FIRST_PAUSE * 2 ** (self._short_lives - 1), _LONGEST_PAUSE) if self._short_lives else 0.0
        self._short_lives += 1
        return pause
