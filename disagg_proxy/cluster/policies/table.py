"""Which prefill has computed which beginning of a prompt, as far as this process has sent it there.

A guess, and bounded: engines tell nobody what they hold or drop. At most ``most`` beginnings are remembered, the least
recently used go first; about 200 bytes each, so 13 MB at the default when full. What is known of an instance holds
for one process of it: after a restart (its epoch changes) it knows nothing.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from disagg_proxy.cluster.instance import Instance
from disagg_proxy.cluster.policies.view import Traits

MOST = 65_536

DOUBT = 4
"""One part in so many of what a prefill is known to have counts as its load nevertheless. Without it one whose cache
has dropped what it was known for looks idle under work that nobody sees (docs/policies.md)."""

_PROCESSES = 1024
"""Engine processes that are told apart; with the next one everything is forgotten."""


class PrefixTable:
    """The beginnings that each prefill got lately.

    Args:
        ends: length of the beginning at each place of a prompt's names; what is the same up to the last one is taken
            to be the same to the end.
        most: beginnings that are remembered.
    """

    def __init__(self, ends: Sequence[int], most: int = MOST) -> None:
        self._ends = ends
        self._last = len(ends) - 1
        self._most = most
        self._holders: OrderedDict[int, int] = OrderedDict()
        """Name of a beginning -> bits of the processes that have it."""
        self._lengths: dict[int, int] = {}
        """For beginnings that reach the end of what is hashed: how long the longest such prompt was."""
        self._bits: dict[Instance, tuple[int, int]] = {}
        """Process (by its epoch) -> its bit; those of processes that have ended are not given again."""
        self._used = 0

    def __len__(self) -> int:
        return len(self._holders)

    def fresh(self, traits: Traits, candidates: Sequence[Instance]) -> list[int]:
        """For each candidate the tokens of the prompt that it has to compute."""
        tokens, prefix, size = traits.tokens, traits.prefix, traits.size
        found = [tokens] * len(candidates)
        holders = self._holders
        if not prefix or prefix[0] not in holders:
            return found
        bits = self._bits
        wanted = 0
        its = []
        for instance in candidates:
            epoch, bit = bits.get(instance, (0, 0))
            if epoch != instance.epoch:
                bit = 0
            its.append(bit)
            wanted |= bit
        for depth in range(len(prefix) - 1, -1, -1):
            name = prefix[depth]
            here = holders.get(name, 0) & wanted
            if not here:
                continue
            known = self._ends[depth] if depth < self._last else min(size, self._lengths.get(name, 0))
            left = tokens - tokens * known // size
            for at, bit in enumerate(its):
                if bit & here:
                    found[at] = left
            wanted &= ~here
            if not wanted:
                break
        return found

    def learn(self, traits: Traits, instance: Instance) -> None:
        """``instance`` is going to compute this prompt."""
        prefix, holders = traits.prefix, self._holders
        if not prefix:
            return
        bit = self._bit(instance)
        if len(prefix) > self._last:
            name = prefix[self._last]
            self._lengths[name] = max(traits.size, self._lengths.get(name, 0))
        # Deepest first: a beginning is then never older than what goes on from it, and never dropped before.
        for name in reversed(prefix):
            holders[name] = holders.get(name, 0) | bit
            holders.move_to_end(name)
        while len(holders) > self._most:
            name, _ = holders.popitem(last=False)
            self._lengths.pop(name, None)

    def _bit(self, instance: Instance) -> int:
        epoch, bit = self._bits.get(instance, (0, 0))
        if bit and epoch == instance.epoch:
            return bit
        if self._used >= _PROCESSES:
            self._holders.clear()
            self._lengths.clear()
            self._bits.clear()
            self._used = 0
        bit = 1 << self._used
        self._used += 1
        self._bits[instance] = (instance.epoch, bit)
        return bit
