"""The two kinds of load. The order of the arms is planned and balanced, so that drift affects both equally.

No request is cancelled: at the end of its time a phase waits for the responses. If they do not arrive (``Stalled``),
the run ends, because an engine has stopped.
"""

from __future__ import annotations

import asyncio
import gc
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter

from bench.gpu_latency import plan
from bench.gpu_latency.arms import Arm, Shot, fire
from bench.gpu_latency.plan import RAMP, Phase
from bench.gpu_latency.prompts import Prompts

ARMS = ("direct", "proxy")
PATIENCE = 40.0
"""Seconds that a phase waits for its last responses."""

_MAX_FAILURES = 5

_MIN_COUNTED = 0.5
"""Minimum seconds of a block, even if waiting for earlier blocks has used up the time."""


class Stalled(Exception):
    """Requests that were sent are not answered."""


class Failing(Exception):
    """Several requests in a row failed."""


@dataclass(frozen=True)
class Block:
    """One stretch of closed-loop load by one arm; ``begin`` to ``end`` counts (``perf_counter``)."""

    arm: str
    begin: float
    end: float


def balanced_order(count: int, seed: int) -> list[tuple[str, str]]:
    """Order of the arms in ``count`` pairs: each arm is first in half of them, shuffled."""
    orders = [ARMS if i % 2 else (ARMS[1], ARMS[0]) for i in range(count)]
    random.Random(seed).shuffle(orders)
    return orders


async def low(
    arms: Mapping[str, Arm], phase: Phase, seconds: float, prompts: Prompts, answer: int, shots: list[Shot]
) -> None:
    """Send requests at fixed intervals, both arms alternately; the two of a pair are adjacent. Appends to ``shots``.

    Raises:
        Stalled: responses are missing at the end.
        Failing: several requests in a row failed.
    """
    turns = [
        (place, name)
        for place, order in enumerate(balanced_order(phase.pairs(seconds), seed=phase.tokens))
        for name in order
    ]
    bodies = [prompts.body(phase.tokens, answer) for _ in turns]
    tasks: list[asyncio.Task[Shot]] = []
    with _without_gc():
        begin = perf_counter()
        for number, ((place, name), body) in enumerate(zip(turns, bodies, strict=True)):
            await asyncio.sleep(max(0.0, begin + number / phase.rate - perf_counter()))
            shot = Shot(name, phase.tokens, place)
            shots.append(shot)
            tasks.append(asyncio.create_task(fire(arms[name], body, shot)))
            _check_failures([task.result() for task in tasks if task.done()])
        await _wait_for_all(tasks)


async def saturating(
    arms: Mapping[str, Arm],
    phase: Phase,
    seconds: float,
    prompts: Prompts,
    answer: int,
    shots: list[Shot],
    blocks: list[Block],
) -> None:
    """Run blocks of direct, proxy, proxy, direct; ``phase.clients`` closed-loop clients in each.

    Appends to ``shots`` and ``blocks``.

    Raises:
        Stalled: responses are missing after a block.
        Failing: several requests in a row failed.
    """
    count = phase.blocks(seconds)
    until, drain = perf_counter() + seconds, plan.DRAIN
    for place in range(count):
        # A collection takes longer than a short block where the process is large, so it comes before its times.
        with _without_gc():
            name = ARMS[place % 4 in (1, 2)]
            begin = perf_counter() + RAMP
            counted = max(_MIN_COUNTED, (until - begin + RAMP) / (count - place) - RAMP - drain)
            block = Block(name, begin, begin + counted)
            blocks.append(block)

            async def client(wait: float, block: Block = block, place: int = place) -> None:
                mine: list[Shot] = []
                await asyncio.sleep(wait)
                while perf_counter() < block.end:
                    shot = Shot(block.arm, phase.tokens, place)
                    mine.append(shot)
                    shots.append(shot)
                    await fire(arms[block.arm], prompts.body(phase.tokens, answer), shot)
                    _check_failures(mine[-_MAX_FAILURES:])

            await _wait_for_all(
                [asyncio.create_task(client(RAMP * i / phase.clients)) for i in range(phase.clients)], counted + RAMP
            )
        # Slow responses shorten the following blocks instead of extending the phase.
        drain = max(drain, perf_counter() - block.end)


async def _wait_for_all(
    tasks: Sequence[asyncio.Task[Shot]] | Sequence[asyncio.Task[None]], beside: float = 0.0
) -> None:
    done, pending = await asyncio.wait(tasks, timeout=PATIENCE + beside)
    if pending:
        raise Stalled(f"{len(pending)} of {len(tasks)} requests or clients have no response")
    for task in done:
        task.result()


def _check_failures(shots: Sequence[Shot]) -> None:
    """Stop a phase that only produces errors."""
    last = shots[-_MAX_FAILURES:]
    if len(last) == _MAX_FAILURES and all(shot.error for shot in last):
        raise Failing(last[-1].error)


@contextmanager
def _without_gc() -> Iterator[None]:
    """Disable the cyclic garbage collector, whose pauses would be attributed to the proxy or the engines."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
