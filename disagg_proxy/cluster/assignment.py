"""The role that an engine of both roles is assigned at run time, and why. Pure.

An assignment is a preference: an instance gets legs of its other role only where no other instance can take them.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from disagg_proxy.cluster.instance import Role

_ROLES = ("", "prefill", "decode")
_WAIT_STEP = 0.01
"""Seconds."""
_WAIT_BITS, _FILL_BITS, _ROLE_BITS, _CAUSE_BITS = 11, 7, 2, 3
_TIME_SHIFT = _WAIT_BITS + _FILL_BITS + _ROLE_BITS + _CAUSE_BITS


class Cause(IntEnum):
    """Why a role was assigned."""

    ANNOUNCED = 0
    FIRST = 1
    PREFILL_WAITS = 2
    DECODE_FULL = 3
    DECODE_SLOW = 4
    MISSING = 5
    BY_HAND = 6
    AUTO = 7


_TEXTS = {
    Cause.ANNOUNCED: "roles are not assigned any more (ROLES)",
    Cause.FIRST: "first assignment",
    Cause.PREFILL_WAITS: "prompts wait {wait:.0f} ms for prefill, and decode has capacity ({fill} % full)",
    Cause.DECODE_FULL: "decode is {fill} % full, and prefill has capacity (prompts wait {wait:.0f} ms)",
    Cause.DECODE_SLOW: "decode is slower than its limit, and prefill has capacity (prompts wait {wait:.0f} ms)",
    Cause.MISSING: "no other instance was left for this role",
    Cause.BY_HAND: "set by an operator",
    Cause.AUTO: "set to auto by an operator",
}


@dataclass(frozen=True, slots=True)
class Assignment:
    """One decision about the role of an instance.

    Attributes:
        role: None: it gets legs of either role.
        cause: why.
        at: clock reading of :meth:`Registry.now` in seconds, in steps of 1 ms.
        wait: seconds that prompts waited for prefill then, at most 20.
        fill: how full decode was then, 0 to 1: its KV cache, or its requests.
    """

    role: Role | None
    cause: Cause
    at: float
    wait: float = 0.0
    fill: float = 0.0

    @property
    def by_hand(self) -> bool:
        """Whether an operator has set the role: it stays until the operator sets ``auto``."""
        return self.cause is Cause.BY_HAND

    @property
    def reason(self) -> str:
        """The cause in words, with the figures of the decision."""
        return _TEXTS[self.cause].format(wait=self.wait * 1000, fill=round(self.fill * 100))

    def pack(self) -> int:
        """All of it in one word of 63 bits, of which a later decision is always the greater one.

        So that the workers of a proxy share it as one flag (workers/shared_table.py), which is never read half-written.
        """
        word = max(0, round(self.at * 1000))
        for value, bits in (
            (int(self.cause), _CAUSE_BITS),
            (_ROLES.index(self.role.value if self.role else ""), _ROLE_BITS),
            (round(self.wait / _WAIT_STEP), _WAIT_BITS),
            (round(self.fill * 100), _FILL_BITS),
        ):
            word = word << bits | min(max(0, value), (1 << bits) - 1)
        return word


def unpack(word: int) -> Assignment:
    """Reverse :meth:`Assignment.pack`, to its precision: 1 ms, 10 ms of waiting, 1 %."""
    fields = []
    for bits in (_FILL_BITS, _WAIT_BITS, _ROLE_BITS, _CAUSE_BITS):
        fields.append(word & (1 << bits) - 1)
        word >>= bits
    fill, wait, role, cause = fields
    return Assignment(
        Role(_ROLES[role]) if role else None, Cause(cause), word / 1000, round(wait * _WAIT_STEP, 2), fill / 100
    )
