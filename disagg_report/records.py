"""What is kept of a measurement, and its JSON.

Times are milliseconds where the name says so, else seconds; those of one measurement count from its first request.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

FORMAT = 1


class BadRecord(Exception):
    """A file is not one of this report's; the text names it and says what is wrong."""


@dataclass(frozen=True, slots=True)
class Shot:
    """One request as its client saw it.

    Attributes:
        sent: when it was sent; None where the load generator does not tell.
        ttft_ms: from sending it to its first token.
        itl_ms: times between its successive events with tokens.
        latency_ms: from sending it to its last token.
        late_ms: how much later than planned it was sent: what the load generator itself could not keep up with.
        error: why it failed; None: it was answered.
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
        """Whether the whole answer came."""
        return self.error is None and self.ttft_ms is not None and self.latency_ms is not None

    @property
    def tpot_ms(self) -> float:
        """Mean time per output token after the first; 0 for an answer of one token, as `vllm bench serve` has it."""
        if self.output_tokens < 2 or self.latency_ms is None or self.ttft_ms is None:
            return 0.0
        return (self.latency_ms - self.ttft_ms) / (self.output_tokens - 1)


@dataclass(frozen=True, slots=True)
class Power:
    """What the GPUs of one role drew while a rate was measured.

    Attributes:
        watts: mean of all of them together.
        joules: of all of them together, over ``seconds``.
    """

    gpus: tuple[str, ...]
    watts: float
    joules: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Measurement:
    """One request rate on one setup.

    Attributes:
        rate: requests per second, as planned.
        seconds: from the first request to the last answer.
        shots: every request that was planned, answered or not.
        power: by role; empty where nothing measures it.
        client_cpu: share of one core that the load generator used; None where it is not known.
        interrupted: the user ended it before its time.
    """

    rate: float
    seconds: float
    shots: tuple[Shot, ...]
    power: dict[str, Power] = field(default_factory=dict)
    client_cpu: float | None = None
    interrupted: bool = False

    def to_json(self) -> dict[str, Any]:
        """What :meth:`from_json` reads."""
        return {"format": FORMAT, **asdict(self)}

    @classmethod
    def from_json(cls, value: dict[str, Any], where: str) -> Measurement:
        """Raises BadRecord when it is none."""
        try:
            if value["format"] != FORMAT:
                raise BadRecord(f"{where}: format {value['format']} is not known, this is for format {FORMAT}")
            return cls(
                rate=float(value["rate"]),
                seconds=float(value["seconds"]),
                shots=tuple(Shot(**{**one, "itl_ms": tuple(one["itl_ms"])}) for one in value["shots"]),
                power={
                    role: Power(tuple(one["gpus"]), one["watts"], one["joules"], one["seconds"])
                    for role, one in value["power"].items()
                },
                client_cpu=value["client_cpu"],
                interrupted=bool(value["interrupted"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise BadRecord(f"{where}: not a measurement of this report ({type(error).__name__}: {error})") from None
