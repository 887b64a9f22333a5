"""Rendezvous (highest random weight) hashing: adding or removing an instance moves only the names it wins."""

from __future__ import annotations

from collections.abc import Sequence

from disagg_proxy.cluster.policies.view import Loaded

_MASK = (1 << 64) - 1


def weight(name: int, salt: int) -> int:
    """The weight of ``name`` for the instance with ``salt``; the highest wins. Not negative, equal in every process."""
    mixed = ((name ^ salt) * 0x9E3779B97F4A7C15) & _MASK
    return ((mixed ^ mixed >> 32) * 0xD6E8FEB86659FD93) & _MASK


def preferred(name: int, candidates: Sequence[Loaded]) -> int:
    """The index of the candidate with the highest weight for ``name``."""
    best, heaviest = 0, -1
    for index, one in enumerate(candidates):
        # weight() inlined: this runs for every request.
        mixed = ((name ^ one.salt) * 0x9E3779B97F4A7C15) & _MASK
        mixed = ((mixed ^ mixed >> 32) * 0xD6E8FEB86659FD93) & _MASK
        if mixed > heaviest:
            best, heaviest = index, mixed
    return best
