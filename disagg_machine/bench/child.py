"""Programs that `bench` starts and waits for. A signal that ends this command ends them first, in order."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from types import FrameType

from disagg_machine import signals


def run(
    words: Sequence[str],
    environment: Mapping[str, str],
    folder: str | os.PathLike[str] | None = None,
    *,
    apart: bool = False,
) -> int:
    """Start a program, wait for it, and return its exit code, 128 plus the signal when one ended it.

    Args:
        apart: its stdout is not shown, and it gets a session of its own: Ctrl+C reaches it once, from here.

    Raises:
        Interrupted: or KeyboardInterrupt; the program got TERM and has ended.
    """
    process: subprocess.Popen[bytes] | None = None
    try:
        with _deferred():
            process = subprocess.Popen(
                words,
                cwd=folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL if apart else None,
                start_new_session=apart,
            )
        status = process.wait()
    except (signals.Interrupted, KeyboardInterrupt):
        if process is not None:
            # It may be this process alone that got the signal.
            with signals.ignored():
                process.terminate()
                process.wait()
        raise
    return 128 - status if status < 0 else status


@contextlib.contextmanager
def _deferred() -> Iterator[None]:
    """Within, signals that end a command wait. The program inherits neither a handler nor a blocked signal."""
    arrived: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        arrived.append(number)

    handlers = {number: signal.getsignal(number) for number in signals.ENDING}
    handlers = {number: handler for number, handler in handlers.items() if handler != signal.SIG_IGN}
    try:
        for number in handlers:
            signal.signal(number, note)
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if arrived:
        signal.raise_signal(arrived[0])
