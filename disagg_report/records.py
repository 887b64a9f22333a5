"""Records of a measurement, and their JSON.

Times are seconds from the first request of the measurement, or milliseconds where the name ends with ``_ms``.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

FORMAT = 1


class BadRecord(Exception):
    """A file cannot be read as part of a report; the text names the file and the reason."""


@dataclass(frozen=True, slots=True)
class Shot:
    """One request as its client saw it.

    Attributes:
        sent: when it was sent; None if the load generator does not report it.
        ttft_ms: from sending to the first token.
        itl_ms: gaps between successive events with tokens.
        latency_ms: from sending to the last token.
        late_ms: how much later than planned it was sent, because the load generator was too slow.
        error: why it failed; None if it was answered.
    """

    sent: float | None = None
    ttft_ms: float | None = None
    itl_ms: tuple[float, ...] = ()
    latency_ms: float | None = None
    prompt_tokens: int = 0
    output_tokens: int = 0
    late_ms: float | None = None
    error: str | None = None

    @property
    def answered(self) -> bool:
        """Whether the response is complete."""
        return self.error is None and self.ttft_ms is not None and self.latency_ms is not None

    @property
    def tpot_ms(self) -> float:
        """Mean time per output token after the first; 0 for an answer of one token, as `vllm bench serve` has it."""
        if self.output_tokens < 2 or self.latency_ms is None or self.ttft_ms is None:
            return 0.0
        return (self.latency_ms - self.ttft_ms) / (self.output_tokens - 1)


@dataclass(frozen=True, slots=True)
class Power:
    """Power of the GPUs of one role during one rate.

    Attributes:
        watts: mean, summed over the GPUs.
        joules: summed over the GPUs, during ``seconds``.
        source: ``counter``, or ``integral`` where a GPU has no counter or it restarted.
        deviation: of the integral of power from the counter, 0.05 for 5 % too much; None where one does not exist.
    """

    gpus: tuple[str, ...]
    watts: float
    joules: float
    seconds: float
    source: str = "integral"
    deviation: float | None = None


@dataclass(frozen=True, slots=True)
class Measurement:
    """One request rate on one setup.

    Attributes:
        rate: requests per second, as planned.
        seconds: from the first request to the last response.
        shots: every planned request, answered or not.
        power: by role; empty if it was not measured.
        client_cpu: share of one core that the load generator used; None if unknown.
        placed: requests by the way that an elastic proxy placed them; empty where it is not one.
        interrupted: the user stopped it.
    """

    rate: float
    seconds: float
    shots: tuple[Shot, ...]
    power: dict[str, Power] = field(default_factory=dict)
    client_cpu: float | None = None
    interrupted: bool = False
    placed: dict[str, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Convert to what :meth:`from_json` reads."""
        return {"format": FORMAT, **asdict(self)}

    @classmethod
    def from_json(cls, value: dict[str, Any], where: str) -> Measurement:
        """Parse. Raises BadRecord; ``where`` names the file in its text."""
        try:
            if value["format"] != FORMAT:
                raise BadRecord(f"{where}: unknown format {value['format']}, expected {FORMAT}")
            return cls(
                rate=float(value["rate"]),
                seconds=float(value["seconds"]),
                shots=tuple(Shot(**{**one, "itl_ms": tuple(one["itl_ms"])}) for one in value["shots"]),
                power={
                    role: Power(
                        tuple(one["gpus"]),
                        one["watts"],
                        one["joules"],
                        one["seconds"],
                        one.get("source", "integral"),
                        one.get("deviation"),
                    )
                    for role, one in value["power"].items()
                },
                client_cpu=value["client_cpu"],
                interrupted=bool(value["interrupted"]),
                placed=dict(value.get("placed", {})),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise BadRecord(f"{where}: not a measurement of this report ({type(error).__name__}: {error})") from None
