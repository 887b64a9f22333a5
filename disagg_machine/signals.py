"""Ctrl+C, TERM and a closed terminal end a command in order: they are raised where it waits."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

ENDING = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 143}
"""Signals that end a command, and its exit code then."""


class Interrupted(BaseException):
    """A signal ends this command; no error, so that nothing catches it by chance."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


def _raise(number: int, frame: FrameType | None) -> None:
    raise Interrupted(ENDING[signal.Signals(number)])


@contextlib.contextmanager
def raised() -> Iterator[None]:
    """Within, these signals raise :class:`Interrupted`. One that is ignored, as after `nohup`, stays so."""
    before = {number: signal.getsignal(number) for number in ENDING}
    try:
        for number, handler in before.items():
            if handler != signal.SIG_IGN:
                signal.signal(number, _raise)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def ignored() -> Iterator[None]:
    """Within, they are ignored: a clean-up is finished."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in ENDING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """Within, they wait: the step is done whole or not at all."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def restore_sigpipe() -> None:
    """To be called before this process becomes another program, which would inherit that Python ignores SIGPIPE."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
