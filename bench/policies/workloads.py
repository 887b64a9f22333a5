"""Who asks what when. A prompt is a row of named blocks: what two prompts share at their beginning has the same names.

chat      vLLM's benchmarks/multi_turn, its generate_multi_turn.json: 500 tokens in common, 1,000 (lognormal, at most
          5,000) per conversation, 12-18 messages, questions of 120-160 and answers of 80-120 tokens
shared    SGLang's bench_serving, generated-shared-prefix: 64 system prompts of 2,048 tokens, questions of 128, answers
          of 256; here the tenants are asked as by Zipf's law (s = 1). They fit into every prefill's cache
tenants   the same with 512 system prompts of 4,096 tokens and answers of 64: twice what all caches hold together
bursts    questions about long documents (as LMCache's long-document benchmark: a document, then questions about it), in
          bursts: gamma-distributed gaps with a coefficient of variation of 3 (vLLM's --burstiness 0.11)
random    vLLM's bench serve, dataset random: 1,024 tokens in, 128 out, nothing in common
mixed     all of them, with the same number of prompt tokens from each
trace     a Mooncake trace (USENIX FAST'25, github.com/kvcache-ai/Mooncake, FAST25-release/traces), 512 tokens a block,
          its gaps shortened or stretched
"""

from __future__ import annotations

import heapq
import itertools
import json
import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path

from bench.virtual.requests import BLOCK, Ask, Names, Session


def lognormal(rng: random.Random, mean: float, most: float, sigma: float = 1.0) -> float:
    return min(most, rng.lognormvariate(math.log(mean) - sigma**2 / 2, sigma))


def chat(rng: random.Random, names: Names, session: Iterator[int]) -> Callable[[float], Session]:
    """Conversations; each call of the result makes one that begins then."""
    common = names.new(500)

    def make(at: float) -> Session:
        who = next(session)
        history = common + names.new(lognormal(rng, 1000, 5000))
        turns: Session = []
        for turn in range(rng.randint(6, 9)):
            history += names.new(rng.randint(120, 160))
            home = len(history) if turn == 0 else turns[0].home
            output = rng.randint(80, 120)
            wait = at if turn == 0 else rng.expovariate(1 / 10)
            turns.append(Ask(wait, history, len(history) * BLOCK, output, home, who, turn))
            history += names.new(output)
        return turns

    return make


def _shared(rng: random.Random, names: Names, session: Iterator[int]) -> Callable[[float], Session]:
    return _prompts(rng, names, session, tenants=64, system=2048, output=256)


def _tenants(rng: random.Random, names: Names, session: Iterator[int]) -> Callable[[float], Session]:
    return _prompts(rng, names, session, tenants=512, system=4096, output=64)


def _prompts(
    rng: random.Random, names: Names, session: Iterator[int], tenants: int, system: int, output: int
) -> Callable[[float], Session]:
    systems = [names.new(system) for _ in range(tenants)]
    weights = list(itertools.accumulate(1 / rank for rank in range(1, tenants + 1)))

    def make(at: float) -> Session:
        who = rng.choices(range(tenants), cum_weights=weights)[0]
        blocks = systems[who] + names.new(128)
        next(session)
        return [Ask(at, blocks, len(blocks) * BLOCK, output, len(blocks), who)]

    return make


def _bursts(rng: random.Random, names: Names, session: Iterator[int]) -> Callable[[float], Session]:
    documents: list[tuple[tuple[int, ...], int]] = []

    def make(at: float) -> Session:
        if not documents or rng.random() < 0.25:
            documents.append((names.new(lognormal(rng, 16_000, 60_000, 0.7)), next(session)))
            del documents[:-12]
        document, who = rng.choice(documents)
        blocks = document + names.new(100)
        return [Ask(at, blocks, len(blocks) * BLOCK, 100, len(document), who)]

    return make


def _random(rng: random.Random, names: Names, session: Iterator[int]) -> Callable[[float], Session]:
    def make(at: float) -> Session:
        blocks = names.new(1024)
        return [Ask(at, blocks, len(blocks) * BLOCK, 128, len(blocks), next(session))]

    return make


_KINDS = {"chat": chat, "shared": _shared, "tenants": _tenants, "bursts": _bursts, "random": _random}
_TOKENS = {"chat": 18_500.0, "shared": 2176.0, "tenants": 4224.0, "bursts": 15_000.0, "random": 1024.0}
"""Prompt tokens of one arrival (a whole conversation in chat), about."""

NAMES = (*_KINDS, "mixed")


def arrivals(name: str, seed: int, seconds: float, tokens_per_second: float) -> list[Session]:
    """Sessions of one workload, in the order of their first requests.

    Args:
        tokens_per_second: prompt tokens that are asked for in all.
    """
    rng = random.Random(f"{name} {seed}")
    parts = [name] if name != "mixed" else list(_KINDS)
    block_names, sessions = Names(), itertools.count()
    rows = []
    for part in parts:
        make = _KINDS[part](rng, block_names, sessions)
        gap = _TOKENS[part] * len(parts) / tokens_per_second
        shape = 1 / 9 if part == "bursts" else 1.0
        row, at = [], 0.0
        while (at := at + rng.gammavariate(shape, gap / shape)) < seconds:
            row.append(make(at))
        rows.append(row)
    return list(heapq.merge(*rows, key=lambda s: s[0].at))


def trace(path: Path, seconds: float, tokens_per_second: float) -> list[Session]:
    """The beginning of a trace, at another speed."""
    rows = []
    asked, limit = 0, seconds * tokens_per_second
    for line in path.read_text().splitlines():
        rows.append(json.loads(line))
        asked += rows[-1]["input_length"]
        if asked >= limit:
            break
    # Timestamps have a grain of seconds: those of one instant are spread over it.
    rng = random.Random(0)
    grain = 3000
    times = sorted(row["timestamp"] + rng.uniform(0, grain) for row in rows)
    scale = (asked / tokens_per_second) / times[-1]
    return [
        [Ask(at * scale, tuple(row["hash_ids"]), row["input_length"], max(1, row["output_length"]),
             min(2, len(row["hash_ids"])), number, 0, 512)]
        for number, (at, row) in enumerate(zip(times, rows, strict=True))
    ]  # fmt: skip
