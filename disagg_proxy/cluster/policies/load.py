"""By load alone. Load is tokens in flight, then requests in flight: ten long prompts weigh more than ten short ones."""

from __future__ import annotations

from disagg_proxy.cluster.policies.view import Policy, View


def _round_robin(view: View) -> int:
    return view.turn % len(view.candidates)


def _least_loaded(view: View) -> int:
    candidates = view.candidates
    count = len(candidates)
    start = view.turn % count
    best = start
    one = candidates[start]
    tokens, requests = one.tokens_in_flight, one.in_flight
    for at in (*range(start + 1, count), *range(start)):
        one = candidates[at]
        its = one.tokens_in_flight
        if its < tokens or (its == tokens and one.in_flight < requests):
            best, tokens, requests = at, its, one.in_flight
    return best


def _power_of_two(view: View) -> int:
    candidates = view.candidates
    count = len(candidates)
    if count == 1:
        return 0
    draw = int(view.random * count * (count - 1))
    first, second = divmod(draw, count - 1)
    second += second >= first
    one, other = candidates[first], candidates[second]
    mine, theirs = one.tokens_in_flight, other.tokens_in_flight
    return second if theirs < mine or (theirs == mine and other.in_flight < one.in_flight) else first


round_robin = Policy("round_robin", _round_robin)
"""Each in turn."""

least_loaded = Policy("least_loaded", _least_loaded)
"""The one with the fewest tokens, then requests, in flight; equals take turns."""

power_of_two = Policy("power_of_two", _power_of_two, wants_random=True)
"""The less loaded of two that are drawn: several proxies that see only their own load do not run after one another."""
