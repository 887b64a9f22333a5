"""The plan of a run: requests and faults with their times, a pure function of the options and the seed.

Requests and faults have separate random generators, so that other faults do not change the requests.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from disagg_sim.chaos.work import Work, make_work

LEAVE = "leave"
KINDS: dict[str, str] = {
    LEAVE: "every third client disconnects: while it sends its body, during the prefill, or mid-stream",
    "5xx": "an engine answers its next 1-8 requests with 500, 502 or 503 without processing them",
    "reset": "an engine reads its next 1-4 requests completely and resets their connections",
    "cut": "a decode resets its next 1-3 streams after some tokens",
    "refuse": "a prefill refuses new connections for a while",
    "refuse-decode": "a decode refuses new connections for a while",
    "slow": "an engine pauses before every step",
    "freeze": "an engine's step hangs for 2-5 s, while /health and pings go on",
    "hang": "an engine's step hangs until the proxy reports the engine and it is restarted; /health and pings go on",
    "lose-kv": "a decode loses the KV of the next 1-3 prompts, and waits for it in its forward pass",
    "pings": "an engine's pings are lost for longer than the expiry",
    "kill-prefill": "kill -9 of a prefill between two KV transfers, and restart on its ports",
    "kill-decode": "kill -9 of a decode, and restart on its ports together with the prefills that have sent to it",
    "stop-prefill": "SIGTERM to a prefill, and restart on its ports",
    "kill-sending": "kill -9 of a prefill during a KV transfer, and restart on its ports",
}
"""Kinds of faults and their descriptions."""

ALL = tuple(KINDS)

_DECODE_ONLY = ("cut", "refuse-decode", "kill-decode", "lose-kv")
_PREFILL_ONLY = ("refuse", "kill-prefill", "kill-sending", "stop-prefill")
_LEAVING = 1 / 3

LeaveWhen = Literal["body", "time", "chunks"]


@dataclass(frozen=True)
class Leave:
    """When a client disconnects: after ``amount`` seconds while it sends its body ("body"), or after its request
    ("time"), or after ``amount`` events of the stream ("chunks")."""

    when: LeaveWhen
    amount: float


@dataclass(frozen=True)
class PlannedRequest:
    """One request, ``at`` seconds after the start. ``leave``: when its client disconnects, or None."""

    number: int
    at: float
    work: Work
    leave: Leave | None


@dataclass(frozen=True)
class Trouble:
    """One fault on the ``target``-th engine of ``role``, from ``at`` on for ``seconds``.

    ``times`` and ``status`` apply to kinds that count requests; ``tokens``: after how many tokens streams are cut.
    """

    at: float
    kind: str
    role: Literal["prefill", "decode"]
    target: int
    seconds: float
    times: int
    status: int
    tokens: int

    def __str__(self) -> str:
        return f"{self.at:.1f} s {self.kind} {self.role} {self.target}"


@dataclass(frozen=True)
class Plan:
    """All requests and faults of a run."""

    requests: tuple[PlannedRequest, ...]
    troubles: tuple[Trouble, ...]

    def to_json(self) -> str:
        """JSON text; equal plans have equal texts."""

        def plain(value: Any) -> Any:
            return value.__dict__

        return json.dumps({"requests": self.requests, "troubles": self.troubles}, default=plain, sort_keys=True)


def make_plan(
    seed: int,
    *,
    seconds: float,
    rate: float,
    kinds: Sequence[str],
    prefills: int,
    decodes: int,
    every: float = 3.0,
) -> Plan:
    """Make the plan of one seed.

    Args:
        seconds: duration of the load; faults end by then too, except for restarts.
        rate: requests per second on average.
        kinds: names out of :data:`KINDS`.
        every: mean seconds between two faults.

    Raises:
        ValueError: unknown kind.
    """
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown:
        raise ValueError(f"unknown kind of trouble: {', '.join(unknown)}; known: {', '.join(KINDS)}")
    requests = _requests(random.Random(f"{seed} requests"), seconds, rate, LEAVE in kinds)
    others = [kind for kind in KINDS if kind in kinds and kind != LEAVE]
    troubles = _troubles(random.Random(f"{seed} troubles"), seconds, others, prefills, decodes, every)
    return Plan(tuple(requests), tuple(troubles))


def _requests(dice: random.Random, seconds: float, rate: float, leaving: bool) -> list[PlannedRequest]:
    planned: list[PlannedRequest] = []
    at = dice.expovariate(rate)
    while at < seconds:
        number = len(planned)
        work = make_work(dice, number)
        # Drawn in any case, so that the requests are the same with and without clients that disconnect.
        goes, leave = dice.random() < _LEAVING, _leave(dice, work)
        planned.append(PlannedRequest(number, at, work, leave if leaving and goes else None))
        at += dice.expovariate(rate)
    return planned


def _leave(dice: random.Random, work: Work) -> Leave:
    pick = dice.random()
    if pick < 0.1:
        return Leave("body", round(dice.uniform(0.0, 0.2), 4))
    if work.stream and pick < 0.5:
        return Leave("chunks", dice.randrange(1, 40))
    # From less than an event loop iteration to a long prefill, so that every phase of both legs is covered.
    return Leave("time", round(10 ** dice.uniform(-3.5, 0.0), 5))


def _troubles(
    dice: random.Random, seconds: float, kinds: list[str], prefills: int, decodes: int, every: float
) -> list[Trouble]:
    troubles: list[Trouble] = []
    deck: list[str] = []
    at = dice.uniform(0.3, 0.7) * every
    while kinds and at < seconds - 0.5:
        if not deck:
            deck = dice.sample(kinds, len(kinds))
        kind = deck.pop()
        role: Literal["prefill", "decode"] = "prefill" if dice.random() < 0.5 else "decode"
        if kind in _DECODE_ONLY:
            role = "decode"
        elif kind in _PREFILL_ONLY:
            role = "prefill"
        troubles.append(
            Trouble(
                at=round(at, 3),
                kind=kind,
                role=role,
                target=dice.randrange(prefills if role == "prefill" else decodes),
                seconds=round(min(_duration(dice, kind), max(0.5, seconds - at)), 3),
                times=dice.randrange(1, {"5xx": 9, "reset": 5}.get(kind, 4)),
                status=dice.choice((500, 502, 503)),
                # At least 1: decode sends its 200 before its engine has the request, so a cut before the first token
                # leaves open whether the KV was used.
                tokens=dice.randrange(1, 30),
            )
        )
        at += dice.uniform(0.5, 1.5) * every
    return troubles


def _duration(dice: random.Random, kind: str) -> float:
    if kind == "pings":
        return dice.uniform(3.0, 5.0)
    if kind == "freeze":
        return dice.uniform(2.0, 5.0)
    return dice.uniform(0.5, 2.5)
