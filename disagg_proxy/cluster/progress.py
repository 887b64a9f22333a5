"""What the proxy itself sees of an instance's engine at work: who waits for it, since when, and when it last moved.

Pings and /health go on while an engine's forward pass stalls permanently (vLLM 0.21, measured), so only the
answers tell. How long a silence must be to mean something is learnt from the instance's own recent times.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Protocol

from disagg_proxy.errors import EngineDeadline, EngineError

if TYPE_CHECKING:
    from disagg_proxy.cluster.lease import Lease

_RECENT = 256
"""First answers that the pace is learnt from."""

_ENOUGH = 8
"""With fewer of them the longest deadline holds."""

_FACTOR = 5.0
"""An answer is late when it takes so many times what the slowest recent ones took."""

_BLOCKED_FACTOR = 2.0
"""The same where the cause is known already, in multiples of the median."""

_SMALL = 512
"""Prompt tokens below which a prefill's time is not the prompt's doing."""

_LEFT = 16
_LEFT_BYTES = 16 * 1024 * 1024
"""Bounds on what is remembered of requests that were given up before their first byte."""


class LatencyBaseline:
    """How fast an engine gave its first answers lately."""

    def __init__(self) -> None:
        self._seconds: deque[float] = deque(maxlen=_RECENT)
        self._per_token: deque[float] = deque(maxlen=_RECENT)

    def add(self, seconds: float, tokens: int) -> None:
        """One first answer: how long it took, and for how many prompt tokens (0 when they do not matter)."""
        self._seconds.append(seconds)
        self._per_token.append(seconds / max(tokens, _SMALL) if tokens else 0.0)

    def deadline(self, tokens: int, shortest: float, longest: float) -> float:
        """Seconds after which no first answer at all means that the engine is stalled.

        Args:
            tokens: prompt tokens that are being waited for, together.
            shortest, longest: bounds, in seconds.
        """
        if len(self._seconds) < _ENOUGH:
            return longest
        slow = max(_quantile(self._seconds, 0.99), _quantile(self._per_token, 0.99) * tokens)
        return min(max(_FACTOR * slow, shortest), longest)

    def blocked_deadline(self, tokens: int, shortest: float, longest: float) -> float:
        """As :meth:`deadline`, for an engine that has a known reason to be blocked; never longer than that.

        Only the computation of the prompts counts, since an engine that works on a queue steps in between.
        """
        usual = self.deadline(tokens, shortest, longest)
        if len(self._seconds) < _ENOUGH:
            return min(usual, shortest)
        compute = _quantile(self._per_token, 0.5) * max(tokens, _SMALL)
        return min(usual, max(_BLOCKED_FACTOR * compute, shortest / 2))


def _quantile(values: deque[float], share: float) -> float:
    return sorted(values)[int(len(values) * share)]


class Failable(Protocol):
    """What ends when its instance is found stalled or lost."""

    def fail(self, error: EngineError | EngineDeadline) -> None:
        """End it with ``error``."""


def _stay() -> None:
    """The leg cannot move."""


class PendingResponse:
    """One leg that waits for an engine, from its sending to the end of its answer.

    Attributes:
        pulse: whose it is. Further parts of an answer that has begun, and is passed on at once, only count its moves.
        since: clock reading of the sending.
        tokens: estimated prompt tokens to be computed, 0 where there are none.
        begun: whether the first byte of the answer's body has come.
        waiting: whether the engine is waited for now, and not the client.
        telling: whether the engine is due to say something before the answer's end. Without streaming decode is not.
        answer: what :meth:`fail` ends: the leg's answer, once its request is sent.
        error: what :meth:`fail` was called with, None before.
        move: for a prefill, lets the request leave for another pair if there is one; the leg itself continues.
        replay: sends the prefill of a decode leg once more, with the same id; True when prefill did it.
        receiver: for a prefill, the lease on the decode that its KV goes to.
        size: bytes that remembering the leg takes.
    """

    __slots__ = (
        "_clock",
        "answer",
        "begun",
        "error",
        "move",
        "progress",
        "receiver",
        "replay",
        "since",
        "size",
        "telling",
        "tokens",
        "waiting",
    )

    def __init__(
        self,
        progress: ProgressTracker,
        clock: Callable[[], float],
        tokens: int,
        telling: bool,
        replay: Callable[[], Awaitable[bool]] | None,
        receiver: Lease | None,
        size: int,
        move: Callable[[], None],
    ) -> None:
        self.progress = progress
        self._clock = clock
        self.since = clock()
        self.tokens = tokens
        self.begun = False
        self.waiting = True
        self.telling = telling
        self.answer: Failable | None = None
        self.error: EngineError | EngineDeadline | None = None
        self.replay = replay
        self.receiver = receiver
        self.move = move
        self.size = size

    def heard(self) -> None:
        """A part of the answer has come; until :meth:`listen` it is the client's turn."""
        self.waiting = False
        self.progress.moves += 1
        if not self.begun:
            self.begun = True
            if self.telling:
                self.progress.pace.add(self._clock() - self.since, self.tokens)

    def listen(self) -> None:
        """The engine is waited for again."""
        self.waiting = True

    def fail(self, error: EngineError | EngineDeadline) -> None:
        """The instance is stalled or lost: end the leg's answer with ``error``, or its request before it is sent."""
        self.error = error
        if self.answer is not None:
            self.answer.fail(error)

    def let_go(self) -> None:
        """Drop the references that would keep the leg alive in a cycle until the garbage collector finds it."""
        self.answer, self.replay, self.move = None, None, _stay

    def end(self, *, received: bool = True) -> None:
        """The leg is over; harmless when it was before.

        Args:
            received: False when the engine cannot have got the request.
        """
        self.progress.forget(self, received)


