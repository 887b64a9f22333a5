"""Buffer, pool and their leaks, as vLLM 0.21 counts them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from disagg_sim.connectors.p2p_nccl_memory import BuddyPool, InsufficientMemory, KvTensor, ReceiveStore
from disagg_sim.prefix_cache import PrefixCache


def store(buffer: int, pool: int) -> ReceiveStore:
    return ReceiveStore(buffer, pool, 2, lambda: None)


def tensor(size: int) -> KvTensor:
    return KvTensor(b"", 1, size)


def test_blocks_are_powers_of_two_and_join_again() -> None:
    pool = BuddyPool(4096)
    first, second = pool.allocate(513), pool.allocate(2000)
    assert pool.used == 1024 + 2048
    with pytest.raises(InsufficientMemory):
        pool.allocate(2048)
    pool.free(first)
    pool.free(second)
    assert pool.used == 0
    assert pool.allocate(4096) == 0


def test_a_request_larger_than_the_pool_is_refused() -> None:
    with pytest.raises(InsufficientMemory):
        BuddyPool(4096).allocate(4097)


@given(st.lists(st.integers(1, 3000), max_size=40))
def test_blocks_never_overlap(sizes: list[int]) -> None:
    pool = BuddyPool(16_384)
    taken: dict[int, int] = {}
    for size in sizes:
        try:
            address = pool.allocate(size)
        except InsufficientMemory:
            pool.free(address := next(iter(taken)))
            del taken[address]
            continue
        block = max(512, 1 << (size - 1).bit_length())
        assert all(address + block <= other or other + length <= address for other, length in taken.items())
        taken[address] = block
    for address in taken:
        pool.free(address)
    assert pool.allocate(16_384) == 0


def test_the_buffer_first_then_the_pool_then_nothing() -> None:
    kv = store(buffer=100, pool=512)
    kv.put("a", 0, tensor(100))
    kv.put("b", 0, tensor(1))
    assert (kv.buffer_used, kv.pool.used) == (100, 512)
    with pytest.raises(InsufficientMemory):
        kv.put("c", 0, tensor(1))
    assert kv.waiting() == {"a": 100, "b": 1}


def test_loading_frees_the_buffer_and_finishing_frees_the_pool() -> None:
    kv = store(buffer=100, pool=512)
    kv.put("a", 0, tensor(100))
    kv.put("b", 0, tensor(7))
    kv.load("a", 0)
    kv.load("b", 0)
    assert (kv.buffer_used, kv.pool.used, kv.waiting()) == (0, 512, {})
    assert kv.has("a", 0)
    kv.release("a")
    kv.release("b")
    assert (kv.buffer_used, kv.pool.used, kv.has("a", 0)) == (0, 0, False)


def test_what_is_dropped_unloaded_stays_counted() -> None:
    kv = store(buffer=100, pool=512)
    kv.put("a", 0, tensor(60))
    kv.release("a")
    assert kv.buffer_used == 60


def test_a_replay_on_top_of_unused_kv_is_counted_twice() -> None:
    kv = store(buffer=100, pool=512)
    kv.put("a", 0, tensor(40))
    kv.put("a", 0, tensor(40))
    assert kv.load("a", 0).size == 40
    assert kv.buffer_used == 40


def test_releasing_what_is_not_there_is_harmless() -> None:
    kv = store(buffer=100, pool=512)
    kv.release("nobody")
    assert kv.waiting() == {}


def test_prefix_cache_counts_whole_blocks_and_never_the_last_token() -> None:
    cache = PrefixCache(10)
    prompt = list(range(40))
    assert cache.hits(prompt) == 0
    cache.add(prompt)
    assert cache.hits(prompt) == 32
    assert cache.hits(prompt[:32]) == 16
    assert cache.hits([*prompt[:16], 99, *prompt[17:]]) == 16
    assert cache.hits([1, *prompt]) == 0
    assert PrefixCache(0).hits(prompt) == 0


def test_prefix_cache_forgets_the_oldest() -> None:
    cache = PrefixCache(2)
    cache.add([1] * 32)
    cache.add([2] * 32)
    assert (cache.hits([1] * 33), cache.hits([2] * 33)) == (0, 32)
