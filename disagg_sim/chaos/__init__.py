"""A chaos run: the real proxy and simulated engines under a mixed load and injected faults (``docs/chaos.md``).

As a command: ``python -m disagg_sim.chaos --help``. In tests: :func:`run` with :class:`Options`.
"""

from disagg_sim.chaos.plan import ALL, KINDS, Leave, Plan, PlannedRequest, Trouble, make_plan
from disagg_sim.chaos.report import Report
from disagg_sim.chaos.run import Options, run

__all__ = [
    "ALL",
    "KINDS",
    "Leave",
    "Options",
    "Plan",
    "PlannedRequest",
    "Report",
    "Trouble",
    "make_plan",
    "run",
]
