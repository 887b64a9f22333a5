"""The record of one generation request, from its complete body to the end of its HTTP exchange, however that ends.

Both ways into the proxy (``server/fast_path``, ``server/asgi/generation_routes``) open a record before the request is
validated, so that rejected requests, and clients that leave the queue, have one too. Requests that are rejected before
their body is complete (401, 408, 413, 415) have none. All times are readings of one monotonic clock, taken here only:

    arrived        the body is complete
    ready          the request is parsed and validated, and waits for admission
    admitted       it has capacity on its instances; if ``waited``, it was queued until then
    prefill_sent   the prefill leg of the last attempt starts
    prefill_done   prefill's complete response is here
    decode_sent    the decode leg of the last attempt starts; at the same time as prefill's where the protocol allows it
    first_byte     the first bytes of decode's body are here (all of them if the response is not streamed)
    ended          the exchange with the client is over

**Gaps between chunks** are sampled, since reading the clock for each would cost too much: of every 32 gaps between two
chunks of a streamed body one is measured. The first one measured differs from stream to stream, so that each gap is
equally likely. A chunk is what one read of decode's connection returned, mostly one token; the cost per chunk is one
countdown. Gaps during which the client did not read are not counted.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from disagg_proxy.cluster.choice import way_of
from disagg_proxy.errors import (
    ClientError,
    EngineBusy,
    EngineDeadline,
    EngineError,
    NoPair,
    Overloaded,
    ProxyError,
    Unavailable,
)

if TYPE_CHECKING:
    from disagg_proxy.cluster.choice import Forecast
    from disagg_proxy.cluster.instance import Instance
    from disagg_proxy.telemetry.request_recorder import Flow, RequestRecorder
    from disagg_proxy.telemetry.tracing import TraceContext

GAP_SAMPLE_INTERVAL = 32
"""One gap of this many is measured."""


class RequestRecord:
    """The facts of one request; a value that is not known (yet) is None.

    Attributes:
        seq: sequence number among records and events (event_log.py), 0 until the request has ended.
        unix: Unix time of its arrival in seconds, 0 until it has ended.
        route: path of the request.
        model: served name; decode's default model if the client named none.
        client_id: the client's X-Request-Id, None without one.
        own_id: the proxy's id of the request, 32 hexadecimal digits, with which :attr:`public_id` begins.
        key: name of the client's key in API_KEYS_FILE, None without a file.
        charged: estimated prompt tokens charged to the key, None if it has no limit of tokens.
        stream_events: events of a streamed body, None if they are not counted.
        public_id: the id in the response body.
        prefill, decode: keys of the instances of the last attempt; prefill is None where one engine serves it alone.
        way: how that attempt is served, a value of :class:`disagg_proxy.cluster.choice.Way`.
        forecast: what was predicted of that attempt, None where nothing is.
        flow: the counts of that pair.
        tries: attempts so far.
        status: HTTP status of the response, None if none was sent.
        outcome: ok, client_error, client_left, cut, deadline, engine_error, turned_away, no_pair, unavailable or
            proxy_error.
        cause: code of the error; ``engine_`` and the status of an engine's 4xx; or when the client left: in_queue,
            before_first_byte, mid_stream.
        streamed: whether the response is relayed as it arrives.
        prompt_tokens, cached_tokens: as prefill reports them.
        output_tokens: as decode reports it.
        pieces: chunks of a streamed body.
        paused: the client did not read for a while.
        gaps: gaps measured; gap_sum, gap_max: their sum and maximum in seconds.
        packed: msgpack of the record, cached by page_state.py.
        trace: its W3C trace context, if tracing is on.
    """

    __slots__ = (
        "_gap_start", "_interval", "_recorder", "admitted", "arrived", "cached_tokens", "cause", "charged",
        "client_id", "decode", "decode_sent", "ended", "first_byte", "flow", "forecast", "gap_max", "gap_sum", "gaps",
        "key", "model", "outcome", "output_tokens", "own_id", "packed", "paused", "pieces", "prefill", "prefill_done",
        "prefill_sent", "prompt_tokens", "public_id", "ready", "route", "seq", "status", "stream_events", "streamed",
        "trace", "tries", "unix", "waited", "way",
    )  # fmt: skip

    def __init__(
        self, recorder: RequestRecorder, route: str, client_id: str | None, own_id: str, interval: int
    ) -> None:
        self._recorder = recorder
        self.arrived: float = recorder.clock()
        self.route: str = route
        self.client_id: str | None = client_id
        self.own_id: str = own_id
        self.key: str | None = None
        self.charged: int | None = None
        self.stream_events: int | None = None
        self.seq: int = 0
        self.unix: float = 0.0
        self.ready: float | None = None
        self.admitted: float | None = None
        self.prefill_sent: float | None = None
        self.prefill_done: float | None = None
        self.decode_sent: float | None = None
        self.first_byte: float | None = None
        self.ended: float | None = None
        self.waited = False
        self.public_id: str | None = None
        self.model: str | None = None
        self.prefill: str | None = None
        self.decode: str | None = None
        self.way: str | None = None
        self.forecast: Forecast | None = None
        self.flow: Flow | None = None
        self.tries: int = 0
        self.status: int | None = None
        self.outcome: str = "client_left"
        self.cause: str | None = None
        self.streamed: bool = False
        self.prompt_tokens: int | None = None
        self.cached_tokens: int | None = None
        self.output_tokens: int | None = None
        self.paused: bool = False
        self.pieces: int = 0
        self.gaps: int = 0
        self.gap_sum: float = 0.0
        self.gap_max: float = 0.0
        self._gap_start: float | None = None
        self._interval = interval
        self.packed: bytes | None = None
        self.trace: TraceContext | None = None

    @property
    def request_id(self) -> str:
        """The X-Request-Id of the response: the client's own, or else the proxy's."""
        return self.client_id or self.own_id

    # -- progress

    def on_ready(self, model: str | None) -> None:
        """The request is parsed and validated, and waits for admission."""
        self.ready = self._recorder.clock()
        # JSON can escape a lone surrogate, which neither UTF-8 nor the encoders of logs and the page accept.
        self.model = model if model is None or model.isascii() else model.encode("utf-8", "replace").decode()

    def on_admitted(self) -> None:
        """The request has capacity on its instances. It counts as in flight from now on."""
        self.admitted = self._recorder.clock()
        self._recorder.stats.in_flight += 1

    def on_attempt(self, prefill: Instance | None, decode: Instance, public_id: str) -> None:
        """An attempt on these instances starts; ``public_id`` is the id that its response will carry."""
        self.tries += 1
        self.public_id = public_id
        if self.ended is not None:
            return
        self.prefill = None if prefill is None else prefill.key
        self.decode = decode.key
        self.way = way_of(prefill, decode).value
        self.prefill_sent = self.prefill_done = self.decode_sent = None
        if self.model is None:
            self.model = decode.default_model
        self._recorder.track_flow(self)

    def on_prefill_sent(self) -> None:
        """The prefill leg starts."""
        self.prefill_sent = self._recorder.clock()

    def on_prefill_response(self) -> None:
        """Prefill's complete response is here, whatever its status."""
        now = self._recorder.clock()
        if self.prefill_sent is not None:
            self._recorder.stats.prefill.add(now - self.prefill_sent)
        if self.ended is None:
            self.prefill_done = now

    def on_decode_sent(self) -> None:
        """The decode leg starts."""
        self.decode_sent = self._recorder.clock()

    def on_first_byte(self, streamed: bool) -> None:
        """The first bytes of the response body are here."""
        now = self._recorder.clock()
        self.streamed = streamed
        if self.ended is None:
            self.first_byte = now
        if streamed:
            self._recorder.add_ttft(now - self.arrived)
            if self.forecast is not None:
                self._recorder.learn_first_token(self)

    # -- outcome: the last call before end() counts

    def complete(self) -> None:
        """The client has got the complete response."""
        self.outcome, self.cause = "ok", None
        self._recorder.stats.total.add(self._recorder.clock() - self.arrived)

    def cut(self, error: ProxyError | None = None) -> None:
        """The response was cut off, because of ``error`` where it is known."""
        if error is not None:
            self.cause = error.code
        self.outcome = "cut"

    def refused(self, status: int) -> None:
        """An engine rejected the request with a 4xx ``status``."""
        self.outcome, self.cause = "client_error", f"engine_{status}"

    def fail(self, error: ProxyError) -> None:
        """The client gets ``error`` as its response."""
        self.outcome, self.cause, self.status = outcome_of(error), error.code, error.status

    def end(self) -> None:
        """The exchange with the client is over. Idempotent."""
        if self.ended is None:
            self.ended = self._recorder.clock()
            if self.outcome == "client_left":
                self._on_client_left()
            self._recorder.close(self)

    def _on_client_left(self) -> None:
        """There is no outcome: the client left, or the proxy closed the exchange at the end of its shutdown."""
        if self._recorder.force_closing:
            self.outcome, self.cause = "unavailable" if self.first_byte is None else "cut", "shutdown"
        elif self.admitted is None:
            self.cause = "in_queue"
        else:
            self.cause = "before_first_byte" if self.first_byte is None else "mid_stream"

    # -- chunks of a streamed body

    @property
    def first_sample(self) -> int:
        """Number of chunks after which to call :meth:`sample_gap` first."""
        return self._interval

    def sample_gap(self) -> int:
        """Start or end the measurement of a gap, once the requested number of chunks has passed.

        Returns:
            The number of chunks after which to call again.
        """
        now = self._recorder.clock()
        start = self._gap_start
        if start is None:
            self._gap_start = now
            self._interval += 1
            return 1
        self._gap_start = None
        gap = now - start
        self.gaps += 1
        self.gap_sum += gap
        if gap > self.gap_max:
            self.gap_max = gap
        self.pieces += self._interval
        self._recorder.add_gap(gap, self._interval)
        self._interval = GAP_SAMPLE_INTERVAL - 1
        return GAP_SAMPLE_INTERVAL - 1

    def skip_gap(self) -> None:
        """Discard the gap being measured: it includes time during which the client did not read. Measure the next."""
        self._gap_start = None
        self.paused = True

    def end_of_stream(self, left: int) -> None:
        """The body is over, ``left`` chunks before the next :meth:`sample_gap`."""
        rest = self._interval - left
        self._interval = left
        self.pieces += rest
        self._recorder.add_chunks(rest)

    # -- durations in seconds

    @property
    def queue_time(self) -> float:
        """Time in the admission queue, also of requests that were never admitted; 0 without queueing."""
        if not self.waited or self.ready is None:
            return 0.0
        until = self.admitted if self.admitted is not None else self.ended
        return 0.0 if until is None else until - self.ready

    @property
    def prefill_time(self) -> float | None:
        """Duration of the prefill leg of the last attempt."""
        return _between(self.prefill_sent, self.prefill_done)

    @property
    def ttft(self) -> float | None:
        """From the complete request to the first bytes of a streamed response; None if it is not streamed."""
        if not self.streamed:
            return None
        return _between(self.arrived, self.first_byte)

    @property
    def total(self) -> float:
        """From the complete request to the end of the exchange."""
        return (self.arrived if self.ended is None else self.ended) - self.arrived

    @property
    def mean_gap(self) -> float | None:
        """Mean time between two chunks of a streamed body, over all of them."""
        if self.first_byte is None or self.ended is None or self.pieces < 2:
            return None
        return (self.ended - self.first_byte) / (self.pieces - 1)


def _between(start: float | None, end: float | None) -> float | None:
    return None if start is None or end is None else end - start


def outcome_of(error: ProxyError) -> str:
    """The outcome of a request that ends with ``error``."""
    if isinstance(error, Overloaded):
        return "turned_away"
    if isinstance(error, NoPair):
        return "no_pair"
    if isinstance(error, (Unavailable, EngineBusy)):
        return "unavailable"
    if isinstance(error, ClientError):
        return "client_error"
    if isinstance(error, EngineDeadline):
        return "deadline"
    return "engine_error" if isinstance(error, EngineError) else "proxy_error"
