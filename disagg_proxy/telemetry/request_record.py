"""One generation request, from the moment its body is complete to the end of its HTTP exchange, however that ends.

Both ways in (``server/fast_path``, ``server/asgi/generation_routes``) open a record before anything of the request is
judged, so that refusals, full queues and clients that leave the queue have one too. Requests that are refused before
their body is complete (401, 408, 413, 415) have none. All times are readings of one monotonic clock, taken here and
nowhere else:

    arrived           the body is complete
    ready             it is read and checked, and asks for instances
    admitted          it has its places on instances; until then it waited in the queue, if ``waited``
    prefill_asked     a leg to prefill begins, of the last try
    prefill_answered  prefill's whole answer is here
    decode_asked      the decode leg begins, of the last try; together with prefill's where the protocol allows it
    first_byte        the first bytes of the body of decode's answer are here (all of them when it is not streamed)
    ended             the client's exchange is over

**Gaps between tokens** are sampled, since a clock reading for each of them would be felt: of every 32 gaps between two
pieces of a streamed body one is measured, and the first one that is differs from stream to stream, so that each gap has
the same chance. A piece is what one read of decode's connection brought, mostly one token. It costs one countdown for
each piece. Gaps in which the client took nothing are not counted.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from disagg_proxy.errors import (
    ClientError,
    EngineDeadline,
    EngineError,
    NoPair,
    Overloaded,
    ProxyError,
    Unavailable,
)

if TYPE_CHECKING:
    from disagg_proxy.cluster.instance import Instance
    from disagg_proxy.telemetry.request_recorder import Flow, RequestRecorder
    from disagg_proxy.telemetry.trace_context import TraceContext

EVERY = 32
"""Of so many gaps one is measured."""


class RequestRecord:
    """Facts of one request; whatever is not known (yet) is None.

    Attributes:
        seq: its place among all records and events (journal.py), 0 until it has ended.
        unix: Unix time of its arrival, 0 until it has ended.
        route: path. model: served name, decode's default where the client named none.
        client_id: the client's own X-Request-Id. public_id: the id in the answer's body.
        prefill, decode: keys of the instances of the last try; prefill is None where decode serves alone.
        tries: pairs that it was put on.
        status: of the answer, None when there was none.
        outcome: ok, client_error, client_left, cut, deadline, engine_error, turned_away, no_pair, unavailable or
            proxy_error. cause: the error's code, ``engine_`` and the status of an engine's refusal, or where a client
            left: in_queue, before_first_byte, mid_stream.
        streamed: whether the answer is passed on as it comes.
        prompt_tokens, cached_tokens: as prefill's answer says. output_tokens: where decode's answer says so.
        pieces: of a streamed body. gaps: that were measured; gap_sum, gap_max: their seconds.
        packed: what the page is told of it (news.py), once somebody has asked.
        trace: its W3C trace context, where traces are on.
    """

    __slots__ = (
        "_looked_at", "_recorder", "_step", "admitted", "arrived", "cached_tokens", "cause", "client_id",
        "decode", "decode_asked", "ended", "first_byte", "flow", "gap_max", "gap_sum", "gaps", "model", "outcome",
        "output_tokens", "packed", "pieces", "prefill", "prefill_answered", "prefill_asked", "prompt_tokens",
        "public_id", "ready", "route", "seq", "status", "streamed", "trace", "tries", "unix", "waited",
    )  # fmt: skip

    def __init__(self, recorder: RequestRecorder, route: str, client_id: str | None, step: int) -> None:
        self._recorder = recorder
        self.arrived: float = recorder.clock()
        self.route: str = route
        self.client_id: str | None = client_id
        self.seq: int = 0
        self.unix: float = 0.0
        self.ready: float | None = None
        self.admitted: float | None = None
        self.prefill_asked: float | None = None
        self.prefill_answered: float | None = None
        self.decode_asked: float | None = None
        self.first_byte: float | None = None
        self.ended: float | None = None
        self.waited = False
        self.public_id: str | None = None
        self.model: str | None = None
        self.prefill: str | None = None
        self.decode: str | None = None
        self.flow: Flow | None = None
        self.tries: int = 0
        self.status: int | None = None
        self.outcome: str = "client_left"
        self.cause: str | None = None
        self.streamed: bool = False
        self.prompt_tokens: int | None = None
        self.cached_tokens: int | None = None
        self.output_tokens: int | None = None
        self.pieces: int = 0
        self.gaps: int = 0
        self.gap_sum: float = 0.0
        self.gap_max: float = 0.0
        self._looked_at: float | None = None
        self._step = step
        self.packed: bytes | None = None
        self.trace: TraceContext | None = None

    # -- its way

    def asks(self, model: str | None) -> None:
        """It is read and checked, and asks for instances."""
        self.ready = self._recorder.clock()
        self.model = model

    def admit(self) -> None:
        """It has places on instances: from now on it counts as in flight."""
        self.admitted = self._recorder.clock()
        self._recorder.stats.in_flight += 1

    def put_on(self, prefill: Instance | None, decode: Instance, public_id: str) -> None:
        """A try begins on these instances."""
        self.tries += 1
        self.public_id = public_id
        if self.ended is not None:
            return
        self.prefill = None if prefill is None else prefill.key
        self.decode = decode.key
        self.prefill_asked = self.prefill_answered = self.decode_asked = None
        if self.model is None:
            self.model = decode.default_model
        self._recorder.follow(self)

    def ask_prefill(self) -> None:
        """The prefill leg begins."""
        self.prefill_asked = self._recorder.clock()

    def answer_prefill(self) -> None:
        """Prefill's answer is here, whatever it says."""
        now = self._recorder.clock()
        if self.prefill_asked is not None:
            self._recorder.stats.prefill.add(now - self.prefill_asked)
        if self.ended is None:
            self.prefill_answered = now

    def ask_decode(self) -> None:
        """The decode leg begins."""
        self.decode_asked = self._recorder.clock()

    def begin_answer(self, streamed: bool) -> None:
        """The first bytes of the answer are here."""
        now = self._recorder.clock()
        self.streamed = streamed
        if self.ended is None:
            self.first_byte = now
        if streamed:
            self._recorder.answered(now - self.arrived)

    # -- its outcome; the last word before the end counts

    def complete(self) -> None:
        """The answer is whole."""
        self.outcome, self.cause = "ok", None
        self._recorder.stats.total.add(self._recorder.clock() - self.arrived)

    def cut(self, error: ProxyError | None = None) -> None:
        """The answer broke off, with this error of decode's."""
        if error is not None:
            self.cause = error.code
        self.outcome = "cut"

    def refused(self, status: int) -> None:
        """An engine has found the request itself at fault."""
        self.outcome, self.cause = "client_error", f"engine_{status}"

    def fail(self, error: ProxyError) -> None:
        """The client is told of ``error``."""
        self.outcome, self.cause, self.status = outcome_of(error), error.code, error.status

    def end(self) -> None:
        """The client's exchange is over; only the first call counts."""
        if self.ended is None:
            self.ended = self._recorder.clock()
            if self.outcome == "client_left":
                self._left()
            self._recorder.close(self)

    def _left(self) -> None:
        """The client is gone without an outcome, or the proxy has ended its exchange."""
        if self._recorder.cutting_off:
            self.outcome, self.cause = "unavailable" if self.first_byte is None else "cut", "shutdown"
        elif self.admitted is None:
            self.cause = "in_queue"
        else:
            self.cause = "before_first_byte" if self.first_byte is None else "mid_stream"

    # -- its pieces

    @property
    def first_look(self) -> int:
        """After how many pieces of the body to call :meth:`look`."""
        return self._step

    def look(self) -> int:
        """As many pieces have passed as were asked for: a gap begins to be measured, or ends. After how many to call
        again."""
        now = self._recorder.clock()
        before = self._looked_at
        if before is None:
            self._looked_at = now
            self._step += 1
            return 1
        self._looked_at = None
        gap = now - before
        self.gaps += 1
        self.gap_sum += gap
        if gap > self.gap_max:
            self.gap_max = gap
        self.pieces += self._step
        self._recorder.measured(gap, self._step)
        self._step = EVERY - 1
        return EVERY - 1

    def disturbed(self) -> None:
        """The client took nothing: the gap that is being measured is not the engine's, but the next one."""
        self._looked_at = None

    def passed(self, left: int) -> None:
        """The body is over, ``left`` pieces before the next look."""
        rest = self._step - left
        self._step = left
        self.pieces += rest
        self._recorder.passed(rest)

    # -- what is known in the end, in seconds

    @property
    def queue_time(self) -> float:
        """In the queue, also in vain; 0 without one."""
        if not self.waited or self.ready is None:
            return 0.0
        until = self.admitted if self.admitted is not None else self.ended
        return 0.0 if until is None else until - self.ready

    @property
    def prefill_time(self) -> float | None:
        """From asking prefill to its answer, of the last try."""
        return _between(self.prefill_asked, self.prefill_answered)

    @property
    def ttft(self) -> float | None:
        """From the complete request to the first bytes of a streamed answer; a whole one shows no first token."""
        if not self.streamed:
            return None
        return _between(self.arrived, self.first_byte)

    @property
    def total(self) -> float:
        """From the complete request to the end."""
        return (self.arrived if self.ended is None else self.ended) - self.arrived

    @property
    def mean_gap(self) -> float | None:
        """Between two pieces of a whole streamed body, over all of them."""
        if self.first_byte is None or self.ended is None or self.pieces < 2:
            return None
        return (self.ended - self.first_byte) / (self.pieces - 1)


def _between(start: float | None, end: float | None) -> float | None:
    return None if start is None or end is None else end - start


def outcome_of(error: ProxyError) -> str:
    """The word for a request that ends with ``error``."""
    if isinstance(error, Overloaded):
        return "turned_away"
    if isinstance(error, NoPair):
        return "no_pair"
    if isinstance(error, Unavailable):
        return "unavailable"
    if isinstance(error, ClientError):
        return "client_error"
    if isinstance(error, EngineDeadline):
        return "deadline"
    return "engine_error" if isinstance(error, EngineError) else "proxy_error"
