"""How one instance is chosen among equals: pure functions over a snapshot. docs/policies.md has the figures.

view        what a policy sees, and what it may ask to be shown
load        by load alone: round_robin, least_loaded, power_of_two
affinity    where the same prompt or the same session was: prefix_aware, session
joint       a decode for a prefill: waiting KV, warm communicators, distance
table       which prefill has computed which beginning of a prompt (state; the pairing keeps it)
"""

from __future__ import annotations

from disagg_proxy.cluster.policies.affinity import prefix_aware, session
from disagg_proxy.cluster.policies.joint import joint
from disagg_proxy.cluster.policies.load import least_loaded, power_of_two, round_robin
from disagg_proxy.cluster.policies.view import NO_TRAITS, Policy, Traits, View

PREFILL_POLICIES: dict[str, Policy] = {
    "round_robin": round_robin,
    "least_loaded": least_loaded,
    "power_of_two": power_of_two,
    "prefix_aware": prefix_aware,
    "session": session,
}
DECODE_POLICIES: dict[str, Policy] = {
    "round_robin": round_robin,
    "least_loaded": least_loaded,
    "power_of_two": power_of_two,
    "joint": joint,
    "session": session,
}

__all__ = [
    "DECODE_POLICIES", "NO_TRAITS", "PREFILL_POLICIES", "Policy", "Traits", "View",
    "joint", "least_loaded", "power_of_two", "prefix_aware", "round_robin", "session",
]  # fmt: skip
