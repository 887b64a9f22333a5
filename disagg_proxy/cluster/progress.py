"""Progress of an engine as its responses show it: which legs wait for it, since when, and its last output.

Pings and /health go on while an engine's forward pass is stalled permanently (vLLM 0.21, measured), so only responses
show progress. The deadline after which no output means a stall is learnt from the instance's recent response times.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Protocol

from disagg_proxy.cluster.steps import StepClock
from disagg_proxy.errors import EngineDeadline, EngineError

if TYPE_CHECKING:
    from disagg_proxy.cluster.lease import Lease

_SAMPLES = 256
"""Latencies to the first byte that the baseline is computed from."""

_MIN_SAMPLES = 8
"""With fewer samples the longest deadline applies."""

_FACTOR = 5.0
"""The deadline, in multiples of the 99th percentile of the samples."""

_BLOCKED_FACTOR = 2.0
"""The deadline of an engine that has a known reason to be blocked, in multiples of the median."""

_MIN_PROMPT = 512
"""Shorter prompts, in tokens, count as this long: their prefill time does not depend on the length."""

_MAX_ABANDONED = 16
_MAX_ABANDONED_BYTES = 16 * 1024 * 1024
"""Bounds on the legs that are kept although they ended before their first byte."""


class LatencyBaseline:
    """Recent latencies of an engine to the first byte of a response."""

    def __init__(self) -> None:
        self._seconds: deque[float] = deque(maxlen=_SAMPLES)
        self._per_token: deque[float] = deque(maxlen=_SAMPLES)

    @property
    def learnt(self) -> bool:
        """Whether there are enough samples."""
        return len(self._seconds) >= _MIN_SAMPLES

    def compute_seconds(self, tokens: int) -> float:
        """Predicted seconds to compute prompts of ``tokens``; 0 without samples."""
        return _quantile(self._per_token, 0.5) * tokens if self._per_token else 0.0

    def add(self, seconds: float, tokens: int) -> None:
        """Add a sample: seconds to the first byte, and the prompt tokens that were computed (0 on decode)."""
        self._seconds.append(seconds)
        self._per_token.append(seconds / max(tokens, _MIN_PROMPT) if tokens else 0.0)

    def deadline(self, tokens: int, shortest: float, longest: float) -> float:
        """Seconds without any output after which the engine counts as stalled.

        Args:
            tokens: prompt tokens of all waiting requests together.
            shortest, longest: bounds on the result, in seconds.
        """
        if len(self._seconds) < _MIN_SAMPLES:
            return longest
        slow = max(_quantile(self._seconds, 0.99), _quantile(self._per_token, 0.99) * tokens)
        return min(max(_FACTOR * slow, shortest), longest)

    def blocked_deadline(self, tokens: int, shortest: float, longest: float) -> float:
        """As :meth:`deadline`, for an engine that has a known reason to be blocked; never longer than that.

        Derived from the time to compute the prompts alone: an engine that works through a queue makes progress
        in between.
        """
        usual = self.deadline(tokens, shortest, longest)
        if len(self._seconds) < _MIN_SAMPLES:
            return min(usual, shortest)
        compute = _quantile(self._per_token, 0.5) * max(tokens, _MIN_PROMPT)
        return min(usual, max(_BLOCKED_FACTOR * compute, shortest / 2))


def _quantile(values: deque[float], share: float) -> float:
    return sorted(values)[int(len(values) * share)]


class Failable(Protocol):
    """A response that can be ended when its instance is found stalled or lost."""

    def fail(self, error: EngineError | EngineDeadline) -> None:
        """End it with ``error``."""


def _cannot_move() -> None:
    """For legs whose request cannot go to another pair."""


class PendingResponse:
    """One leg that waits for an engine, from its sending to the end of its response.

    Attributes:
        progress: the tracker of the engine process. Once the body has begun, a relay that is not slowed down by its
            client calls no method here for each chunk: it only increments ``progress.outputs``.
        since: clock reading of the sending, in seconds.
        tokens: estimated prompt tokens to be computed, 0 on decode.
        begun: whether the first byte of the body has arrived.
        waiting: whether the proxy waits for the engine now, rather than for the client to read.
        expects_output: whether output is due before the end of the response; False for decode without streaming.
        answer: the response that :meth:`fail` ends; None until the request is sent.
        error: the argument of :meth:`fail`, None before.
        move: on prefill, moves the request to another pair if there is one; the leg itself continues.
        prefill: whether the leg is a prefill whose KV decode can do without.
        replay: on decode, sends the request's prefill once more with the same id; True when prefill succeeded.
        receiver: on prefill, the lease on the decode that its KV goes to.
        size: memory in bytes that keeping the leg after its end takes.
    """

    __slots__ = (
        "_clock",
        "answer",
        "begun",
        "error",
        "expects_output",
        "move",
        "prefill",
        "progress",
        "receiver",
        "replay",
        "since",
        "size",
        "tokens",
        "waiting",
    )

    def __init__(
        self,
        progress: ProgressTracker,
        clock: Callable[[], float],
        tokens: int,
        expects_output: bool,
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
        self.expects_output = expects_output
        self.answer: Failable | None = None
        self.error: EngineError | EngineDeadline | None = None
        self.replay = replay
        self.receiver = receiver
        self.move = move
        self.prefill = False
        self.size = size

    def on_data(self) -> None:
        """A chunk has arrived. Until :meth:`resume_wait` the proxy waits for the client, not for the engine."""
        self.waiting = False
        self.progress.outputs += 1
        if not self.begun:
            self.begun = True
            if self.expects_output:
                self.progress.baseline.add(self._clock() - self.since, self.tokens)

    def resume_wait(self) -> None:
        """The proxy waits for the engine again."""
        self.waiting = True

    def fail(self, error: EngineError | EngineDeadline) -> None:
        """The instance is stalled or lost: end the response with ``error``, or the request if it is not sent yet."""
        self.error = error
        if self.answer is not None:
            self.answer.fail(error)

    def detach(self) -> None:
        """Drop the references that would keep the leg alive in a cycle until the garbage collector finds it."""
        self.answer, self.replay, self.move = None, None, _cannot_move

    def end(self, *, received: bool = True) -> None:
        """The leg has ended; further calls have no effect.

        Args:
            received: False when the engine cannot have received the request.
        """
        self.progress.forget(self, received)


class ProgressTracker:
    """The legs that wait for one engine process, and its progress.

    Attributes:
        outputs: chunks of responses that arrived from the engine.
        peer_outputs: chunks that other workers of this proxy received from it, as last read.
        baseline: recent latencies to the first byte.
        pending: legs in flight, oldest first.
        abandoned: decode legs that ended before their first byte since the last output. The engine may be waiting for
            the KV of one of them.
        idle_since: clock reading from which the time without output is measured: the last output, or a later one.
        last_output_at: clock reading at which the last output was noticed.
        steps: the time without a change of output or counters, and the recent steps.
    """

    def __init__(self, now: float) -> None:
        self.outputs = 0
        self.peer_outputs = 0
        self.baseline = LatencyBaseline()
        self.steps = StepClock()
        self.pending: dict[PendingResponse, None] = {}
        self.abandoned: list[PendingResponse] = []
        self.idle_since = self.last_output_at = now
        self._seen = 0

    def begin(
        self,
        clock: Callable[[], float],
        *,
        tokens: int = 0,
        expects_output: bool = True,
        replay: Callable[[], Awaitable[bool]] | None = None,
        receiver: Lease | None = None,
        size: int = 0,
        move: Callable[[], None] | None = None,
    ) -> PendingResponse:
        """A leg is being sent. The arguments are the attributes of :class:`PendingResponse`."""
        pending = PendingResponse(self, clock, tokens, expects_output, replay, receiver, size, move or _cannot_move)
        self.pending[pending] = None
        return pending

    def forget(self, pending: PendingResponse, received: bool) -> None:
        """``pending`` has ended; see :meth:`PendingResponse.end`."""
        if self.pending.pop(pending, pending) is pending:
            return
        unanswered = received and not pending.begun and pending.replay is not None
        if unanswered and self._can_keep(pending):
            self.abandoned.append(pending)
        else:
            pending.detach()

    def _can_keep(self, pending: PendingResponse) -> bool:
        size = sum(leg.size for leg in self.abandoned) + pending.size
        return len(self.abandoned) < _MAX_ABANDONED and size <= _MAX_ABANDONED_BYTES

    def poll(self, now: float) -> bool:
        """Whether there was output since the last call."""
        outputs = self.outputs + self.peer_outputs
        progressed = outputs != self._seen
        if progressed:
            self._seen = outputs
            self.idle_since = self.last_output_at = now
            self.abandoned.clear()
        return progressed

    def fail(self, error: EngineError | EngineDeadline, prefills_only: bool = False) -> list[PendingResponse]:
        """End every pending leg, or every prefill, with ``error``; returns the legs."""
        pendings = [pending for pending in self.pending if pending.prefill or not prefills_only]
        for pending in pendings:
            pending.fail(error)
        return pendings

    def waiting(self) -> list[PendingResponse]:
        """The legs that wait for the engine now, oldest first."""
        return [pending for pending in self.pending if pending.waiting]

    def stalled_for(self, now: float) -> float:
        """Seconds without output during which the oldest waiting leg has waited; 0 when none waits."""
        oldest = next((pending for pending in self.pending if pending.waiting), None)
        return 0.0 if oldest is None else now - max(oldest.since, self.idle_since)

    def deadline(self, shortest: float, longest: float) -> float:
        """The value of :meth:`stalled_for`, in seconds, from which the engine counts as stalled."""
        return self.baseline.deadline(self._tokens(), shortest, longest)

    def blocked_deadline(self, shortest: float, longest: float) -> float:
        """The same for a prefill that sends to a lost decode; see :meth:`LatencyBaseline.blocked_deadline`."""
        return self.baseline.blocked_deadline(self._tokens(), shortest, longest)

    def compute_seconds(self) -> float:
        """Predicted seconds to compute the prompts of the waiting legs."""
        return self.baseline.compute_seconds(self._tokens())

    def _tokens(self) -> int:
        return sum(pending.tokens for pending in self.pending if pending.waiting)

    def blocked(self) -> list[PendingResponse]:
        """Waiting prefill legs whose decode is lost."""
        return [
            pending
            for pending in self.pending
            if pending.waiting and pending.receiver is not None and pending.receiver.lost
        ]

    def replay_candidates(self) -> list[PendingResponse]:
        """Decode legs that may be waiting for missing KV, the likeliest first.

        A decode stalls in the step that schedules the request, so that leg was sent at about the time of the last
        output, or is the first one after an idle time.
        """
        legs = [
            pending for pending in (*self.abandoned, *self.pending) if pending.replay is not None and not pending.begun
        ]
        return sorted(legs, key=self.distance)

    def distance(self, pending: PendingResponse) -> float:
        """Seconds between the sending of a leg and the last output: the engine likely waits for the closest one."""
        return abs(pending.since - self.idle_since)
