"""The other end of the guard: starts one and holds its lease, which ends with this process, and the clocks with it."""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ANSWER_SECONDS = 30.0
"""For an answer of the guard: each call of a back end may take 3 s, and there may be many GPUs."""


class LeaseError(Exception):
    """The guard did not do it; the text is the reason.

    Attributes:
        kind: ``permission``, ``refused``, ``device``, or ``gone``: there is no guard any more.
    """

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind = kind


def guard_words(state: Path, gpus: Sequence[str], backend: str, *, take_over: bool = False) -> list[str]:
    """The command line of a guard."""
    words = [sys.executable, "-m", "disagg_power", "guard", "--state", str(state), "--backend", backend]
    words += ["--gpus", ",".join(gpus)]
    return [*words, "--take-over"] if take_over else words


class Lease:
    """A guard that this process has started.

    Raises:
        LeaseError: it does not start.
    """

    def __init__(self, words: Sequence[str], environ: Mapping[str, str] | None = None) -> None:
        self._process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=None if environ is None else dict(environ)
        )
        self._rest = b""
        self._number = 0
        try:
            first = self._read(ANSWER_SECONDS)
            if not first.get("ready"):
                raise LeaseError(str(first.get("kind", "gone")), str(first.get("error", "the guard did not start")))
        except LeaseError:
            self.close()
            raise

    @property
    def pid(self) -> int:
        """Of the guard."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether the guard runs."""
        return self._process.poll() is None

    def set(self, gpu: str, *, sm: str = "", memory: str = "", power: str = "") -> dict[str, Any]:
        """Set one GPU; values as in the settings. Returns the fields of :class:`disagg_power.guard.Applied`.

        Raises:
            LeaseError: it was not set.
        """
        return self._request({"op": "set", "gpu": gpu, "sm": sm, "memory": memory, "power": power})

    def default(self, gpu: str) -> None:
        """The SM clock of one GPU back to its default. Raises LeaseError."""
        self._request({"op": "default", "gpu": gpu})

    def reset(self) -> list[str]:
        """Everything as it was before: what failed. Raises LeaseError."""
        return list(self._request({"op": "reset"})["failed"])

    def beat(self) -> None:
        """A sign of life, at least every second.

        Raises:
            LeaseError: the guard is gone.
        """
        self._send(b"\n")

    def close(self) -> int:
        """End the lease, wait until clocks are reset, and return the guard's exit code; 1: something was not reset."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        code = self._process.wait()
        self._process.stdout.close()
        return code

    def _request(self, request: Mapping[str, Any]) -> dict[str, Any]:
        self._number += 1
        self._send(json.dumps({"id": self._number, **request}).encode() + b"\n")
        deadline = time.monotonic() + ANSWER_SECONDS
        while True:
            reply = self._read(deadline - time.monotonic())
            if reply.get("id") == self._number:
                break
        if not reply["ok"]:
            raise LeaseError(reply["kind"], reply["error"])
        return reply

    def _send(self, data: bytes) -> None:
        try:
            assert self._process.stdin is not None
            self._process.stdin.write(data)
            self._process.stdin.flush()
        except (BrokenPipeError, ValueError):
            raise LeaseError("gone", "the guard is gone; clocks are reset by its watcher") from None

    def _read(self, seconds: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        deadline = time.monotonic() + seconds
        while b"\n" not in self._rest:
            ready, _, _ = select.select([self._process.stdout], [], [], max(0.0, deadline - time.monotonic()))
            data = os.read(self._process.stdout.fileno(), 65536) if ready else b""
            if not data:
                text = "the guard is gone" if ready else f"the guard has not answered for {seconds:g} s"
                raise LeaseError("gone", text)
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\n")
        value: dict[str, Any] = json.loads(line)
        return value
