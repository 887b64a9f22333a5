"""Affinity policies: to the instance that served the same prefix or session before, unless it is too busy.

Bounded load: affinity does not apply to an instance whose load is above ``bound`` times the mean load of the
candidates plus the request's own tokens. The least loaded candidate is always below.
"""

from __future__ import annotations

from disagg_proxy.cluster.policies.load import least_loaded
from disagg_proxy.cluster.policies.rendezvous import preferred, weight
from disagg_proxy.cluster.policies.view import Policy, View

UNCACHED_WEIGHT = 2.0
"""Cost of a token that must be computed, relative to one queued on the instance. More than 1, since computing what
another instance has cached also delays later requests; docs/policies.md has the measurements."""

HOME_CREDIT = 0.5
"""Share of that cost that is waived for the conversation's home instance: another worker or proxy may have sent the
conversation there before."""


def load_limit(view: View) -> float:
    """The load in tokens above which affinity does not apply to an instance."""
    candidates = view.candidates
    return view.bound * sum([i.tokens_in_flight for i in candidates]) / len(candidates) + view.traits.tokens


def _prefix_aware(view: View) -> int:
    candidates, uncached, home = view.candidates, view.uncached, view.traits.home
    if not uncached:
        return least_loaded(view)
    loads = [one.tokens_in_flight for one in candidates]
    limit = load_limit(view)
    home_index = -1 if home is None else preferred(home, candidates)
    best, least = -1, 0.0
    for index, load in enumerate(loads):
        if load > limit:
            continue
        cost = load + UNCACHED_WEIGHT * uncached[index]
        if index == home_index:
            cost -= HOME_CREDIT * uncached[index]
        if best < 0 or cost < least:
            best, least = index, cost
        elif cost == least and _before(view, index, best):
            best = index
    return best


def _before(view: View, one: int, other: int) -> bool:
    """Tie-break: whether candidate ``one`` is preferred: fewer requests, then round robin."""
    candidates, turn, count = view.candidates, view.turn, len(view.candidates)
    first, second = candidates[one].in_flight, candidates[other].in_flight
    return first < second or (first == second and (one - turn) % count < (other - turn) % count)


def _session(view: View) -> int:
    name = view.traits.session
    if name is None:
        return least_loaded(view)
    limit = load_limit(view)
    best, heaviest = -1, -1
    for index, one in enumerate(view.candidates):
        if one.tokens_in_flight <= limit and (candidate := weight(name, one.salt)) > heaviest:
            best, heaviest = index, candidate
    return best


prefix_aware = Policy("prefix_aware", _prefix_aware, needs_prefix=True)
"""The instance with the lowest cost: tokens queued there plus the weighted tokens of the prompt it has not cached.

A prompt goes to where its prefix was computed, unless the queue there costs more than computing it again elsewhere.
Ties (no instance has the prefix, equal load) are decided by rendezvous hashing of the conversation, so that workers
and proxies that share no state agree.
"""

session = Policy("session", _session, needs_session=True)
"""Rendezvous hashing of the session, with bounded load; requests without a session go to the least loaded instance."""
