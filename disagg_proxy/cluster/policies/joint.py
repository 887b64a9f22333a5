"""The joint policy: chooses a decode for a chosen prefill by load, waiting KV and the cost of a new KV connection."""

from __future__ import annotations

from disagg_proxy.cluster.policies.view import Policy, View

REQUEST_TOKENS = 512
"""Cost of a request on decode beside its context (future output, work per sequence), in tokens of context. Derived in
docs/policies.md."""

COLD_TOKENS = 4096
"""Cost of a pair's first KV transfer (0.2-1.1 s to create an NCCL communicator, measured), in tokens of decode load: a
connected decode is preferred until it holds this many tokens more. A higher value would leave a new decode idle."""


def _joint(view: View) -> int:
    candidates, link_costs = view.candidates, view.link_costs
    count = len(candidates)
    start = view.turn % count
    # KV in transfer counts twice: decode will hold it, and until then it occupies buffer and network.
    best, least = -1, 0
    for index in (*range(start, count), *range(start)):
        one = candidates[index]
        cost = one.tokens_in_flight + REQUEST_TOKENS * one.in_flight + one.kv_waiting_tokens
        if link_costs:
            cost += link_costs[index]
        if best < 0 or cost < least:
            best, least = index, cost
    return best


joint = Policy("joint", _joint, needs_link_costs=True)
"""The decode with the least context, requests and waiting KV; existing connections to the prefill are preferred."""
