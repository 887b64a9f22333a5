"""Shapes of vLLM's caches. Needs torch (without a GPU), which the connector always has and the proxy does not."""

from __future__ import annotations

import socket
import threading
from dataclasses import replace
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from disagg_kv.engine.fences import StepFence  # noqa: E402
from disagg_kv.engine.groups import CacheGroup, CacheGroups, Unsupported  # noqa: E402
from disagg_kv.engine.layout import TorchCache  # noqa: E402
from disagg_kv.transport.channel import Channel  # noqa: E402
from disagg_kv.transport.tcp import TcpTransport  # noqa: E402

BLOCKS = 10


def _numbered(*shape: int, dtype: Any = torch.float32) -> Any:
    return torch.arange(torch.Size(shape).numel()).reshape(shape).to(dtype)


SHAPES = {
    "FlashAttention 0.21": (lambda: _numbered(2, BLOCKS, 4, 3, 8), 2),
    "FlashAttention 0.21, HND": (lambda: _numbered(2, BLOCKS, 3, 4, 8).permute(0, 1, 3, 2, 4), 2),
    "FlashInfer": (lambda: _numbered(BLOCKS, 2, 4, 3, 8), 1),
    "FlashAttention 3 of 0.26": (lambda: _numbered(BLOCKS, 4, 3, 16).permute(0, 2, 1, 3), 1),
    "CPU 0.32": (lambda: _numbered(BLOCKS, 3, 4, 16), 1),
    "kernel blocks of half the size": (lambda: _numbered(2 * BLOCKS, 3, 2, 16), 1),
    "bf16": (lambda: _numbered(2, BLOCKS, 4, 3, 8, dtype=torch.bfloat16), 2),
    "odd bytes": (lambda: _numbered(BLOCKS, 3, 5, 7, dtype=torch.uint8), 1),
    "MLA, CPU 0.32": (lambda: _numbered(BLOCKS, 1, 4, 9), 1),
    "MLA, FlashMLA": (lambda: _numbered(BLOCKS, 4, 9), 1),
    "layers in one buffer": (lambda: _numbered(BLOCKS, 2, 3, 4, 16)[:, 1], 1),
}


def _block(tensor: Any, block: int) -> Any:
    """One block by the layout's own words, to compare with."""
    if tensor.shape[0] == 2:
        return tensor[:, block]
    fraction = tensor.shape[0] // BLOCKS
    return tensor[block * fraction : (block + 1) * fraction]


@pytest.mark.parametrize("name", SHAPES)
def test_blocks_move_from_one_cache_to_another(name: str) -> None:
    make, planes = SHAPES[name]
    layers = {f"layers.{number}": make() for number in (0, 1, 10, 2)}
    for number, tensor in enumerate(layers.values()):
        tensor.add_(number)
    empty = {layer: make().zero_() for layer in layers}
    source, target = TorchCache(layers, BLOCKS), TorchCache(empty, BLOCKS)
    assert source.planes == 4 * planes and source.layout == target.layout
    taken, placed = [7, 0, 3], [1, 9, 4]
    for plane in range(source.planes):
        buffer = source.buffer(3 * source.row_bytes)
        source.gather(plane, source.index(taken), buffer)
        target.scatter(plane, target.index(placed), buffer)
    for layer in layers:
        for one, other in zip(taken, placed, strict=True):
            assert torch.equal(_block(layers[layer], one), _block(empty[layer], other))
        assert not any(_block(empty[layer], other).any() for other in range(BLOCKS) if other not in placed)


def test_different_layouts_have_different_texts() -> None:
    texts = [TorchCache({"a": SHAPES[name][0]()}, BLOCKS).layout for name in list(SHAPES)[:6]]
    assert len(set(texts)) == len(texts)


def test_the_number_of_blocks_is_no_part_of_the_layout() -> None:
    one, other = TorchCache({"a": _numbered(5, 3, 4, 16)}, 5), TorchCache({"a": _numbered(50, 3, 4, 16)}, 50)
    assert one.layout == other.layout


