"""The governor at work: figures of the proxy in, clocks through the lease out."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from disagg_power.clock_values import parse_clock
from disagg_power.devices import Devices, PowerError
from disagg_power.governor import NO_DATA, SLO_MISSED, Decision, DecodeLaw, Governor, Law, PrefillLaw, Sample, steps
from disagg_power.holder import Holder, RoleSetting
from disagg_power.lease import LeaseError
from disagg_power.proxy_figures import Windows
from disagg_power.status_file import DEFAULT, SET

KINDS = {NO_DATA: "no_data", SLO_MISSED: "slo_missed"}
"""Of the reasons for default clocks; the others are errors of a GPU."""
RETRY = 30.0
"""Seconds after an error of a GPU before clocks are set again."""


@dataclass(frozen=True, slots=True)
class Objective:
    """The SLO, in seconds."""

    ttft_s: float
    tpot_s: float


def laws(roles: Mapping[str, RoleSetting], devices: Devices, slo: Objective) -> dict[str, Law]:
    """The law of each role that has GPUs. The floor is the role's SM clock setting, or half of the highest clock.

    Raises:
        PowerError: a GPU cannot be found, or lists no clocks.
    """
    found: dict[str, Law] = {}
    for role, setting in roles.items():
        if not setting.gpus:
            continue
        common = set.intersection(*(set(devices.find(gpu).supported_sm_clocks()) for gpu in setting.gpus))
        if not common:
            raise PowerError(f"the GPUs of {role} have no SM clock in common")
        wanted = parse_clock(setting.sm)
        clocks = steps(sorted(common), wanted.mhz if wanted else max(common) // 2)
        found[role] = PrefillLaw(clocks, slo.ttft_s) if role == "prefill" else DecodeLaw(clocks, slo.tpot_s)
    return found


class Governing:
    """One step each half second.

    Args:
        scrape: the text of the proxy's ``/metrics``; OSError when there is none.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        holder: Holder,
        roles: Mapping[str, RoleSetting],
        governor: Governor,
        scrape: Callable[[], str],
        say: Callable[[str], None],
        clock: Callable[[], float],
    ) -> None:
        self._holder = holder
        self._roles = roles
        self._governor = governor
        self._scrape = scrape
        self._say = say
        self._clock = clock
        self._windows = Windows()
        self._sample: Sample | None = None
        self._set: dict[str, int | None] = {}
        self._not_before = float("-inf")
        self._why: str | None = None

    def step(self) -> None:
        """Look, decide, set. Raises LeaseError when the guard is gone."""
        # Without an answer the last sample grows old, and the governor takes it for no data.
        with contextlib.suppress(OSError, ValueError):
            self._sample = self._windows.take(self._scrape(), self._clock())
        now = self._clock()
        if now < self._not_before:
            return
        decision = self._governor.next(self._sample, now)
        try:
            self._apply(decision)
        except LeaseError as error:
            if error.kind == "gone":
                raise
            self._not_before = now + RETRY
            self._fall_back(error)
            decision = self._governor.default(f"clocks could not be set: {error}")
        self._note(decision)

    def _apply(self, decision: Decision) -> None:
        assert self._holder.lease is not None
        for role, clock in decision.clocks.items():
            if self._set.get(role) == clock:
                continue
            for gpu in self._roles[role].gpus:
                if clock is None:
                    self._holder.lease.default(gpu)
                else:
                    self._holder.lease.set(gpu, sm=str(clock))
            self._set[role] = clock

    def _fall_back(self, error: LeaseError) -> None:
        """Default clocks wherever the guard can still set them."""
        assert self._holder.lease is not None
        for role, setting in self._roles.items():
            for gpu in setting.gpus:
                try:
                    self._holder.lease.default(gpu)
                except LeaseError as other:
                    if other.kind == "gone":
                        raise
            self._set[role] = None

    def _note(self, decision: Decision) -> None:
        status = self._holder.status
        if decision.why == self._why and dict(decision.clocks) == status.clocks_mhz:
            return
        if decision.why != self._why:
            self._say(f"default clocks: {decision.why}" if decision.why else "clocks follow the SLO")
        self._why = decision.why
        state = DEFAULT if decision.why else SET
        self._holder.note(
            replace(status, pid=os.getpid(), state=state, why=decision.why, governor="slo",
                    kind=KINDS.get(decision.why, "device" if decision.why else ""), clocks_mhz=dict(decision.clocks))
        )  # fmt: skip
