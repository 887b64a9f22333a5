"""To where the same prompt, or the same session, was before, as long as that one is not too busy.

Bounded load: no instance gets a request for affinity's sake while its load is above ``bound`` times the mean load of
the candidates plus the request's own tokens. The least loaded one is always below.
"""

from __future__ import annotations

from disagg_proxy.cluster.policies.load import least_loaded
from disagg_proxy.cluster.policies.rendezvous import preferred, weight
from disagg_proxy.cluster.policies.view import Policy, View

FRESH_WEIGHT = 2.0
"""What a token that must be computed counts, against one that waits in front of it. More than 1, since computing what
is there already delays those who come later too; docs/policies.md has the figures."""

HOME_CREDIT = 0.5
"""What of that a prompt's home is let off: another worker or proxy may have sent the conversation there before."""


def limit(view: View) -> float:
    """The load above which nobody gets a request for affinity's sake, in tokens."""
    candidates = view.candidates
    return view.bound * sum([i.tokens_in_flight for i in candidates]) / len(candidates) + view.traits.tokens


def _prefix_aware(view: View) -> int:
    candidates, fresh, home = view.candidates, view.fresh, view.traits.home
    if not fresh:
        return least_loaded(view)
    loads = [one.tokens_in_flight for one in candidates]
    most = limit(view)
    favourite = -1 if home is None else preferred(home, candidates)
    best, least = -1, 0.0
    for at, load in enumerate(loads):
        if load > most:
            continue
        cost = load + FRESH_WEIGHT * fresh[at]
        if at == favourite:
            cost -= HOME_CREDIT * fresh[at]
        if best < 0 or cost < least:
            best, least = at, cost
        elif cost == least and _before(view, at, best):
            best = at
    return best


def _before(view: View, one: int, other: int) -> bool:
    """Whether the one of two equals comes first: fewer requests, then in turn."""
    candidates, turn, count = view.candidates, view.turn, len(view.candidates)
    first, second = candidates[one].in_flight, candidates[other].in_flight
    return first < second or (first == second and (one - turn) % count < (other - turn) % count)


def _session(view: View) -> int:
    name = view.traits.session
    if name is None:
        return least_loaded(view)
    most = limit(view)
    best, heaviest = -1, -1
    for at, one in enumerate(view.candidates):
        if one.tokens_in_flight <= most and (its := weight(name, one.salt)) > heaviest:
            best, heaviest = at, its
    return best


prefix_aware = Policy("prefix_aware", _prefix_aware, wants_prefix=True)
"""The one that has the least to compute before the prompt is done: what waits there and what of it is new to it.

A prompt goes to where its beginning was computed unless the queue there costs more than computing it again elsewhere.
Equals (nobody knows the prompt and nobody is busier) are decided by rendezvous hashing of the conversation, so that
workers and proxies that know nothing of each other agree.
"""

session = Policy("session", _session, wants_session=True)
"""Rendezvous hashing of the session with bounded load; requests without one go to the least loaded."""
