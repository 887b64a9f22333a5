"""What will be sent and what will go wrong, and when: a pure function of the options and the seed.

Requests and troubles have dice of their own, so that other kinds of trouble leave the requests as they were.
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
    LEAVE: "every third client leaves: while it sends its body, during the prefill, or in mid-stream",
    "5xx": "an engine answers its next 1-8 requests 500, 502 or 503 without looking at them",
    "reset": "an engine reads its next 1-4 requests whole and resets their connections",
    "cut": "a decode resets its next 1-3 streams after some tokens",
    "refuse": "a prefill takes no new connection for a while",
    "refuse-decode": "a decode takes no new connection for a while",
    "slow": "an engine makes a short stop before every step",
    "freeze": "an engine's step hangs for 2-5 s, while /health and pings go on",
    "hang": "an engine's step hangs for good, while /health and pings go on; it is restarted when the proxy says so",
    "lose-kv": "a decode loses the KV of the next 1-3 prompts, and waits for it in its forward pass",
    "pings": "an engine's pings are lost for longer than the expiry",
    "kill-prefill": "kill -9 of a prefill between two KV transfers, which comes back on its ports",
    "kill-decode": "kill -9 of a decode, which comes back on its ports together with the prefills that had sent to it",
    "stop-prefill": "SIGTERM to a prefill, which comes back on its ports",
    "kill-sending": "kill -9 of a prefill in the middle of a KV transfer, which comes back on its ports",
}
"""Every kind of trouble, in words."""

ALL = tuple(KINDS)

_DECODE_ONLY = ("cut", "refuse-decode", "kill-decode", "lose-kv")
_PREFILL_ONLY = ("refuse", "kill-prefill", "kill-sending", "stop-prefill")
_LEAVING = 1 / 3

LeaveWhen = Literal["body", "time", "chunks"]


@dataclass(frozen=True)
class Leave:
    """When a client goes: ``amount`` seconds into its body ("body") or after its request ("time"), or after that
    many pieces of the stream ("chunks")."""

    when: LeaveWhen
    amount: float


@dataclass(frozen=True)
class PlannedRequest:
    """One request: ``at`` in seconds after the start, and whether and when its client leaves."""

    number: int
    at: float
    work: Work
    leave: Leave | None


@dataclass(frozen=True)
class Trouble:
    """One fault: on the ``target``-th engine of ``role``, from ``at`` on for ``seconds``.

    ``times`` and ``status`` are for the kinds that count requests, ``tokens`` is where streams are cut.
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
    """The whole run."""

    requests: tuple[PlannedRequest, ...]
    troubles: tuple[Trouble, ...]

    def to_json(self) -> str:
        """One text for one plan; equal plans have equal texts."""

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
    """The plan of one seed.

    Args:
        seconds: requests come for so long; troubles end by then too, but for restarts.
        rate: requests per second on average.
        kinds: names out of :data:`KINDS`.
        every: seconds between two troubles on average.

    Raises:
        ValueError: for a kind that does not exist.
    """
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown:
        raise ValueError(f"no such trouble: {', '.join(unknown)}; there are: {', '.join(KINDS)}")
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
        # Thrown in any case, so that the requests are the same with and without clients that leave.
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
    # From less than a loop's turn to a long prefill: every moment of both legs gets its share.
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
                seconds=round(min(_lasts(dice, kind), max(0.5, seconds - at)), 3),
                times=dice.randrange(1, {"5xx": 9, "reset": 5}.get(kind, 4)),
                status=dice.choice((500, 502, 503)),
                # Not before the first: decode's 200 comes before its engine has the request, and who is cut there
                # cannot know whether the KV was taken.
                tokens=dice.randrange(1, 30),
            )
        )
        at += dice.uniform(0.5, 1.5) * every
    return troubles


def _lasts(dice: random.Random, kind: str) -> float:
    if kind == "pings":
        return dice.uniform(3.0, 5.0)
    if kind == "freeze":
        return dice.uniform(2.0, 5.0)
    return dice.uniform(0.5, 2.5)
