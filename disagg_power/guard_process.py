"""``disagg-proxy power guard``: the one process that sets clocks, for as long as its standard input is open.

Requests come as JSON lines on standard input, each with an ``id``; any line is a sign of life. Answers go to standard
output with the same ``id``. End of file, 5 s without a line, SIGTERM and SIGINT reset everything. A watcher, a second
process, does the same when this one is killed or hangs.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any

from disagg_power import watcher
from disagg_power.clock_values import BadValue, parse_clock, parse_watts
from disagg_power.devices import NoPermission, PowerError
from disagg_power.guard import SILENCE, Guard, Refused, Wanted

TICK = 0.25
"""Seconds between two looks at the clock, the watcher and the signals."""
LONGEST_LINE = 65536


class Watcher:
    """The watcher's process. Its standard input is the only thing that it knows of this one.

    Raises:
        PowerError: it does not start.
    """

    def __init__(self, path: Path, environ: Mapping[str, str]) -> None:
        self._words = [sys.executable, "-m", watcher.__name__, str(path), str(os.getpid())]
        self._environ = dict(environ)
        self._process = self._start()
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], watcher.START_SECONDS)
        if not ready or self._process.stdout.readline() != b"ready\n":
            raise PowerError("the watcher of the guard does not start; nothing is set without it")

    def _start(self) -> subprocess.Popen[bytes]:
        # A session of its own: a signal to the group of the guard does not reach it.
        return subprocess.Popen(
            self._words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=self._environ, start_new_session=True
        )

    def beat(self) -> bool:
        """A sign of life for it; False when it had ended and was started again."""
        if self._process.poll() is None:
            try:
                assert self._process.stdin is not None
                self._process.stdin.write(b".")
                self._process.stdin.flush()
                return True
            except BrokenPipeError:
                pass
        self._process.wait()
        self._process = self._start()
        return False

    def end(self) -> None:
        """Let it end."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()


class Requests:
    """Complete lines of a descriptor, without blocking for the rest of one."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._rest = b""
        self.ended = False

    def wait(self, seconds: float) -> list[bytes]:
        """The lines that arrive within this time; :attr:`ended` at the end of file."""
        readable, _, _ = select.select([self._descriptor], [], [], seconds)
        if not readable:
            return []
        data = os.read(self._descriptor, LONGEST_LINE)
        self.ended = not data
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > LONGEST_LINE:
            self.ended = True
        return lines


def answer(guard: Guard, line: bytes) -> dict[str, Any] | None:
    """The answer to one line; None for a sign of life."""
    guard.heard()
    if not line.strip():
        return None
    try:
        request = json.loads(line)
        number = request.get("id")
    except (ValueError, AttributeError):
        return {"ok": False, "kind": "request", "error": "not a JSON object"}
    try:
        return {"id": number, "ok": True, **_do(guard, request)}
    except (BadValue, Refused) as error:
        return {"id": number, "ok": False, "kind": "refused", "error": str(error)}
    except NoPermission as error:
        return {"id": number, "ok": False, "kind": "permission", "error": str(error)}
    except PowerError as error:
        return {"id": number, "ok": False, "kind": "device", "error": str(error)}
    except (KeyError, TypeError, AttributeError) as error:
        return {"id": number, "ok": False, "kind": "request", "error": f"{type(error).__name__}: {error}"}


def _do(guard: Guard, request: Mapping[str, Any]) -> dict[str, Any]:
    if request["op"] == "set":
        wanted = Wanted(
            parse_clock(request.get("sm", "")),
            parse_clock(request.get("memory", "")),
            parse_watts(request.get("power", "")),
        )
        return asdict(guard.set(str(request["gpu"]), wanted))
    if request["op"] == "default":
        guard.default(str(request["gpu"]))
        return {}
    if request["op"] == "reset":
        return {"failed": guard.reset()}
    raise KeyError(f"op {request['op']!r}")


def run(guard: Guard, watch: Watcher, say: Callable[[str], None], source: int = 0) -> int:
    """Until the lease ends; the exit code is 1 when something could not be reset."""
    ended: list[str] = []

    def end(number: int, frame: FrameType | None) -> None:
        ended.append(signal.Signals(number).name)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, end)
    requests = Requests(source)
    _write({"ready": True, "pid": os.getpid()})
    why = ""
    while not why:
        for line in requests.wait(TICK):
            reply = answer(guard, line)
            if reply is not None:
                _write(reply)
        if not watch.beat():
            say("the watcher had ended and was started again")
        if ended:
            why = ended[0]
        elif requests.ended:
            why = "the holder of the lease is gone"
        elif guard.was_undone:
            why = "the watcher has reset the clocks: this process did not run for too long"
        elif guard.remaining <= 0:
            why = f"no sign of life from the holder of the lease for {SILENCE:g} s"
    failed = guard.reset()
    say(f"clocks are as they were before: {why}" if not failed else f"NOT reset ({why}): {'; '.join(failed)}")
    _write({"event": "reset", "why": why, "failed": failed})
    watch.end()
    return int(bool(failed))


def _write(value: Mapping[str, Any]) -> None:
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.write(json.dumps(value) + "\n")
        sys.stdout.flush()


def say(line: str) -> None:
    """Write one line to stderr, which the parent process logs."""
    with contextlib.suppress(OSError):
        print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} power guard: {line}", file=sys.stderr, flush=True)