def test_layers_that_share_a_tensor_count_once() -> None:
    tensor = _numbered(BLOCKS, 3, 4, 16)
    assert TorchCache({"a": tensor, "b": tensor}, BLOCKS).planes == 1


@pytest.mark.parametrize(
    ("layers", "word"),
    [
        ({}, "no layers"),
        ({"a": [torch.zeros(4), torch.zeros(4)]}, "not a tensor"),
        ({"a": torch.zeros(BLOCKS, 8)}, "unknown KV cache layout"),
        ({"a": torch.zeros(7, 3, 4)}, "no dimension of 10 blocks"),
        ({"a": torch.zeros(BLOCKS, 3, 4, 16), "b": torch.zeros(BLOCKS, 3, 4, 8)}, "different sizes"),
        ({"a": torch.zeros(BLOCKS, 3, 4, 16)[..., :8]}, "not contiguous"),
    ],
)
def test_what_cannot_be_moved_is_refused(layers: Any, word: str) -> None:
    with pytest.raises(Unsupported, match=word):
        TorchCache(layers, BLOCKS)


def test_a_block_outside_the_cache() -> None:
    cache = TorchCache({"a": _numbered(BLOCKS, 3, 4, 16)}, BLOCKS)
    for block in (-1, BLOCKS):
        with pytest.raises(IndexError):
            cache.index([block])


def test_what_the_tensors_do_not_show_is_part_of_the_layout() -> None:
    """An engine with another window computes other KV for the same tokens."""
    layers = {"a": _numbered(BLOCKS, 1, 4, 16)}
    kinds = [CacheGroups((CacheGroup(4, text),)) for text in ("", "MLA", "window 4", "window 8")]
    texts = {TorchCache(layers, BLOCKS, groups=groups).layout for groups in kinds}
    assert len(texts) == 4 and "(B*1,1,4,16):0123" in texts


def _shared(*windows: int) -> tuple[dict[str, Any], CacheGroups]:
    """Two layers of full attention and two of each window, as vLLM puts them on two tensors."""
    first, second = _numbered(BLOCKS, 1, 4, 16), _numbered(BLOCKS, 1, 4, 16)
    names = [(f"l.{number}", f"l.{number + 10}") for number in range(1 + len(windows))]
    layers = {name: tensor for pair in names for name, tensor in zip(pair, (first, second), strict=True)}
    return layers, CacheGroups(tuple(
        CacheGroup(4, f"sliding {window}" if window else "", pair, window)
        for window, pair in zip((0, *windows), names, strict=True)
    ))  # fmt: skip


def test_layers_of_several_groups_share_planes() -> None:
    layers, groups = _shared(8, 8)
    cache = TorchCache(layers, BLOCKS, groups=groups)
    assert cache.planes == 2 and cache.block_bytes == 2 * 256
    assert cache.writers == {(0, 1): {"l.0", "l.1", "l.2"}, (1, 2): {"l.10", "l.11", "l.12"}}
    assert {cache.layers[name] for name in cache.writers[0, 1]} == {(0, 1)}
    assert cache.layout.startswith("(B*1,1,4,16):0123 groups full/4 x2, sliding 8/4 x2, sliding 8/4 x2, layers ")


def _with_states() -> tuple[dict[str, Any], CacheGroups]:
    """A layer with states of 100 bytes and one of full attention on each of two parts of one storage."""
    memory, layers = _numbered(2 * BLOCKS, 32), {}
    for number in range(2):
        pages = memory[number * BLOCKS : (number + 1) * BLOCKS]
        layers[f"l.{number}"] = pages.view(torch.int8)[:, :100].unflatten(1, (1, 1, 100))
        layers[f"l.{number + 2}"] = pages.view(BLOCKS, 1, 4, 8)
    groups = (CacheGroup(4, "state", ("l.0", "l.1"), state=True, page_bytes=128),
              CacheGroup(4, "", ("l.2", "l.3"), page_bytes=128))  # fmt: skip
    return layers, CacheGroups(groups)


