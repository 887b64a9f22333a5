"""Approximate contents of the prefix caches: which prefill got which prefixes from this process.

An estimate, since engines do not report what they cache or evict. At most ``capacity`` prefixes are kept, in LRU order;
about 200 bytes each, so 13 MB at the default when full. Entries are valid for one process of an instance: after a
restart (its epoch changes) its cache is empty.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from disagg_proxy.cluster.instance import Instance
from disagg_proxy.cluster.policies.view import Traits

MAX_PREFIXES = 65_536

CACHED_LOAD_DIVISOR = 4
"""One in this many cached tokens counts as load nevertheless. Otherwise a prefill that has evicted prefixes which are
recorded here would look idle while it computes them again (docs/policies.md)."""

_MAX_PROCESSES = 1024
"""Engine processes that are distinguished; the table is cleared when there are more."""


class PrefixTable:
    """The prefixes that each prefill got recently.

    Args:
        ends: length of the prefix behind each hash of :attr:`Traits.prefix`. Prompts that are equal up to the last one
            are taken to be equal to the end.
        capacity: bound on the prefixes that are kept.
    """

    def __init__(self, ends: Sequence[int], capacity: int = MAX_PREFIXES) -> None:
        self._ends = ends
        self._last = len(ends) - 1
        self._capacity = capacity
        self._holders: OrderedDict[int, int] = OrderedDict()
        """Hash of a prefix -> bit mask of the processes that have it."""
        self._lengths: dict[int, int] = {}
        """For prefixes that reach the end of what is hashed: the length of the longest such prompt."""
        self._bits: dict[Instance, tuple[int, int]] = {}
        """Instance -> epoch of its process and its bit; bits of ended processes are not reused."""
        self._used = 0

    def __len__(self) -> int:
        return len(self._holders)

    def uncached_tokens(self, traits: Traits, candidates: Sequence[Instance]) -> list[int]:
        """For each candidate the tokens of the prompt that are not in its cache."""
        tokens, prefix, size = traits.tokens, traits.prefix, traits.size
        found = [tokens] * len(candidates)
        holders = self._holders
        if not prefix or prefix[0] not in holders:
            return found
        bits = self._bits
        wanted = 0
        masks = []
        for instance in candidates:
            epoch, bit = bits.get(instance, (0, 0))
            if epoch != instance.epoch:
                bit = 0
            masks.append(bit)
            wanted |= bit
        for depth in range(len(prefix) - 1, -1, -1):
            name = prefix[depth]
            here = holders.get(name, 0) & wanted
            if not here:
                continue
            known = self._ends[depth] if depth < self._last else min(size, self._lengths.get(name, 0))
            left = tokens - tokens * known // size
            for index, bit in enumerate(masks):
                if bit & here:
                    found[index] = left
            wanted &= ~here
            if not wanted:
                break
        return found

    def record(self, traits: Traits, instance: Instance) -> None:
        """``instance`` gets this prompt, and caches it."""
        prefix, holders = traits.prefix, self._holders
        if not prefix:
            return
        bit = self._bit(instance)
        if len(prefix) > self._last:
            name = prefix[self._last]
            self._lengths[name] = max(traits.size, self._lengths.get(name, 0))
        # Longest first: a prefix is then never older in LRU order than its extensions, so it is not evicted before.
        for name in reversed(prefix):
            holders[name] = holders.get(name, 0) | bit
            holders.move_to_end(name)
        while len(holders) > self._capacity:
            name, _ = holders.popitem(last=False)
            self._lengths.pop(name, None)

    def _bit(self, instance: Instance) -> int:
        epoch, bit = self._bits.get(instance, (0, 0))
        if bit and epoch == instance.epoch:
            return bit
        if self._used >= _MAX_PROCESSES:
            self._holders.clear()
            self._lengths.clear()
            self._bits.clear()
            self._used = 0
        bit = 1 << self._used
        self._used += 1
        self._bits[instance] = (instance.epoch, bit)
        return bit
