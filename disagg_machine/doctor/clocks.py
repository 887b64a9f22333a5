"""Checks of clocks: whether they may be set and by what, their range, what is set, throttling. It sets nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from disagg_machine.commands import clocks_wanted
from disagg_machine.doctor.machine import Machine
from disagg_machine.doctor.verdict import Verdict, ok, warning

HARMLESS = {"gpu_idle", "applications_clocks_setting"}
"""Reasons for a clock below the highest one that are no throttling."""


def check_clocks(machine: Machine) -> Iterator[Verdict]:
    """Clocks and power limits of the GPUs of this layout."""
    if not (machine.gpus or machine.environ.get("POWER_SIMULATED")):
        return
    found = machine.clocks
    if "error" in found:
        yield warning("doc_clocks_unreadable", found["error"])
        return
    if found["unreadable"]:
        yield warning("doc_clocks_state", found["unreadable"])
    yield _permission(machine, found["backends"])
    named = {word for place in machine.layout.engines for word in place.gpus}
    left = [gpu["index"] for gpu in found["gpus"] if gpu.get("changed")]
    for gpu in found["gpus"]:
        if any(word == str(gpu["index"]) or gpu["uuid"].startswith(word) for word in named):
            yield from _gpu(gpu)
    if left and found["guard_lives"]:
        yield ok("doc_clocks_set", " ".join(map(str, left)), found["guard"])
    elif left:
        yield warning("doc_clocks_left", " ".join(map(str, left)))


def _permission(machine: Machine, backends: list[str]) -> Verdict:
    chosen = machine.settings.power_backend
    if chosen == "none":
        return ok("doc_clocks_off")
    if backends and chosen in ("auto", *backends):
        return ok("doc_clocks_may", backends[0] if chosen == "auto" else chosen)
    return (warning if clocks_wanted(machine.settings) else ok)("doc_clocks_denied")


def _gpu(gpu: Mapping[str, Any]) -> Iterator[Verdict]:
    index = gpu["index"]
    if "error" in gpu:
        yield warning("doc_clocks_unreadable", gpu["error"])
        return
    if "lowest_mhz" in gpu:
        yield ok("doc_clock_range", index, gpu["lowest_mhz"], gpu["highest_mhz"], gpu["sm_mhz"])
    else:
        yield ok("doc_clock_no_range", index)
    if "applications_clocks_setting" in gpu["throttle"] and not gpu["changed"]:
        yield warning("doc_clock_locked", index)
    if throttled := [reason for reason in gpu["throttle"] if reason not in HARMLESS]:
        yield warning("doc_clock_throttled", index, ", ".join(throttled))
