"""The process of one worker as the supervisor starts and ends it, and what it inherits."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import disagg_proxy
from disagg_proxy.workers.channel import Channel, Message
from disagg_proxy.workers.shared_memory import SharedMemory

_MODULE = "disagg_proxy.workers"

_PROGRAM = ("-m", _MODULE)
"""What Python runs. The modules are those of the supervisor, whatever lies in the folder where it was started:
PYTHONSAFEPATH keeps that folder out of ``sys.path``; Python 3.10 does not know it."""

if sys.version_info < (3, 11):
    _PROGRAM = ("-c", f"import runpy, sys; del sys.path[0]; runpy.run_module({_MODULE!r}, None, '__main__', True)")

_VARIABLE = "DISAGG_PROXY_WORKER"
_ROOT = str(Path(disagg_proxy.__file__).resolve().parents[1])

_STABLE_AFTER = 10.0
"""Seconds after which a worker that ends is restarted at once."""

_MIN_PAUSE, _MAX_PAUSE = 0.5, 10.0
"""Seconds before the restart of a worker that keeps ending earlier; doubled each time."""


@dataclass(frozen=True, slots=True)
class WorkerEnv:
    """What a worker process is started with: its number and the descriptors that it inherits.

    Attributes:
        worker: number of this worker, from 0.
        workers: number of workers.
        incarnation: from 1, one more for each restart.
        memory, listening, channel: descriptors of the shared memory, the HTTP socket and the supervisor's channel.
        wakeups: descriptors of the wake-ups of each worker, and the supervisor's last.
        settings: the configuration file's settings that are in use, as text; the file may contain others by now.
    """

    worker: int
    workers: int
    incarnation: int
    memory: int
    wakeups: tuple[int, ...]
    listening: int
    channel: int
    settings: Mapping[str, str] = field(default_factory=dict)

    @property
    def files(self) -> tuple[int, ...]:
        """All inherited descriptors."""
        return (self.memory, *self.wakeups, self.listening, self.channel)

    def environ(self) -> dict[str, str]:
        """The environment variable for the worker, which :meth:`read` reads."""
        return {_VARIABLE: json.dumps(asdict(self))}

    @classmethod
    def read(cls, environ: Mapping[str, str]) -> WorkerEnv:
        """Read what the supervisor has passed to this process.

        Raises:
            KeyError: the process was not started by a supervisor.
        """
        given = json.loads(environ[_VARIABLE])
        return cls(**{**given, "wakeups": tuple(given["wakeups"])})


class WorkerProcess:
    """One worker: a process, and after its death the next one.

    Args:
        argv: command line of the proxy.

    Attributes:
        worker: its number, from 0.
        incarnation: processes started so far.
        pid: of the current process, 0 without one.
        started: Unix time of its start.
        ready: whether the current process serves.
        served: whether any process has served.
    """

    def __init__(self, worker: int, argv: Sequence[str]) -> None:
        self.worker = worker
        self.incarnation = self.pid = 0
        self.started = 0.0
        self.ready = self.served = False
        self._argv = argv
        self._channel: Channel | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._start_time = 0.0
        self._short_runs = 0

    async def start(
        self,
        memory: SharedMemory,
        wakeups: Sequence[int],
        listening: socket.socket,
        on_message: Callable[[Message], None],
        settings: Mapping[str, str],
    ) -> None:
        """Start the next process, in a session of its own: only the supervisor gets the terminal's signals.

        Raises:
            OSError: the system cannot start it.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.incarnation += 1
        files = (memory.file, tuple(wakeups), listening.fileno(), theirs.fileno())
        env = WorkerEnv(self.worker, len(wakeups) - 1, self.incarnation, *files, settings=dict(settings))
        path = os.pathsep.join(filter(None, (_ROOT, os.environ.get("PYTHONPATH"))))
        self._start_time = time.monotonic()
        try:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable, *_PROGRAM, *self._argv,
                env={**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1", **env.environ()},
                pass_fds=env.files, stdin=asyncio.subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
        except OSError:
            ours.close()
            raise
        finally:
            theirs.close()
        self.pid, self.started = self._process.pid, time.time()
        self._channel = Channel(ours, on_message)
        self._channel.open()

    async def ended(self) -> int:
        """Wait for the end of the process. Returns its exit code, negative for a signal."""
        assert self._process is not None
        code = await self._process.wait()
        # One iteration of the loop, so that its last messages are read.
        await asyncio.sleep(0)
        self.pid, self.ready = 0, False
        if self._channel is not None:
            self._channel.close()
            self._channel = None
        return code

    def send(self, message: Message, name: object = None) -> None:
        """Send a message, see :meth:`Channel.send`; dropped while there is no process."""
        if self._channel is not None:
            self._channel.send(message, name)

    def kill(self) -> None:
        """Kill the process, if there is one."""
        if self.pid and self._process is not None and self._process.returncode is None:
            self._process.send_signal(signal.SIGKILL)

    def restart_pause(self) -> float:
        """Seconds before the next start: 0 if the last process ran for at least ten seconds."""
        if time.monotonic() - self._start_time >= _STABLE_AFTER:
            self._short_runs = 0
        pause = min(_MIN_PAUSE * 2 ** (self._short_runs - 1), _MAX_PAUSE) if self._short_runs else 0.0
        self._short_runs += 1
        return pause
