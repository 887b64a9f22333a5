"""Which engines of both roles prefill and which decode: the decision, pure, on figures and a clock that it is given.

Engines that exchange KV and share a model form a group, and each group is decided on its own:

- An instance without an assignment gets the role of which the group has fewer instances.
- A role that no usable instance of the group has left gets one back after :attr:`RoleLimits.missing`.
- Otherwise at most one instance is moved in :attr:`RoleLimits.settle`: from decode to prefill when prompts wait longer
  than the limit and decode would keep :attr:`RoleLimits.reserve` without it; from prefill to decode when decode is over
  a limit and prefill would keep that reserve. Both are judged by a window that begins after the last move. The distance
  between the two conditions is the hysteresis. A window with a figure that is missing or stale begins again.

Instances with one role, and those that an operator has assigned, count and are never moved.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from statistics import fmean, median

from disagg_proxy.cluster.assignment import Assignment, Cause
from disagg_proxy.cluster.instance import Role


@dataclass(frozen=True, slots=True)
class RoleLimits:
    """When the boundary between prefill and decode moves. Times are seconds.

    Attributes:
        prefill_wait: time that prompts may wait for prefill.
        token_gap: time between two tokens of a stream; None: not limited.
        fill: share of decode's KV cache, or of the requests that it may have, from which on it is full.
        in_flight: requests that one decode may have at once; 0: any number.
        reserve: share of a limit that the role which gives an instance away keeps free.
        window: time over which figures are averaged.
        settle: time after a move without another one in the same group.
        missing: time for which a role has no usable instance before another one gets it.
        stale: age from which figures of an engine are not used.
    """

    prefill_wait: float = 0.25
    token_gap: float | None = None
    fill: float = 0.9
    in_flight: int = 0
    reserve: float = 0.2
    window: float = 10.0
    settle: float = 30.0
    missing: float = 3.0
    stale: float = 5.0


@dataclass(frozen=True, slots=True)
class InstanceFigures:
    """One instance at the time of a decision.

    Attributes:
        key: of the instance.
        group: the instances that it can exchange KV with; a name that stays the same while their set does.
        roles: the roles that it can serve.
        assignment: its present one.
        usable: whether it may get requests.
        read_at: when the engine showed the figures below; None: never.
        prefill_wait: seconds that a prompt waits for its prefill there, as predicted or as seen at present.
        prefill_tokens: prompt tokens that it has to compute.
        running: requests in the engine's batch.
        kv_usage, kv_promised: share of its KV cache in use, and promised to requests until their ends, 0 to 1.
        in_flight: requests on it.
        token_gap: seconds between two tokens of its streams; None while it has none.
    """

    key: str
    group: str
    roles: frozenset[Role]
    assignment: Assignment | None = None
    usable: bool = True
    read_at: float | None = None
    prefill_wait: float | None = None
    prefill_tokens: int = 0
    running: int | None = None
    kv_usage: float | None = None
    kv_promised: float = 0.0
    in_flight: int = 0
    token_gap: float | None = None

    @property
    def role(self) -> Role | None:
        """The role that it has: the only one, or the assigned one; None for both."""
        if len(self.roles) == 1:
            return next(iter(self.roles))
        return self.assignment.role if self.assignment is not None else None

    @property
    def movable(self) -> bool:
        """Whether the controller may change its role."""
        return self.usable and len(self.roles) > 1 and not (self.assignment is not None and self.assignment.by_hand)


@dataclass(frozen=True, slots=True)
class _Sample:
    """One group at one time.

    Attributes:
        wait, busy: mean over the prefills: seconds that prompts wait, and the share that computes.
        fill, token_gap: mean over the decodes.
    """

    at: float
    wait: float
    busy: float
    fill: float
    token_gap: float


@dataclass(slots=True)
class _Group:
    """What is remembered of a group between decisions.

    Attributes:
        moved_at: time of the last move.
        since: time from which on all figures are known.
        missing: for each role without a usable instance the time from which on.
    """

    moved_at: float
    since: float | None = None
    samples: deque[_Sample] = field(default_factory=deque)
    missing: dict[Role, float] = field(default_factory=dict)

    def forget(self) -> None:
        self.since = None
        self.samples.clear()


class RoleController:
    """Decides the roles of all groups; to be called about once a second."""

    def __init__(self, limits: RoleLimits) -> None:
        self.limits = limits
        self._groups: dict[str, _Group] = {}

    def decide(self, now: float, figures: Iterable[InstanceFigures]) -> list[tuple[str, Assignment]]:
        """The assignments to be made now, by instance: first ones, and at most one move for each group."""
        by_group: dict[str, list[InstanceFigures]] = {}
        for one in figures:
            by_group.setdefault(one.group, []).append(one)
        self._groups = {name: self._groups.get(name) or _Group(now - self.limits.settle) for name in by_group}
        decided: list[tuple[str, Assignment]] = []
        for name, members in by_group.items():
            decided += self._decide(now, self._groups[name], sorted(members, key=lambda i: i.key))
        return decided

    def _decide(self, now: float, group: _Group, members: list[InstanceFigures]) -> list[tuple[str, Assignment]]:
        usable = [i for i in members if i.usable]
        if len(usable) < 2:
            group.forget()
            group.missing.clear()
            return []
        new = [i for i in usable if i.role is None and i.movable]
        if new:
            group.forget()
            return _first(now, new, usable)
        having = {role: [i for i in usable if i.role in (None, role)] for role in Role}
        move = self._missing(now, group, having) or self._by_load(now, group, having)
        if move is None:
            return []
        group.moved_at = now
        group.forget()
        return [move]

    def _missing(
        self, now: float, group: _Group, having: dict[Role, list[InstanceFigures]]
    ) -> tuple[str, Assignment] | None:
        for role in Role:
            if having[role]:
                group.missing.pop(role, None)
            elif now - group.missing.setdefault(role, now) >= self.limits.missing:
                chosen = _least(having[Role.DECODE if role is Role.PREFILL else Role.PREFILL])
                if chosen is not None:
                    del group.missing[role]
                    return chosen.key, Assignment(role, Cause.MISSING, now)
        return None

    def _by_load(
        self, now: float, group: _Group, having: dict[Role, list[InstanceFigures]]
    ) -> tuple[str, Assignment] | None:
        limits, prefills, decodes = self.limits, having[Role.PREFILL], having[Role.DECODE]
        sample = self._sample(now, prefills, decodes)
        if sample is None:
            group.forget()
            return None
        samples = group.samples
        samples.append(sample)
        group.since = now if group.since is None else group.since
        while samples[0].at < now - limits.window:
            samples.popleft()
        if now - max(group.since, group.moved_at + limits.settle - limits.window) < limits.window:
            return None
        wait = median(s.wait for s in samples)
        fill = median(s.fill for s in samples)
        gap = median(s.token_gap for s in samples)
        busy = fmean(s.busy for s in samples)
        slow = limits.token_gap is not None and gap > limits.token_gap
        role, cause, chosen = Role.PREFILL, Cause.PREFILL_WAITS, None
        if wait > limits.prefill_wait:
            if self._decode_has_reserve(len(decodes), fill, gap):
                chosen = _least(decodes)
        elif (fill > limits.fill or slow) and self._prefill_has_reserve(len(prefills), wait, busy):
            role, cause = Role.DECODE, Cause.DECODE_FULL if fill > limits.fill else Cause.DECODE_SLOW
            chosen = _least(prefills)
        return (chosen.key, Assignment(role, cause, now, wait, fill)) if chosen is not None else None

    def _sample(
        self, now: float, prefills: Sequence[InstanceFigures], decodes: Sequence[InstanceFigures]
    ) -> _Sample | None:
        """The means; None where a role has no instance, or a figure is missing or stale."""
        if not prefills or not decodes:
            return None
        if any(i.read_at is None or now - i.read_at > self.limits.stale for i in (*prefills, *decodes)):
            return None
        waits = [i.prefill_wait for i in prefills if i.prefill_wait is not None]
        running = [i.running for i in prefills if i.running is not None]
        fill = [self._fill(i, i.kv_usage) for i in decodes if i.kv_usage is not None]
        if len(waits) < len(prefills) or len(running) < len(prefills) or len(fill) < len(decodes):
            return None
        gaps = [i.token_gap for i in decodes if i.token_gap is not None]
        return _Sample(now, fmean(waits), fmean(r > 0 for r in running), fmean(fill), fmean(gaps) if gaps else 0.0)

    def _fill(self, decode: InstanceFigures, kv_usage: float) -> float:
        most = self.limits.in_flight
        return max(kv_usage, decode.kv_promised, decode.in_flight / most if most else 0.0)

    def _decode_has_reserve(self, decodes: int, fill: float, gap: float) -> bool:
        """Whether one decode less would stay within the limits, if the rest shares its load evenly."""
        if decodes < 2:
            return False
        limits, share = self.limits, decodes / (decodes - 1)
        free = 1 - limits.reserve
        return fill * share <= limits.fill * free and (
            limits.token_gap is None or gap * share <= limits.token_gap * free
        )

    def _prefill_has_reserve(self, prefills: int, wait: float, busy: float) -> bool:
        """The same for one prefill less. How long prompts wait grows out of proportion, so its time counts too."""
        if prefills < 2:
            return False
        share, free = prefills / (prefills - 1), 1 - self.limits.reserve
        return busy * share <= free and wait * share <= self.limits.prefill_wait * free


def _first(
    now: float, new: Sequence[InstanceFigures], usable: Sequence[InstanceFigures]
) -> list[tuple[str, Assignment]]:
    """Roles for instances that have none: the one with fewer instances, decode where there are as many."""
    counts = {role: sum(i.role is role for i in usable) for role in Role}
    decided = []
    for one in new:
        role = Role.PREFILL if counts[Role.PREFILL] < counts[Role.DECODE] else Role.DECODE
        counts[role] += 1
        decided.append((one.key, Assignment(role, Cause.FIRST, now)))
    return decided


def _least(having: Sequence[InstanceFigures]) -> InstanceFigures | None:
    """Of those that can be moved the one with the least work, the first by key of equal ones."""
    return min((i for i in having if i.movable), key=lambda i: (i.running or 0, i.prefill_tokens), default=None)
