"""KV cache groups: how vLLM divides the layers, and in which order the blocks of a prompt are transferred.

With its hybrid KV cache manager vLLM puts layers of each kind into groups of their own (0.32,
v1/core/kv_cache_utils.py). A request has one list of blocks per group. All lists are from one pool, and a block has the
same bytes whichever group has it. Layers with a sliding window or with attention chunks need only the *tail* of a
prompt: vLLM frees blocks behind it while the prompt is still being computed, and lists the null block in their place.
Of layers with a recurrent state the tail is one block: the state after the last token.

The order of a transfer, equal on both sides: the blocks of groups that keep every token, position by position and by
group within a position, then the tail of each other group. Pure: no vLLM, no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

_STATES = frozenset({"MAMBA2"})
"""Kinds of recurrent states that are supported, by name in vLLM's ``MambaAttentionBackendEnum``: those whose answers
were compared with a plain engine's."""

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
        state: whether a block is a recurrent state: what the layers remember of all tokens before.
        page_bytes: bytes of a block in one plane, padding included.
    """

    block_size: int
    text: str = ""
    layers: tuple[str, ...] = ()
    window: int = 0
    chunk: int = 0
    state: bool = False
    page_bytes: int = 0

    @property
    def keeps_all(self) -> bool:
        return not self.window and not self.chunk and not self.state

    def tail(self, tokens: int) -> range:
        """Positions of the blocks that are needed to go on after ``tokens`` tokens; vLLM frees those before them."""
        if self.state:
            skipped = max(0, tokens - 1)
        elif self.window:
            skipped = max(0, tokens - self.window + 1)
        else:
            skipped = tokens // self.chunk * self.chunk if self.chunk else 0
        return range(skipped // self.block_size, -(-tokens // self.block_size))


@dataclass(frozen=True)
class CacheGroups:
    """All groups of an engine, in vLLM's order."""

    groups: tuple[CacheGroup, ...]

    @classmethod
    def of(cls, groups: Sequence[Any], several: bool = True, states: bool = True) -> CacheGroups:
        """Read vLLM's ``KVCacheConfig.kv_cache_groups``.

        Args:
            several: whether this vLLM can recompute a failed load of several groups (``versions.serves_groups``).
            states: whether recurrent states are supported with it (``versions.serves_states``).

        Raises:
            Unsupported: blocks of these groups cannot be moved.
        """
        found = cls(tuple(_read(group) for group in groups))
        if found.have_states and not states:
            raise Unsupported("layers keep a recurrent state, which needs vLLM 0.32 or newer")
        if found.have_tails and not several:
            if len(groups) == 1:
                raise Unsupported("every layer has a sliding window, which needs vLLM 0.30 or newer "
                                  "(--disable-sliding-window limits the context instead)")  # fmt: skip
            raise Unsupported(f"this model has {len(groups)} KV cache groups, which needs vLLM 0.30 or newer")
        if len({group.block_size for group in found.groups if group.keeps_all}) > 1:
            raise Unsupported("KV cache groups that keep every token have blocks of different sizes")
        if not found._full and any(group.chunk or group.state for group in found.groups):
            raise Unsupported("no layer keeps every token, and some have attention chunks or a recurrent state")
        return found

    @property
    def have_tails(self) -> bool:
        """Whether prompts are transferred without their last token; see ``loaded_tokens``."""
        return len(self.groups) > 1 or not self.groups[0].keeps_all

    @property
    def have_states(self) -> bool:
        """Whether some layers keep a recurrent state, for which vLLM does not call ``save_kv_layer``."""
        return any(group.state for group in self.groups)

    @property
    def load_completes_prefix(self) -> bool:
        """Whether a load may begin behind a prefix of which the cache has the blocks of full attention only.

        It always brings the states. Windows and chunks it does not, as far as they begin within the prefix.
        """
        kept = {group.text for group in self._full}
        return self.have_states and len(kept) == 1 and not any(group.window or group.chunk for group in self.groups)

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
    text = ", ".join(sorted(kind.text for kind in kinds if kind.text))
    if len(kinds) > 1 and not all(kind.keeps_all for kind in kinds):
        raise Unsupported(f"one KV cache group has layers of several kinds ({text})")
    names = tuple(getattr(group, "layer_names", ()))
    return replace(next(iter(kinds)), block_size=int(spec.block_size), text=text, layers=names, page_bytes=sizes.pop())


def _kind(spec: Any) -> CacheGroup:
    """Describe the KV of one layer, as a group without its size and layers.

    Raises:
        Unsupported: of a kind that is not known here.
    """
    name = type(spec).__name__
    window, chunk = (int(getattr(spec, size, None) or 0) for size in ("sliding_window", "attention_chunk_size"))
    if name == "SlidingWindowSpec":
        if getattr(spec, "extra_retained_tokens", 0) or window < 2:
            raise Unsupported(f"a sliding window of {window} tokens with speculative decoding over several of them")
        return CacheGroup(0, f"sliding {window}", window=window)
    if name == "ChunkedLocalAttentionSpec":
        return CacheGroup(0, f"chunked {chunk}", chunk=chunk)
    if name == "MambaSpec":
        return CacheGroup(0, _state(spec), state=True)
    if name == "MLAAttentionSpec":
        rows = str(getattr(spec, "cache_dtype_str", None) or "")
        role = getattr(getattr(spec, "cache_role", None), "value", "")
        if rows.endswith("_ds_mla"):
            raise Unsupported(f"the KV cache has rows of {rows} (set another --kv-cache-dtype)")
        if role == "indexer" or getattr(spec, "model_version", None):
            raise Unsupported("this model has a cache for sparse attention (an indexer) besides its KV")
        return CacheGroup(0, "MLA")
    if name != "FullAttentionSpec":
        raise Unsupported(f"the KV cache is a {name}, which is not supported")
    return CacheGroup(0, f"window {window}" if window else f"chunk {chunk}" if chunk else "")


def _state(spec: Any) -> str:
    """Describe a recurrent state: everything that determines the meaning of its bytes.

    Raises:
        Unsupported: of a kind that is not supported.
    """
    kind = getattr(spec.mamba_type, "name", str(spec.mamba_type))
    if kind not in _STATES or len(spec.shapes) != 2:
        raise Unsupported(f"layers keep a recurrent state of kind {kind} with {len(spec.shapes)} parts; "
                          f"only {', '.join(sorted(_STATES))} with two is supported")  # fmt: skip
    if getattr(spec, "num_speculative_blocks", 0):
        raise Unsupported("layers keep a recurrent state, and speculative decoding is on")
    mode = spec.mamba_cache_mode
    if mode != "align":
        raise Unsupported(f"layers keep a recurrent state in mode {mode}, which has not been tried: "
                          "leave prefix caching on, without --mamba-cache-mode")  # fmt: skip
    parts = ", ".join(f"{shape} {str(dtype).removeprefix('torch.')}"
                      for shape, dtype in zip(spec.shapes, spec.dtypes, strict=True))  # fmt: skip
    return f"{kind} {parts} {mode}"
