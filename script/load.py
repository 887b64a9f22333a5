"""`bench` without vllm: URL MODEL REQUESTS CONCURRENCY INPUT_TOKENS OUTPUT_TOKENS.

Streams completions from a fixed number of threads and prints what a client sees. With simulated engines the times
are their knobs plus the proxy; the client itself takes part of the same CPU. Exit code 1 when a request failed.
"""

from __future__ import annotations

import random
import sys
import time
from concurrent.futures import ThreadPoolExecutor

from service_client import Answer, Failed, Service


def percentile(values: list[float], share: float) -> float:
    """The value below which ``share`` of the sorted values lie."""
    return values[min(len(values) - 1, int(share * len(values)))]


def report(answers: list[Answer], failures: list[str], wall: float) -> None:
    """Rates, and times in milliseconds."""
    print(f"requests answered        {len(answers)}")
    print(f"requests failed          {len(failures)}")
    print(f"duration                 {wall:.2f} s")
    if not answers:
        return
    tokens = sum(answer.tokens for answer in answers)
    print(f"requests per second      {len(answers) / wall:.2f}")
    print(f"output tokens per second {tokens / wall:.1f}")
    gaps = [(a.seconds - a.first) / (a.tokens - 1) for a in answers if a.tokens > 1]
    for name, values in (
        ("TTFT", sorted(a.first for a in answers)),
        ("time per output token", sorted(gaps)),
        ("whole request", sorted(a.seconds for a in answers)),
    ):
        if values:
            shown = "  ".join(
                f"p{share:.0%}".rstrip("%") + f" {percentile(values, share) * 1e3:.1f}" for share in (0.5, 0.9, 0.99)
            )
            print(f"{name + ' (ms)':<24} {shown}")


def main() -> int:
    url, wanted, numbers = sys.argv[1], sys.argv[2], [int(word) for word in sys.argv[3:7]]
    requests, concurrency, input_tokens, output_tokens = numbers
    service = Service(url)
    try:
        model = service.model(wanted)
    except Failed as error:
        print(error, file=sys.stderr)
        return 1
    failures: list[str] = []

    def one(number: int) -> Answer | None:
        words = random.Random(number)
        prompt = " ".join(str(words.randrange(10)) for _ in range(input_tokens))
        body = {"model": model, "prompt": prompt, "max_tokens": output_tokens, "ignore_eos": True}
        try:
            return service.stream("/v1/completions", body)
        except Failed as error:
            failures.append(str(error))
            return None

    start = time.perf_counter()
    with ThreadPoolExecutor(concurrency) as pool:
        answers = [answer for answer in pool.map(one, range(requests)) if answer]
    report(answers, failures, time.perf_counter() - start)
    for failure in failures[:3]:
        print(failure, file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
