"""Policies by load alone: tokens in flight, then requests in flight. Ten long prompts outweigh ten short ones."""

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
    for index in (*range(start + 1, count), *range(start)):
        one = candidates[index]
        load = one.tokens_in_flight
        if load < tokens or (load == tokens and one.in_flight < requests):
            best, tokens, requests = index, load, one.in_flight
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
"""The instance with the fewest tokens, then requests, in flight; ties are broken round robin."""

power_of_two = Policy("power_of_two", _power_of_two, needs_random=True)
"""The less loaded of two random candidates: avoids herding when several proxies see only their own load."""