class ProgressTracker:
    """All vigils over one engine process, and when it was last seen to move.

    Attributes:
        moves: parts of answers that came from the engine.
        moves_elsewhere: those that other processes of this proxy got.
        open: vigils, oldest first.
        left: decode legs that were given up before their first byte since the engine was last seen to move. The
            engine may be waiting for the KV of one of them.
        still_since: clock reading at which the last move had been seen, or from which silence is measured anew.
        moved_at: clock reading at which the last move was seen.
    """

    def __init__(self, now: float) -> None:
        self.moves = 0
        self.moves_elsewhere = 0
        self.pace = LatencyBaseline()
        self.open: dict[PendingResponse, None] = {}
        self.left: list[PendingResponse] = []
        self.still_since = self.moved_at = now
        self._seen = 0

    def begin(
        self,
        clock: Callable[[], float],
        *,
        tokens: int = 0,
        telling: bool = True,
        replay: Callable[[], Awaitable[bool]] | None = None,
        receiver: Lease | None = None,
        size: int = 0,
        move: Callable[[], None] | None = None,
    ) -> PendingResponse:
        """A leg is being sent; the arguments are the attributes of :class:`PendingResponse`."""
        pending = PendingResponse(self, clock, tokens, telling, replay, receiver, size, move or _stay)
        self.open[pending] = None
        return pending

    def forget(self, pending: PendingResponse, received: bool) -> None:
        """A vigil is over."""
        if self.open.pop(pending, pending) is pending:
            return
        lost = received and not pending.begun and pending.replay is not None
        if lost and len(self.left) < _LEFT and sum(v.size for v in self.left) + pending.size <= _LEFT_BYTES:
            self.left.append(pending)
        else:
            pending.let_go()

    def look(self, now: float) -> bool:
        """Whether the engine has moved since the last look."""
        moves = self.moves + self.moves_elsewhere
        moved = moves != self._seen
        if moved:
            self._seen = moves
            self.still_since = self.moved_at = now
            self.left.clear()
        return moved

    def fail(self, error: EngineError | EngineDeadline) -> list[PendingResponse]:
        """End every open leg with ``error``, as far as each leg allows it; returns their vigils."""
        pendings = list(self.open)
        for pending in pendings:
            pending.fail(error)
        return pendings

    def waiting(self) -> list[PendingResponse]:
        """Those who wait for the engine now, oldest first."""
        return [pending for pending in self.open if pending.waiting]

    def stalled_for(self, now: float) -> float:
        """Seconds for which the one that has waited longest has seen nothing move; 0 when nobody waits."""
        oldest = next((pending for pending in self.open if pending.waiting), None)
        return 0.0 if oldest is None else now - max(oldest.since, self.still_since)

    def deadline(self, shortest: float, longest: float) -> float:
        """Seconds of such a silence that mean that the engine is stalled."""
        return self.pace.deadline(self._tokens(), shortest, longest)

    def blocked_deadline(self, shortest: float, longest: float) -> float:
        """The same for an engine that sends to one which is lost: it need not be learnt what is normal."""
        return self.pace.blocked_deadline(self._tokens(), shortest, longest)

    def _tokens(self) -> int:
        return sum(pending.tokens for pending in self.open if pending.waiting)

    def blocked(self) -> list[PendingResponse]:
        """Prefills in flight whose decode is lost."""
        return [
            pending
            for pending in self.open
            if pending.waiting and pending.receiver is not None and pending.receiver.lost
        ]

    def unanswered(self) -> list[PendingResponse]:
        """Decode legs of which one may be waiting for KV that is not there, the likeliest first.

        An engine stops in the step that takes the request in, so that one was sent about when it was last seen to
        move, or is the first one after an idle time.
        """
        legs = [pending for pending in (*self.left, *self.open) if pending.replay is not None and not pending.begun]
        return sorted(legs, key=self.distance)

    def distance(self, pending: PendingResponse) -> float:
        """How unlikely a leg is to be the one that the engine waits for."""
        return abs(pending.since - self.still_since)
