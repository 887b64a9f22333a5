"""Workloads of the benchmark, and how long each is measured."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Workload:
    """One kind of load.

    Attributes:
        unit: what CPU time is divided by: "request" or "token"; "stream" where memory is measured instead.
        tokens: of each answer.
        gap_us: between two tokens of a stream; 0 for as fast as they come.
        api: whose requests are sent; see load.c.
        ramp: s over which clients begin, so that they are not in step.
        slices: clean seconds that are measured.
    """

    name: str
    title: str
    unit: str
    clients: int
    tokens: int = 1
    stream: bool = True
    gap_us: int = 0
    lockstep: bool = False
    body: int = 100
    api: str = "completions"
    ramp: float = 0.0
    warmup: float = 1.0
    slices: int = 4

    @property
    def paced(self) -> bool:
        """Everybody gets the same load: only here can delays be compared."""
        return self.gap_us > 0

    @property
    def memory(self) -> bool:
        """Streams that are only held open."""
        return self.unit == "stream"

    @property
    def longest(self) -> float:
        """Seconds after which measuring ends, clean or not."""
        return 1.0 + 3.0 * self.slices

    def arguments(self) -> list[str]:
        """For the load generator."""
        return [
            *("--clients", str(self.clients), "--tokens", str(self.tokens), "--body", str(self.body)),
            *("--api", self.api, "--ramp", str(self.ramp), "--warmup", str(self.warmup)),
            *(["--stream"] if self.stream else []),
            *(["--hold"] if self.memory else []),
        ]


def _streams(name: str, title: str, clients: int, lockstep: bool = False) -> Workload:
    return Workload(
        name, title, "token", clients, tokens=128, gap_us=10_000, lockstep=lockstep, ramp=1.28, warmup=2.6, slices=5
    )


def _short_streams(name: str, title: str, api: str) -> Workload:
    return Workload(name, f"{title}: streams of 16 tokens as fast as they come, 64 clients", "request", 64, 16, api=api)


def _held(name: str, clients: int, ramp: float) -> Workload:
    title = f"{clients:,} open streams, a token a second each"
    return Workload(name, title, "stream", clients, tokens=120, gap_us=1_000_000, ramp=ramp, warmup=ramp + 3, slices=3)


WORKLOADS = {
    workload.name: workload
    for workload in (
        _held("M1000", 1000, 3.0),
        _held("M5000", 5000, 12.0),
        Workload("W1", "short prompt, one token, no stream, 64 clients", "request", 64, stream=False),
        _short_streams("CHAT", "/v1/chat/completions", "chat"),
        _short_streams("MESSAGES", "/v1/messages?beta=true", "messages"),
        _short_streams("TOOLS", "chat with three tools, one of which is called", "tools"),
        Workload("W2", "streams of 128 tokens as fast as they come, 64 clients", "token", 64, tokens=128),
        _streams("W3_128", "128 streams, a token each 10 ms", 128),
        _streams("W3_256", "256 streams, a token each 10 ms", 256),
        _streams("W3L_128", "128 streams in step, a token each 10 ms", 128, lockstep=True),
        _streams("W3L_256", "256 streams in step, a token each 10 ms", 256, lockstep=True),
        Workload("W4_64k", "prompt of 64 KiB, one token, 16 clients", "request", 16, stream=False, body=65536),
        Workload("W4_1m", "prompt of 1 MiB, one token, 8 clients", "request", 8, stream=False, body=1048576),
    )
}
"""By name, in the order in which they run: memory first, on processes that have served nothing yet."""
