"""Runs one command and ends it when its parent ends: ``python keeper.py GRACE COMMAND...``.

It stands between a Ray actor and its engine, because an actor that is killed with SIGKILL cannot end what it started
(ray-project/ray#26118). Standard input is a pipe whose other end the actor holds: at its end, or on SIGTERM, the
command gets SIGTERM, and what is left of its session after GRACE seconds gets SIGKILL. Should this process be killed,
the kernel kills the command (PR_SET_PDEATHSIG); its own children are left to the actor, or to the sweep of the next
replica on this node (disagg_ray/claims.py). The first line of standard output is the command's PID.

It uses the standard library alone and is started by its path, so that it runs without site-packages. It ends with the
exit code of the command, 128 + N for signal N.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


def main(words: Sequence[str]) -> int:
    """Run the command until it ends. Returns its exit code."""
    grace, command = float(words[0]), list(words[1:])
    libc = ctypes.CDLL(None)
    # What the command leaves behind becomes a child of this process, in the command's process group.
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    woken, waker = os.pipe()
    for end in (woken, waker):
        os.set_blocking(end, False)
    signal.set_wakeup_fd(waker)
    stopping: list[bool] = []
    signal.signal(signal.SIGTERM, lambda *_: stopping.append(True))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, lambda *_: None)

    def die_with_keeper() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)

    # The only thread of this process, so that preexec_fn is safe and the "parent" of PDEATHSIG lives as long as it.
    child = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=2, start_new_session=True, preexec_fn=die_with_keeper
    )
    os.write(1, f"{child.pid}\n".encode())
    deadline: float | None = None
    watched = [woken, 0]
    while child.poll() is None:
        left = None if deadline is None else deadline - time.monotonic()
        if left is not None and left <= 0:
            kill_group(child.pid)
            child.wait()
            break
        ready, _, _ = select.select(watched, [], [], left)
        if woken in ready:
            with contextlib.suppress(BlockingIOError):
                os.read(woken, 4096)
        if 0 in ready and not os.read(0, 4096):
            watched.remove(0)
            stopping.append(True)
        if stopping and deadline is None:
            deadline = time.monotonic() + grace
            child.terminate()
    kill_group(child.pid)
    return child.returncode if child.returncode >= 0 else 128 - child.returncode


def kill_group(group: int) -> None:
    """SIGKILL to the processes of a group that are left."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
