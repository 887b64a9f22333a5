"""Fault injection for one engine: failures of its HTTP and KV side, and holds that stop its step loop.

Nothing here sleeps or polls: a hold is a gate that the step loop stops at, and
:meth:`disagg_sim.engine.SimEngine.wait_until` waits until it is there.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import cycle
from typing import Literal

HoldPoint = Literal["schedule", "forward", "answer"]
Trick = Literal["answer", "reset", "close", "hang"]


@dataclass
class Injected:
    """What happens to the next matching HTTP request instead of its route."""

    trick: Trick
    path: str | None
    status: int = 500
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)


class Faults:
    """Controls of one engine; all may be used before and after ``start``.

    Attributes:
        health_status: status that GET /health answers; None: the engine's real one.
        pings: False: the engine sends no pings.
        kv_answers: False: the KV port of a ``disagg_kv`` engine accepts connections and data but never answers, as that
            of a stopped process does.
        corrupt_kv: a ``disagg_kv`` prefill engine sends wrong bytes.
        split: sizes in bytes of the chunks that every body is written in, used in turn; () writes normally.
        held_at: the hold that the step loop waits at, None while it runs.
    """

    def __init__(self, changed: Callable[[], None]) -> None:
        self.health_status: int | None = None
        self.pings = True
        self.kv_answers = True
        self.corrupt_kv = False
        self.split: Sequence[int] = ()
        self._changed = changed
        self._injected: list[Injected] = []
        self._cuts: list[int] = []
        self._losses = 0
        self._lost: set[str] = set()
        self._allowed: dict[HoldPoint, int] = {}
        self._opened = asyncio.Event()
        self.held_at: HoldPoint | None = None
        self.on_refuse: Callable[[bool], None] = lambda refuse: None

    # KV.

    def lose_kv(self, prompts: int = 1) -> None:
        """Drop the KV of the next ``prompts`` prompts that arrive; KV that is sent again is accepted."""
        self._losses += prompts

    def keep_kv(self) -> None:
        """Lose no further prompts."""
        self._losses = 0

    def loses(self, request_id: str, first: bool) -> bool:
        """Whether a tensor is dropped, ``first`` of its request or not. For the KV listener."""
        if first:
            self._lost.discard(request_id)
            if self._losses:
                self._losses -= 1
                self._lost.add(request_id)
        return request_id in self._lost

    # Time.

    def hold(self, point: HoldPoint = "schedule", after: int = 0) -> None:
        """Stop the step loop at ``point``, after ``after`` more passages.

        "schedule": requests have arrived, but none is in a batch yet (an abort now means that P never sends);
        "forward": the batch is fixed, nothing is computed; "answer": computed and, on P, sent, but no token is out.
        """
        self._allowed[point] = after

    def release(self, point: HoldPoint | None = None) -> None:
        """Let the step loop run on; None removes every hold."""
        if point is None:
            self._allowed.clear()
        else:
            self._allowed.pop(point, None)
        self._opened.set()

    def step(self, point: HoldPoint = "schedule", passages: int = 1) -> None:
        """Let exactly ``passages`` more through a point that is being held."""
        self._allowed[point] = self._allowed.get(point, 0) + passages
        self._opened.set()

    @contextmanager
    def held(self, point: HoldPoint = "schedule") -> Iterator[None]:
        """Hold ``point`` inside a with block."""
        self.hold(point)
        try:
            yield
        finally:
            self.release(point)

    async def gate(self, point: HoldPoint) -> None:
        """Pass ``point``, waiting while it is held. For the step loop."""
        while (left := self._allowed.get(point)) is not None:
            if left > 0:
                self._allowed[point] = left - 1
                break
            self._opened.clear()
            self.held_at = point
            self._changed()
            await self._opened.wait()
        if self.held_at is not None:
            self.held_at = None
            self._changed()

    # HTTP.

    def fail_next(
        self,
        status: int,
        body: bytes | str = b"",
        headers: Mapping[str, str] | None = None,
        *,
        path: str | None = None,
        times: int = 1,
    ) -> None:
        """Answer the next ``times`` requests (to ``path``) with this response; the engine never sees them."""
        raw = body.encode() if isinstance(body, str) else body
        self._inject(Injected("answer", path, status, raw, dict(headers or {})), times)

    def reset_next(self, *, path: str | None = None, times: int = 1) -> None:
        """Read the next request completely, then reset its connection instead of answering."""
        self._inject(Injected("reset", path), times)

    def close_next(self, *, path: str | None = None, times: int = 1) -> None:
        """Read the next request completely, then close its connection with FIN instead of answering."""
        self._inject(Injected("close", path), times)

    def hang_next(self, *, path: str | None = None, times: int = 1) -> None:
        """Read the next request completely and never answer it."""
        self._inject(Injected("hang", path), times)

    def _inject(self, injected: Injected, times: int) -> None:
        self._injected.extend([injected] * times)

    def injected_for(self, path: str) -> Injected | None:
        """Take the first trick meant for ``path``. For the HTTP side."""
        for position, injected in enumerate(self._injected):
            if injected.path is None or injected.path == path:
                return self._injected.pop(position)
        return None

    def cut_stream_after(self, tokens: int, *, times: int = 1) -> None:
        """Reset the connection of the next stream(s) after that many chunks with a token; 0: after the headers."""
        self._cuts.extend([tokens] * times)

    def take_cut(self) -> int | None:
        """The cut for a stream that begins now. For the HTTP side."""
        return self._cuts.pop(0) if self._cuts else None

    def split_writes(self, sizes: Sequence[int]) -> None:
        """Write every body of a generation in chunks of these sizes in bytes, in turn; an empty sequence ends it."""
        if any(size < 1 for size in sizes):
            raise ValueError("sizes must be at least 1")
        self.split = tuple(sizes)

    def chunks(self, data: bytes) -> Iterator[bytes]:
        """``data`` in the chunks that it is to be written in. For the HTTP side."""
        if not self.split:
            yield data
            return
        sizes = cycle(self.split)
        start = 0
        while start < len(data):
            end = start + next(sizes)
            yield data[start:end]
            start = end

    def refuse_connections(self) -> None:
        """Close the HTTP listener: new connections are refused, open ones stay."""
        self.on_refuse(True)

    def accept_connections(self) -> None:
        """Listen again on the same port."""
        self.on_refuse(False)
