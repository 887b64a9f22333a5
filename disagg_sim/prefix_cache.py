"""An engine's prefix cache, reduced to counting hits: chains of 16-token blocks, least recently used out.

As vLLM's ``kv_cache_manager.get_computed_blocks``: whole blocks only, and never the last token of a prompt.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterator, Sequence

BLOCK = 16


class PrefixCache:
    """Holds at most ``capacity`` blocks; 0 holds none."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._blocks: OrderedDict[bytes, None] = OrderedDict()

    def hits(self, prompt_ids: Sequence[int]) -> int:
        """How many leading tokens need no computing."""
        if not self._capacity:
            return 0
        found = 0
        for key in _keys(prompt_ids, len(prompt_ids) - 1):
            if key not in self._blocks:
                break
            self._blocks.move_to_end(key)
            found += BLOCK
        return found

    def add(self, prompt_ids: Sequence[int]) -> None:
        """Remember a prompt that has been computed."""
        if not self._capacity:
            return
        for key in _keys(prompt_ids, len(prompt_ids)):
            self._blocks[key] = None
            self._blocks.move_to_end(key)
        while len(self._blocks) > self._capacity:
            self._blocks.popitem(last=False)


def _keys(prompt_ids: Sequence[int], limit: int) -> Iterator[bytes]:
    key = b""
    for start in range(0, limit - BLOCK + 1, BLOCK):
        block = array("I", prompt_ids[start : start + BLOCK]).tobytes()
        key = hashlib.blake2b(key + block, digest_size=16).digest()
        yield key
