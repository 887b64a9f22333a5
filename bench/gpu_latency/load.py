"""The two kinds of load. Which arm asks when is decided beforehand and balanced, so that drift hits both alike.

Nothing that was sent is cancelled: when a phase's time is over it waits for the answers, and when they do not come
(``StandsStill``) the run is over, since an engine has stopped.
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
"""Seconds that a phase waits for its last answers."""

_TOO_MANY_FAIL = 5

_LEAST_COUNTED = 0.5
"""Seconds of a block, even where the answers of the blocks before took up all the time."""


class StandsStill(Exception):
    """Requests that were sent are not answered."""


class Failing(Exception):
    """Several requests in a row failed."""


@dataclass(frozen=True)
class Block:
    """One stretch of closed-loop load by one arm; ``begin`` to ``end`` counts (``perf_counter``)."""

    arm: str
    begin: float
    end: float


def in_turn(count: int, seed: int) -> list[tuple[str, str]]:
    """For ``count`` pairs who comes first: each arm in one half of them, in random order."""
    orders = [ARMS if i % 2 else (ARMS[1], ARMS[0]) for i in range(count)]
    random.Random(seed).shuffle(orders)
    return orders


async def low(
    arms: Mapping[str, Arm], phase: Phase, seconds: float, prompts: Prompts, answer: int, shots: list[Shot]
) -> None:
    """Requests at fixed distances, both arms in turn; the two of a pair are neighbours. They are added to ``shots``.

    Raises:
        StandsStill: at the end.
        Failing: soon.
    """
    turns = [
        (place, name) for place, order in enumerate(in_turn(phase.pairs(seconds), seed=phase.tokens)) for name in order
    ]
    bodies = [prompts.body(phase.tokens, answer) for _ in turns]
    tasks: list[asyncio.Task[Shot]] = []
    with _no_collector():
        begin = perf_counter()
        for number, ((place, name), body) in enumerate(zip(turns, bodies, strict=True)):
            await asyncio.sleep(max(0.0, begin + number / phase.rate - perf_counter()))
            shot = Shot(name, phase.tokens, place)
            shots.append(shot)
            tasks.append(asyncio.create_task(fire(arms[name], body, shot)))
            _look([task.result() for task in tasks if task.done()])
        await _all_of(tasks)


async def saturating(
    arms: Mapping[str, Arm],
    phase: Phase,
    seconds: float,
    prompts: Prompts,
    answer: int,
    shots: list[Shot],
    blocks: list[Block],
) -> None:
    """Blocks of direct, proxy, proxy, direct; in each ``phase.clients`` ask again as soon as they are answered.

    What happened is added to ``shots`` and ``blocks``.

    Raises:
        StandsStill: after a block.
        Failing: soon.
    """
    count = phase.blocks(seconds)
    until, drain = perf_counter() + seconds, plan.DRAIN
    for place in range(count):
        name = ARMS[place % 4 in (1, 2)]
        begin = perf_counter() + RAMP
        counted = max(_LEAST_COUNTED, (until - begin + RAMP) / (count - place) - RAMP - drain)
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
                _look(mine[-_TOO_MANY_FAIL:])

        with _no_collector():
            await _all_of(
                [asyncio.create_task(client(RAMP * i / phase.clients)) for i in range(phase.clients)], counted + RAMP
            )
        # Slow answers make the blocks that follow shorter, not the phase longer.
        drain = max(drain, perf_counter() - block.end)


async def _all_of(tasks: Sequence[asyncio.Task[Shot]] | Sequence[asyncio.Task[None]], beside: float = 0.0) -> None:
    done, pending = await asyncio.wait(tasks, timeout=PATIENCE + beside)
    if pending:
        raise StandsStill(f"{len(pending)} of {len(tasks)} requests or clients are without an answer")
    for task in done:
        task.result()


def _look(shots: Sequence[Shot]) -> None:
    """Stop a phase that only produces errors."""
    last = shots[-_TOO_MANY_FAIL:]
    if len(last) == _TOO_MANY_FAIL and all(shot.error for shot in last):
        raise Failing(last[-1].error)


@contextmanager
def _no_collector() -> Iterator[None]:
    """Without Python's cyclic garbage collector, whose pauses would be taken for the proxy's or the engines'."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