def test_states_are_moved_as_complete_pages() -> None:
    layers, groups = _with_states()
    empty = _with_states()[0]
    for tensor in empty.values():
        tensor.zero_()
    source, target = TorchCache(layers, BLOCKS, groups=groups), TorchCache(empty, BLOCKS, groups=groups)
    assert (source.planes, source.row_bytes, source.dtype) == (2, 128, "int8|float32")
    assert source.layout == target.layout and "state/4 x2, full/4 x2" in source.layout
    for plane in range(2):
        buffer = source.buffer(2 * source.row_bytes)
        source.gather(plane, source.index([3, 7]), buffer)
        target.scatter(plane, target.index([5, 1]), buffer)
    for name in layers:
        assert torch.equal(layers[name][[3, 7]], empty[name][[5, 1]])
        assert not empty[name][[0, 2, 3, 4, 6, 7, 8, 9]].any()


def test_pages_that_do_not_fit_are_refused() -> None:
    layers, groups = _with_states()
    state, full = groups.groups
    for sizes, word in (((136, 136), "do not fit"), ((128, 64), "different sizes")):
        pages = (replace(one, page_bytes=size) for one, size in zip((state, full), sizes, strict=True))
        with pytest.raises(Unsupported, match=word):
            TorchCache(layers, BLOCKS, groups=CacheGroups(tuple(pages)))
    short = torch.zeros(BLOCKS * 128 - 20, dtype=torch.int8).as_strided((BLOCKS, 1, 1, 100), (128, 100, 100, 1))
    with pytest.raises(Unsupported, match="outside the cache"):
        TorchCache({"l.0": short}, BLOCKS, groups=groups)


def test_other_windows_or_other_layers_in_a_group_make_another_layout() -> None:
    layers, groups = _shared(8)
    full, sliding = groups.groups
    others = [_shared(16)[1], CacheGroups((sliding, full)),
              CacheGroups((CacheGroup(4, "", sliding.layers), CacheGroup(4, "sliding 8", full.layers, 8)))]  # fmt: skip
    texts = {TorchCache(layers, BLOCKS, groups=one).layout for one in [groups, *others]}
    assert len(texts) == 4 and TorchCache(layers, BLOCKS, groups=_shared(8)[1]).layout in texts


@pytest.mark.parametrize("staging", [256, 700, 1 << 20])
def test_the_tcp_transport(staging: int) -> None:
    source = TorchCache({f"l.{n}": _numbered(BLOCKS, 1, 4, 16) * (n + 1) for n in range(3)}, BLOCKS)
    tensors = {f"l.{n}": torch.zeros(BLOCKS, 1, 4, 16) for n in range(3)}
    target = TorchCache(tensors, BLOCKS)
    with socket.create_server(("127.0.0.1", 0)) as server:
        one, two = Channel(socket.create_connection(server.getsockname()), 10), Channel(server.accept()[0], 10)
    fence = StepFence(source.planes)
    sender = threading.Thread(target=TcpTransport(one, source, staging).send, args=([2, 5, 8, 1], fence, True))
    sender.start()
    for plane in range(source.planes):
        fence.layer(plane, plane + 1, None)
    TcpTransport(two, target, staging).receive([0, 1, 2, 3], 4, None, True)
    sender.join(20)
    for number in range(3):
        want = (_numbered(BLOCKS, 1, 4, 16) * (number + 1))[[2, 5, 8, 1]]
        assert torch.equal(tensors[f"l.{number}"][:4], want)
    one.close()
    two.close()


@pytest.mark.parametrize("staging", [1, 40])
def test_warming_up_changes_nothing_in_the_cache(staging: int) -> None:
    """Also where a staging buffer has room for one row only."""
    tensor = _numbered(BLOCKS, 3, 4, 16)
    cache, before = TorchCache({"layers.0": tensor}, BLOCKS), tensor.clone()
    first, second = cache.buffer(staging * cache.row_bytes), cache.buffer(staging * cache.row_bytes)
    second.zero_()
    cache.warm(first, second)
    assert torch.equal(tensor, before)
    assert torch.equal(second[: cache.row_bytes].view(torch.float32), before[0].flatten())
