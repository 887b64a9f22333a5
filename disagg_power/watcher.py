"""The guard's watcher: ``python -m disagg_power.watcher STATE GUARD_PID``.

It resets what stands in the state file when the guard is gone (end of file on standard input) or hangs (5 s without a
byte), and ends with the guard. Signals do not end it: it is what is left when everything else was killed.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from disagg_power.devices import PowerError
from disagg_power.gpus import open_devices
from disagg_power.guard import SILENCE
from disagg_power.state_file import BadState, claims_folder
from disagg_power.undo import Undone, undo_file

START_SECONDS = 20.0
"""For the start of its Python."""
ATTEMPTS, PAUSE = 5, 0.5


def watch(source: int, undo: Callable[[bool], None], clock: Callable[[], float], silence: float = SILENCE) -> None:
    """Until the end of file.

    Args:
        undo: resets; its argument says whether the guard hangs, and still holds its claims.
    """
    heard = clock()
    while True:
        readable, _, _ = select.select([source], [], [], max(0.0, heard + silence - clock()))
        if not readable:
            if clock() - heard >= silence:
                undo(True)
                heard = clock()
            continue
        if not os.read(source, 4096):
            undo(False)
            return
        heard = clock()


def main() -> int:
    """The process."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    path, guard = Path(sys.argv[1]), int(sys.argv[2])
    environ = dict(os.environ)

    def undo(hangs: bool) -> None:
        for attempt in range(ATTEMPTS):
            try:
                done = undo_file(
                    path, lambda: open_devices(environ), claims_folder(environ), environ, but=guard if hangs else None
                )
            except (PowerError, BadState, OSError) as error:
                done = Undone(failed=(str(error),))
            # A killed guard's pipe is closed a moment before its claims are.
            if not done.failed and not done.held:
                break
            if attempt + 1 < ATTEMPTS:
                time.sleep(PAUSE)
        if done.gpus or done.failed or done.held:
            why = f"the guard {'hangs' if hangs else 'is gone'}"
            rest = f"; NOT reset: {'; '.join(done.failed)}" if done.failed else f"; {done.held}" if done.held else ""
            print(f"power watcher: {why}: reset GPUs {list(done.gpus)}{rest}", file=sys.stderr, flush=True)

    with contextlib.suppress(BrokenPipeError):
        print("ready", flush=True)
    watch(0, undo, time.monotonic)
    return 0


if __name__ == "__main__":
    sys.exit(main())
