"""A prefix cache of named blocks; those used least recently go first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence


class TokenCache:
    """Holds blocks of at most ``size`` tokens together."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._blocks: OrderedDict[int, int] = OrderedDict()
        self._held = 0

    def clear(self) -> None:
        """Forget everything."""
        self._blocks.clear()
        self._held = 0

    def hits(self, blocks: Sequence[int], block: int, tokens: int) -> int:
        """Leading tokens of a prompt that need no computing; as in vLLM never the last one.

        Args:
            blocks: names of the prompt's blocks, each of ``block`` tokens but for the last.
        """
        found = 0
        for name in blocks:
            if name not in self._blocks:
                break
            found += block
        return min(found, max(0, tokens - 1))

    def remember(self, blocks: Sequence[int], block: int) -> None:
        """A prompt has been computed."""
        # Deepest first, so that the beginning is the last to go.
        for name in reversed(blocks):
            if name not in self._blocks:
                self._held += block
            self._blocks[name] = block
            self._blocks.move_to_end(name)
        self.trim()

    def trim(self) -> None:
        """Forget what exceeds ``size``."""
        while self._held > self.size:
            self._held -= self._blocks.popitem(last=False)[1]
