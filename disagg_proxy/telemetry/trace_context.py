"""The W3C trace context of one request (https://www.w3.org/TR/trace-context/), without the library that exports it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class TraceContext:
    """Ids that are chosen when a request comes, so that the engines can be told of spans that are made in its end.

    Attributes:
        trace_id: of the client's context, or a new one.
        parent_id: the client's span, 0 without one.
        request_id, prefill_id, decode_id: of the proxy's spans. All tries of a request share the last two.
        sampled: whether the spans are exported; the engines are told.
        state: tracestate, as the client sent it.
    """

    trace_id: int
    parent_id: int
    request_id: int
    prefill_id: int
    decode_id: int
    sampled: bool
    state: str = ""

    @property
    def prefill_lines(self) -> bytes:
        """Header lines for prefill, whose spans belong under the prefill leg."""
        return self._lines(self.prefill_id)

    @property
    def decode_lines(self) -> bytes:
        """The same for decode."""
        return self._lines(self.decode_id)

    def _lines(self, span_id: int) -> bytes:
        state = f"tracestate: {self.state}\r\n" if self.state else ""
        return f"traceparent: 00-{self.trace_id:032x}-{span_id:016x}-{self.sampled:02x}\r\n{state}".encode()
