"""Policies: pure functions that choose one of several candidates. docs/policies.md has the measurements.

view        the input of a policy, and which parts of it a policy needs
load        by load alone: round_robin, least_loaded, power_of_two
affinity    by where the same prefix or session was served before: prefix_aware, session
joint       a decode for a chosen prefill: load, waiting KV, existing connections, distance
table       which prefill has computed which prefixes (state, kept by the selection)
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
