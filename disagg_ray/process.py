"""One process of a replica, behind its keeper (disagg_ray/keeper.py)."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from disagg_ray import keeper

_TAIL = 2000
"""Bytes of the log that a failed start shows."""


class Ended(Exception):
    """The process ended unexpectedly; the message has its exit code and the last lines of its log."""


class Process:
    """A running command.

    Args:
        name: for messages.
        words: the command.
        environment: all of its environment.
        log: file to which its output is appended.
        grace: seconds from TERM to KILL.
        keep: descriptors that the keeper keeps open.

    Attributes:
        pid: of the command, which leads a session and a process group.

    Raises:
        OSError: the log cannot be opened.
        Ended: the command cannot be started.
    """

    def __init__(
        self,
        name: str,
        words: Sequence[str],
        environment: Mapping[str, str],
        log: Path,
        grace: float,
        keep: Sequence[int] = (),
    ) -> None:
        self.name, self.log, self._grace = name, log, grace
        log.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with log.open("ab") as output:
            self._keeper = subprocess.Popen(
                [sys.executable, "-I", "-S", keeper.__file__, str(grace), *words],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                env=dict(environment),
                start_new_session=True,
                pass_fds=keep,
            )
        assert self._keeper.stdout is not None
        line = self._keeper.stdout.readline()
        self._keeper.stdout.close()
        if not line.strip().isdigit():
            self._keeper.wait()
            self._close()
            raise Ended(f"{name} cannot be started: {self.tail()}")
        self.pid = int(line)

    def tail(self) -> str:
        """The last lines of its output, as one line."""
        with contextlib.suppress(OSError), self.log.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - _TAIL))
            lines = file.read().decode("utf-8", "replace").splitlines()
            return " | ".join(line.strip() for line in lines[-8:] if line.strip())
        return ""

    def check(self) -> None:
        """
        Raises:
            Ended: it has.
        """
        code = self._keeper.poll()
        if code is None:
            return
        self._end_rest()
        raise Ended(f"{self.name} ended with {_shown(code)}, see {self.log}: {self.tail()}")

    def stop(self) -> None:
        """TERM, then KILL for what is left; returns when all of it is gone. May be repeated."""
        if self._keeper.poll() is None:
            self._keeper.send_signal(signal.SIGTERM)
            try:
                self._keeper.wait(self._grace + 10)
            except subprocess.TimeoutExpired:
                self._keeper.kill()
                self._keeper.wait()
        self._end_rest()

    def _end_rest(self) -> None:
        keeper.kill_group(self.pid)
        self._close()

    def _close(self) -> None:
        if self._keeper.stdin is not None:
            self._keeper.stdin.close()


def _shown(code: int) -> str:
    if code < 0:
        return f"signal {-code} to its keeper"
    return f"signal {code - 128}" if code > 128 else f"exit code {code}"
