"""Checks of what runs: ports, what earlier runs left behind, engines that need a restart."""

from __future__ import annotations

import time
from collections.abc import Iterator

from disagg_machine import files, net, proxy_view
from disagg_machine.doctor.machine import Machine
from disagg_machine.doctor.verdict import Verdict, error, ok, warning
from disagg_machine.readiness import HUNG, LOADING, pair_is_missing


def check_ports(machine: Machine) -> Iterator[Verdict]:
    """The ports of what does not run yet are free."""
    for place in machine.layout.parts:
        if place.name in machine.alive:
            continue
        taken = [port for port in place.ports if machine.port_taken(port)]
        for port in taken:
            yield error("port_taken", port, place.name, net.port_holder(port))
        if not taken:
            yield ok("doc_ports", place.name, " ".join(map(str, place.ports)))


def check_run_dir(machine: Machine, now: float | None = None) -> Iterator[Verdict]:
    """What earlier runs left in RUN_DIR. ``now``: seconds since the epoch."""
    now = time.time() if now is None else now
    run_dir = machine.settings.run_dir
    if run_dir.is_dir() and not files.is_own(run_dir):
        yield error("dir_not_ours", run_dir)
    stale = [part for part in machine.parts if not part.alive and part.get("pid") != "0"]
    for part in stale:
        since = part.number("since", int(now))
        yield warning(f"doc_stale_{part.state}", part.name, part.get("pid"), int(now - since) // 60)
        if since > now + 60:
            yield warning("doc_clock", part.name)
    if not stale:
        yield ok("doc_run_dir", run_dir)


def check_running(machine: Machine) -> Iterator[Verdict]:
    """What runs, as `status` judges it."""
    if "proxy" not in machine.alive:
        return
    view = machine.view
    if view.refused:
        yield warning(proxy_view.key_problem(machine.settings), machine.context.url)
    loading, missing = False, ""
    for place in (*machine.layout.engines, machine.layout["proxy"]):
        part = machine.alive.get(place.name)
        if part is None:
            continue
        if reason := view.wanted(part.number("http")):
            yield error("doc_frozen", place.name, reason, place.name)
            continue
        found = machine.readiness(part)
        loading = loading or found.health == LOADING
        missing = missing or found.missing
        if found.health == HUNG:
            yield error("doc_hung", place.name, found.words, place.name)
    if pair_is_missing(machine.context, missing, loading):
        yield error("doc_no_pair", missing)
