"""The subcommands of ``disagg-proxy``, as names only: no module is imported before its command is called."""

from __future__ import annotations

from dataclasses import dataclass

SERVE = "serve"
"""The proxy itself, and what runs when no command is given."""


@dataclass(frozen=True, slots=True)
class Command:
    """One subcommand.

    Attributes:
        module: has ``main(argv)``, which takes the words after the command and returns the exit code.
        help: one line.
    """

    module: str
    help: str


COMMANDS: dict[str, Command] = {
    "check": Command("disagg_proxy.check", "check the settings and show those that are not defaults; starts nothing"),
    "machine": Command("disagg_machine.cli", "proxy and engines on this machine: start, stop, supervise, measure"),
    "cluster": Command("disagg_ray.cli", "the same on the nodes of a Ray cluster: start, status, scale, drain, stop"),
    "sim": Command("disagg_sim.cli", "simulated vLLM engines that need no GPU"),
    "top": Command("disagg_proxy.top.cli", "the live page of a running proxy, in a terminal"),
    "key": Command("disagg_proxy.keys.cli", "new keys for API_KEYS_FILE"),
    "calibrate": Command("disagg_sim.calibrate.cli", "an engine profile for sim, from running engines"),
    "bench": Command("disagg_report.cli", "latency and goodput at rising request rates, as a report"),
    "power": Command("disagg_power.cli", "clocks and energy of the GPUs"),
    "demo": Command("disagg_sim.chaos.demo", "a minute of it without a GPU: proxy, simulated engines, load, a freeze"),
    "chaos": Command("disagg_sim.chaos.cli", "a proxy and simulated engines under load and injected faults"),
}
