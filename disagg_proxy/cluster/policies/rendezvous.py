"""Rendezvous hashing: every name ranks all instances; one that comes or goes moves only what it wins or had won."""

from __future__ import annotations

from collections.abc import Sequence

from disagg_proxy.cluster.policies.view import Loaded

_MASK = (1 << 64) - 1


def weight(name: int, salt: int) -> int:
    """How much the instance with ``salt`` wants ``name``; the highest wins. Not negative, alike in every process."""
    mixed = ((name ^ salt) * 0x9E3779B97F4A7C15) & _MASK
    return ((mixed ^ mixed >> 32) * 0xD6E8FEB86659FD93) & _MASK


def preferred(name: int, candidates: Sequence[Loaded]) -> int:
    """The index of the one that wants ``name`` most."""
    best, heaviest = 0, -1
    for at, one in enumerate(candidates):
        # As in weight(), without a call for each: this is on the way of every request.
        mixed = ((name ^ one.salt) * 0x9E3779B97F4A7C15) & _MASK
        mixed = ((mixed ^ mixed >> 32) * 0xD6E8FEB86659FD93) & _MASK
        if mixed > heaviest:
            best, heaviest = at, mixed
    return best
