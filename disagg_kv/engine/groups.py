"""KV cache groups: how vLLM divides the layers, and in which order the blocks of a prompt are transferred.

With its hybrid KV cache manager vLLM puts layers of each kind into groups of their own (0.32,
v1/core/kv_cache_utils.py). A request has one list of blocks per group. All lists are from one pool, and a block has the
same bytes whichever group has it. Layers with a sliding window or with attention chunks need only the *tail* of a
prompt: vLLM frees blocks behind it while the prompt is still being computed, and lists the null block in their place.

The order of a transfer, equal on both sides: the blocks of groups that keep every token, position by position and by
group within a position, then the tail of each other group. Pure: no vLLM, no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

NULL_BLOCK = 0
"""vLLM's placeholder for freed blocks (0.32, v1/core/block_pool.py)."""


class Unsupported(ValueError):
    """This connector cannot move this engine's KV cache; the text is the reason."""


@dataclass(frozen=True)
class CacheGroup:
    """Layers that share their lists of blocks.

    Attributes:
        block_size: tokens of a block.
        text: what besides the tensors determines the meaning of a block; "" for plain full attention.
        window: tokens of a sliding window, 0 without one.
        chunk: tokens of an attention chunk, 0 without chunks.
    """

    block_size: int
    text: str = ""
    layers: tuple[str, ...] = ()
    window: int = 0
    chunk: int = 0

    @property
    def keeps_all(self) -> bool:
        return not self.window and not self.chunk

    def tail(self, tokens: int) -> range:
        """Positions of the blocks that are needed to go on after ``tokens`` tokens; vLLM frees those before them."""
        if self.window:
            skipped = max(0, tokens - self.window + 1)
        else:
            skipped = tokens // self.chunk * self.chunk if self.chunk else 0
        return range(skipped // self.block_size, -(-tokens // self.block_size))


@dataclass(frozen=True)
class CacheGroups:
    """All groups of an engine, in vLLM's order."""

    groups: tuple[CacheGroup, ...]

    @classmethod
    def of(cls, groups: Sequence[Any], several: bool = True) -> CacheGroups:
        """Read vLLM's ``KVCacheConfig.kv_cache_groups``.

        Args:
            several: whether this vLLM can recompute a failed load of several groups (``versions.serves_groups``).

        Raises:
            Unsupported: blocks of these groups cannot be moved.
        """
        found = cls(tuple(_read(group) for group in groups))
        if found.have_tails and not several:
            if len(groups) == 1:
                raise Unsupported("every layer has a sliding window, which needs vLLM 0.30 or newer "
                                  "(--disable-sliding-window limits the context instead)")  # fmt: skip
            raise Unsupported(f"this model has {len(groups)} KV cache groups, which needs vLLM 0.30 or newer")
        if len({group.block_size for group in found.groups if group.keeps_all}) > 1:
            raise Unsupported("KV cache groups that keep every token have blocks of different sizes")
        if not found._full and any(group.chunk for group in found.groups):
            raise Unsupported("every layer has attention chunks or a sliding window, and some have chunks")
        return found

    @property
    def have_tails(self) -> bool:
        """Whether prompts are transferred without their last token; see ``loaded_tokens``."""
        return len(self.groups) > 1 or not self.groups[0].keeps_all

    @property
    def block_size(self) -> int:
        """Tokens of a block in groups that keep every token, or in the only group."""
        return (self._full or self.groups)[0].block_size

    @property
    def text(self) -> str:
        """Text for the layout, which both sides compare."""
        if not self.have_tails:
            return self.groups[0].text
        return "groups " + ", ".join(
            f"{group.text or 'full'}/{group.block_size} x{len(group.layers)}" for group in self.groups
        )

    def loaded_tokens(self, prompt: int) -> int:
        """Tokens of a prompt that are transferred.

        With tails all but the last: vLLM computes the last one again to sample from it (0.32,
        v1/core/sched/scheduler.py, ``_update_waiting_for_remote_kv``), which needs a tail that ends before it.
        """
        return prompt - 1 if self.have_tails else prompt

    def tails(self, tokens: int) -> tuple[int, ...]:
        """Numbers of blocks of the tails."""
        return tuple(len(group.tail(tokens)) for group in self.groups if not group.keeps_all)

    def total(self, tokens: int) -> int:
        """Number of blocks of ``tokens`` tokens in all groups."""
        return self.complete(tokens + self.block_size - 1) + sum(self.tails(tokens))

    def complete(self, tokens: int) -> int:
        """Number of leading blocks of the order that are full after ``tokens`` tokens."""
        return tokens // self.block_size * len(self._full)

    def on_prefill(self, ids: Sequence[Sequence[int]], tokens: int, computed: int) -> list[int]:
        """Leading blocks of the order that are final after ``computed`` tokens of ``tokens``; all with the last one."""
        if computed < tokens:
            return self._interleaved(ids, range(computed // self.block_size))
        found = self._interleaved(ids, range(-(-tokens // self.block_size)))
        for group, blocks in self._with(ids, False):
            found += blocks[group.tail(tokens).start : group.tail(tokens).stop]
        return found

    def on_decode(self, ids: Sequence[Sequence[int]], tokens: int, cached: int) -> tuple[list[int], tuple[int, ...]]:
        """Blocks of the order to fill with the tokens from ``cached`` to ``tokens``, and how many are of each tail."""
        first = cached // self.block_size
        found, tails = self._interleaved(ids, range(first, -(-tokens // self.block_size))), []
        for group, blocks in self._with(ids, False):
            missing = blocks[cached // group.block_size : -(-tokens // group.block_size)]
            tail = [block for block in missing if block != NULL_BLOCK]
            found += tail
            tails.append(len(tail))
        return found, tuple(tails)

    @property
    def _full(self) -> list[CacheGroup]:
        return [group for group in self.groups if group.keeps_all]

    def _with(self, ids: Sequence[Sequence[int]], keep_all: bool) -> list[tuple[CacheGroup, Sequence[int]]]:
        return [(group, blocks) for group, blocks in zip(self.groups, ids, strict=True) if group.keeps_all is keep_all]

    def _interleaved(self, ids: Sequence[Sequence[int]], places: range) -> list[int]:
        lists = [blocks[places.start : places.stop] for _, blocks in self._with(ids, True)]
        return [block for position in zip(*lists, strict=False) for block in position]


def _read(group: Any) -> CacheGroup:
    spec = group.kv_cache_spec
    specs = list(getattr(spec, "kv_cache_specs", {}).values()) or [spec]
    kinds = {_kind(one) for one in specs}
    sizes = {int(one.page_size_bytes) for one in specs}
    if len(sizes) != 1:
        raise Unsupported(f"layers have blocks of different sizes ({sorted(sizes)} bytes)")
    text = ", ".join(sorted(kind for kind, _, _ in kinds if kind))
    _, window, chunk = max(kinds, key=lambda kind: kind[1:])
    if (window or chunk) and len(kinds) > 1:
        raise Unsupported(f"one KV cache group has layers of several kinds ({text})")
    names = tuple(getattr(group, "layer_names", ()))
    return CacheGroup(int(spec.block_size), text, names, window, chunk)


def _kind(spec: Any) -> tuple[str, int, int]:
    """Describe the KV of one layer, "" for plain full attention; its window and chunk if vLLM frees blocks behind them.

    Raises:
        Unsupported: not only keys and values, or of a kind that is not known here.
    """
    name = type(spec).__name__
    window, chunk = (int(getattr(spec, size, None) or 0) for size in ("sliding_window", "attention_chunk_size"))
    if name == "SlidingWindowSpec":
        if getattr(spec, "extra_retained_tokens", 0) or window < 2:
            raise Unsupported(f"a sliding window of {window} tokens with speculative decoding over several of them")
        return f"sliding {window}", window, 0
    if name == "ChunkedLocalAttentionSpec":
        return f"chunked {chunk}", 0, chunk
    if name == "MLAAttentionSpec":
        rows = str(getattr(spec, "cache_dtype_str", None) or "")
        role = getattr(getattr(spec, "cache_role", None), "value", "")
        if rows.endswith("_ds_mla"):
            raise Unsupported(f"the KV cache has rows of {rows} (set another --kv-cache-dtype)")
        if role == "indexer" or getattr(spec, "model_version", None):
            raise Unsupported("this model has a cache for sparse attention (an indexer) besides its KV")
        return "MLA", 0, 0
    if name != "FullAttentionSpec":
        raise Unsupported(f"the KV cache is a {name}; only full attention, MLA and sliding windows are supported")
    return f"window {window}" if window else f"chunk {chunk}" if chunk else "", 0, 0
