"""Cache groups: which are accepted, and which blocks of a prompt are transferred in which order."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from disagg_kv.engine.groups import CacheGroup, CacheGroups, Unsupported

FULL, SLIDING, CHUNKED = CacheGroup(4), CacheGroup(4, "sliding 8", window=8), CacheGroup(4, "chunked 8", chunk=8)
STATE = CacheGroup(4, "state", state=True)


def _group(name: str, **more: Any) -> Any:
    return SimpleNamespace(kv_cache_spec=type(name, (), {"block_size": 16, "page_size_bytes": 64, **more})())


def _sliding(window: int, **more: Any) -> Any:
    return _group("SlidingWindowSpec", sliding_window=window, **more)


def _state(kind: str, **more: Any) -> Any:
    fields = {"shapes": ((3, 8), (2, 4)), "dtypes": ("torch.float32",) * 2, "mamba_cache_mode": "align", **more}
    return _group("MambaSpec", mamba_type=SimpleNamespace(name=kind), **fields)


def _uniform(*specs: Any) -> Any:
    return _group("UniformTypeKVCacheSpecs", kv_cache_specs={str(n): g.kv_cache_spec for n, g in enumerate(specs)})


@pytest.mark.parametrize(
    ("group", "kinds"),
    [
        (_group("FullAttentionSpec"), ""),
        (_uniform(_group("FullAttentionSpec")), ""),
        (_group("FullAttentionSpec", sliding_window=128), "window 128"),
        (_group("FullAttentionSpec", attention_chunk_size=64), "chunk 64"),
        (_uniform(_group("FullAttentionSpec"), _group("FullAttentionSpec", sliding_window=4)), "window 4"),
        (_group("MLAAttentionSpec", cache_dtype_str="auto", cache_role=SimpleNamespace(value="sparse")), "MLA"),
        (_group("MLAAttentionSpec"), "MLA"),
    ],
)
def test_caches_that_keep_every_token_are_accepted(group: Any, kinds: str) -> None:
    found = CacheGroups.of([group], several=False)
    assert (found.block_size, found.text, found.have_tails) == (16, kinds, False)


@pytest.mark.parametrize(
    ("groups", "word"),
    [
        ([_group("FullAttentionSpec"), _state("MAMBA1")], "state of kind MAMBA1 with 2 parts"),
        ([_group("FullAttentionSpec"), _state("MAMBA2", shapes=((3, 8),) * 5)], "MAMBA2 with 5 parts"),
        ([_group("FullAttentionSpec"), _state("GDN_ATTN")], "GDN_ATTN with 2 parts"),
        ([_group("FullAttentionSpec"), _state("MAMBA2", num_speculative_blocks=1)], "speculative decoding"),
        ([_state("MAMBA2")], "no layer keeps every token"),
        ([_group("FullAttentionSpec"), _state("MAMBA2", mamba_cache_mode="none")], "leave prefix caching on"),
        ([_uniform(_state("MAMBA2"), _state("MAMBA2", dtypes=("torch.bfloat16",) * 2))], "layers of several kinds"),
        ([_group("FullAttentionSpec"), _group("FullAttentionSpec", block_size=32)], "blocks of different sizes"),
        ([_uniform(_sliding(8), _group("FullAttentionSpec"))], "layers of several kinds"),
        ([_sliding(8, extra_retained_tokens=1)], "speculative decoding"),
        ([_group("RSWASpec")], "RSWASpec"),
        ([_group("ChunkedLocalAttentionSpec", attention_chunk_size=8)], "no layer keeps every token"),
        ([_group("MLAAttentionSpec", cache_dtype_str="fp8_ds_mla")], "rows of fp8_ds_mla"),
        ([_group("MLAAttentionSpec", cache_role=SimpleNamespace(value="indexer"))], "indexer"),
        ([_group("MLAAttentionSpec", model_version="deepseek_v4")], "indexer"),
        ([_uniform(_group("MLAAttentionSpec"), _group("MLAAttentionSpec", page_size_bytes=8))], "different sizes"),
    ],
)
def test_other_models_are_refused(groups: Any, word: str) -> None:
    with pytest.raises(Unsupported, match=word):
        CacheGroups.of(groups)


@pytest.mark.parametrize("groups", [[_sliding(8)], [_group("FullAttentionSpec"), _sliding(8)]])
def test_tails_need_a_vllm_that_can_recompute_them(groups: Any) -> None:
    with pytest.raises(Unsupported, match=r"needs vLLM 0\.30 or newer"):
        CacheGroups.of(groups, several=False)
    assert CacheGroups.of(groups).have_tails


def test_groups_as_vllm_makes_them() -> None:
    chunked = _group("ChunkedLocalAttentionSpec", attention_chunk_size=64)
    found = CacheGroups.of([_sliding(8), _group("FullAttentionSpec"), chunked])
    assert found.text == "groups sliding 8/16 x0, full/16 x0, chunked 64/16 x0"
    assert [(group.window, group.chunk, group.keeps_all) for group in found.groups] == [
        (8, 0, False), (0, 0, True), (0, 64, False)
    ]  # fmt: skip


def test_states_need_a_newer_vllm() -> None:
    groups = [_state("MAMBA2"), _group("FullAttentionSpec"), _state("MAMBA2")]
    with pytest.raises(Unsupported, match=r"needs vLLM 0\.32 or newer"):
        CacheGroups.of(groups, states=False)
    found = CacheGroups.of(groups)
    assert found.have_states and [group.state for group in found.groups] == [True, False, True]
    assert found.groups[0].text == "MAMBA2 (3, 8) float32, (2, 4) float32 align" and found.groups[0].page_bytes == 64


@pytest.mark.parametrize(("tokens", "place"), [(1, 0), (3, 0), (4, 0), (5, 1), (8, 1), (9, 2)])
def test_a_state_is_one_block(tokens: int, place: int) -> None:
    """The one with the last of the tokens, also where that is the last of a block."""
    groups, blocks = CacheGroups((FULL, STATE)), [0] * place + [9]
    full = list(range(1, place + 2))
    assert groups.on_prefill([full, blocks], tokens, tokens) == [*full, 9] and groups.tails(tokens) == (1,)
    assert groups.on_decode([full, blocks], tokens, 0) == ([*full, 9], (1,))
    assert groups.total(tokens) == len(full) + 1


@pytest.mark.parametrize(
    ("groups", "completes"),
    [
        ((FULL, STATE), True),
        ((STATE, FULL, STATE), True),
        ((FULL, SLIDING), False),
        ((FULL, STATE, SLIDING), False),
        ((FULL, STATE, CHUNKED), False),
        ((FULL, CacheGroup(4, "MLA"), STATE), False),
    ],
)
def test_a_load_completes_a_prefix_that_lacks_states_only(groups: tuple[CacheGroup, ...], completes: bool) -> None:
    """A window may begin within the prefix, where nothing is loaded."""
    assert CacheGroups(groups).load_completes_prefix is completes


def test_a_state_in_the_prefix_cache_of_decode_is_not_overwritten() -> None:
    groups = CacheGroups((FULL, STATE))
    assert groups.on_decode([[1, 2, 3], [0, 8, 9]], 10, 8) == ([3, 9], (1,))
    assert groups.on_decode([[1, 2, 3], [0, 0, 9]], 10, 8) == ([3, 9], (1,)), "the state before them was evicted"


@pytest.mark.parametrize("tokens", range(1, 40))
def test_a_tail_has_every_token_that_the_next_one_attends_to(tokens: int) -> None:
    for group, first in ((SLIDING, max(0, tokens - 7)), (CHUNKED, tokens // 8 * 8)):
        tail = group.tail(tokens)
        assert set(range(first, tokens)) <= {place * 4 + offset for place in tail for offset in range(4)}
        assert tail.start == first // 4 and tail.stop == -(-tokens // 4)


def test_the_order_of_a_transfer() -> None:
    groups = CacheGroups((SLIDING, FULL, CHUNKED, FULL))
    ids = [[0, 0, 1, 2, 3], [11, 12, 13, 14, 15], [0, 0, 0, 0, 25], [31, 32, 33, 34, 35]]
    assert groups.on_prefill(ids, 18, 17) == [11, 31, 12, 32, 13, 33, 14, 34], "tails with the last token only"
    whole = groups.on_prefill(ids, 18, 18)
    assert whole == [11, 31, 12, 32, 13, 33, 14, 34, 15, 35, 1, 2, 3, 25]
    assert (groups.total(18), groups.tails(18), groups.complete(17)) == (len(whole), (3, 1), 8)


def test_decode_fills_what_it_has_blocks_for() -> None:
    groups = CacheGroups((SLIDING, FULL, CHUNKED))
    ids = [[0, 0, 1, 2, 3], [11, 12, 13, 14, 15], [0, 0, 0, 0, 25]]
    assert groups.on_decode(ids, 18, 0) == ([11, 12, 13, 14, 15, 1, 2, 3, 25], (3, 1))
    assert groups.on_decode(ids, 18, 12) == ([14, 15, 2, 3, 25], (2, 1)), "the window begins in its own cache"
    assert groups.on_decode([[0, 0, 1, 2], [11, 12, 13, 14], [0] * 4], 16, 4) == ([12, 13, 14, 1, 2], (2, 0))


def test_groups_with_blocks_of_other_sizes() -> None:
    groups = CacheGroups((FULL, CacheGroup(8, window=8)))
    ids = [[1, 2, 3, 4, 5], [0, 7, 8]]
    assert groups.on_prefill(ids, 18, 18) == [1, 2, 3, 4, 5, 7, 8] and groups.tails(18) == (2,)
    assert groups.on_decode(ids, 18, 8) == ([3, 4, 5, 7, 8], (2,))


def test_block_lists_that_are_too_short_raise_nothing() -> None:
    """An exception inside the scheduler ends the engine."""
    groups = CacheGroups((SLIDING, FULL))
    assert groups.on_prefill([[], [1]], 18, 18) == [1]
    assert groups.on_decode([[], []], 18, 0) == ([], (0,))


def test_one_group_of_full_attention_is_transferred_whole() -> None:
    groups = CacheGroups((FULL,))
    assert (groups.loaded_tokens(10), groups.total(10), groups.tails(10), groups.have_tails) == (10, 3, (), False)
    assert CacheGroups((FULL, SLIDING)).loaded_tokens(10) == 9
