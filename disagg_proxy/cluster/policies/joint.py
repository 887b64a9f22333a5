"""A decode for a prefill: what it holds, what is on its way to it, and what their first meeting would cost."""

from __future__ import annotations

from disagg_proxy.cluster.policies.view import Policy, View

REQUEST_TOKENS = 512
"""What one more request costs a decode step beside its context, in tokens of context: its output to come and the
work per sequence. docs/policies.md says where it is from."""

COLD_TOKENS = 4096
"""What a first meeting of two engines costs (0.2-1.1 s for an NCCL communicator, measured), as load on decode: a pair
that has met is preferred until its decode holds so many tokens more. Not more, or a new decode would stay idle."""


def _joint(view: View) -> int:
    candidates, links, traits = view.candidates, view.links, view.traits
    count = len(candidates)
    start = view.turn % count
    # KV that is on its way counts twice: it will be held, and until then it fills the buffer and the links.
    waiting_tokens = traits.tokens / traits.kv_bytes if traits.kv_bytes else 0.0
    best, least = -1, 0.0
    for at in (*range(start, count), *range(start)):
        one = candidates[at]
        cost = one.tokens_in_flight + REQUEST_TOKENS * one.in_flight + waiting_tokens * one.kv_waiting_bytes
        if links:
            cost += links[at]
        if best < 0 or cost < least:
            best, least = at, cost
    return best


joint = Policy("joint", _joint, wants_links=True)
"""The decode with the least context, requests and waiting KV, a warm communicator with the chosen prefill preferred."""
