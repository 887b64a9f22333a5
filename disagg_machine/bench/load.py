"""A small load for `bench --once` where there is no vLLM: a fixed number of requests at once, and what clients see.

With simulated engines the times are their settings plus the proxy; the client takes part of the same CPU.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from disagg_machine.service_client import Answer, Failed, Service

SHARES = (0.5, 0.9, 0.99)
"""Percentiles that are shown, as shares."""


@dataclass(frozen=True, slots=True)
class Load:
    """What was measured.

    Attributes:
        failures: why requests failed, in words.
        seconds: from the first request to the last answer.
    """

    answers: Sequence[Answer]
    failures: Sequence[str]
    seconds: float

    def lines(self) -> list[str]:
        """Rates, and times in milliseconds."""
        shown = {
            "requests answered": str(len(self.answers)),
            "requests failed": str(len(self.failures)),
            "duration": f"{self.seconds:.2f} s",
        }
        if self.answers:
            tokens = sum(answer.tokens for answer in self.answers)
            shown["requests per second"] = f"{len(self.answers) / self.seconds:.2f}"
            shown["output tokens per second"] = f"{tokens / self.seconds:.1f}"
            per_token = [answer.per_token for answer in self.answers]
            times = {
                "TTFT": [answer.first for answer in self.answers],
                "time per output token": [one for one in per_token if one is not None],
                "whole request": [answer.seconds for answer in self.answers],
            }
            shown |= {f"{name} (ms)": percentiles(values) for name, values in times.items() if values}
        return [f"{name:<24} {value}" for name, value in shown.items()]


def percentiles(values: Sequence[float]) -> str:
    """Those of :data:`SHARES`, in milliseconds."""
    ordered = sorted(values)
    return "  ".join(
        f"p{share * 100:g} {ordered[min(len(ordered) - 1, int(share * len(ordered)))] * 1e3:.1f}" for share in SHARES
    )


def send(send_one: Callable[[int], Answer], requests: int, concurrency: int) -> Load:
    """Send ``requests`` requests, ``concurrency`` at once. ``send_one`` gets the number of the request."""
    numbers = iter(range(requests))
    lock = threading.Lock()
    answers: list[Answer] = []
    failures: list[str] = []

    def work() -> None:
        while True:
            with lock:
                number = next(numbers, None)
            if number is None:
                return
            try:
                answers.append(send_one(number))
            except Failed as error:
                failures.append(str(error))

    # Daemons: Ctrl+C does not wait for answers that nobody needs any more.
    threads = [threading.Thread(target=work, daemon=True) for _ in range(min(concurrency, requests))]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return Load(answers, failures, time.perf_counter() - start)


def streams(service: Service, model: str, input_tokens: int, output_tokens: int) -> Callable[[int], Answer]:
    """Streamed completions of ``output_tokens`` tokens; each has a prompt of its own, the same in every run."""

    def one(number: int) -> Answer:
        words = random.Random(number)
        prompt = " ".join(str(words.randrange(10)) for _ in range(input_tokens))
        body = {"model": model, "prompt": prompt, "max_tokens": output_tokens, "ignore_eos": True}
        return service.stream("/v1/completions", body)

    return one
