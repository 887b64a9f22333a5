"""Layouts of vLLM's KV cache: every supported one becomes a list of planes of equal rows.

Known layouts: (blocks, heads, block_size, 2 * head_dim), FlashAttention 3 of 0.26 and CPU of 0.32, one plane per
layer; (2, blocks, block_size, heads, head_dim), FlashAttention of 0.21, two planes; (blocks, 2, block_size, heads,
head_dim), FlashInfer, one plane. Any strides are supported as long as the bytes of one block in a plane are
contiguous. Where a kernel's block is a fraction of the manager's block, its rows are joined.

(blocks, 1, block_size, width) or (blocks, block_size, width), MLA, one plane.

Layers of several cache groups (``groups``) share their tensors: a plane belongs to one layer of each group, and a block
to one group at a time. With recurrent states layers have different forms; a row is a complete page as bytes then, with
the padding that makes pages of all groups equally long. Anything else is rejected with ``Unsupported``.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from disagg_kv.engine.fences import StepFence
from disagg_kv.engine.groups import CacheGroups, Unsupported

_ROWS_OF_KERNELS = (1, 32)
"""torch has one index_select kernel for up to 16 rows and another for more."""
_STEP_SECONDS = 60.0
"""How long a sender waits for a layer of a running step before it gives up."""


def planes_of(name: str, tensor: torch.Tensor, num_blocks: int) -> list[torch.Tensor]:
    """Return views of one layer's cache, each (num_blocks, elements of a block) with contiguous rows.

    Raises:
        Unsupported: the layout is unknown.
    """
    if tensor.dim() < 3:
        raise Unsupported(f"{name}: unknown KV cache layout of shape {tuple(tensor.shape)}")
    dim = next((dim for dim in (0, 1) if tensor.shape[dim] % num_blocks == 0 and tensor.shape[dim] > 2), None)
    if dim is None or (dim == 1 and tensor.shape[0] != 2):
        raise Unsupported(f"{name}: the shape has no dimension of {num_blocks} blocks: {tuple(tensor.shape)}")
    parts = [tensor] if dim == 0 else [tensor[0], tensor[1]]
    return [_rows(name, part, num_blocks) for part in parts]


def _rows(name: str, tensor: torch.Tensor, num_blocks: int) -> torch.Tensor:
    fraction = tensor.shape[0] // num_blocks
    split = tensor.unflatten(0, (num_blocks, fraction))
    inner = sorted(zip(split.stride()[1:], split.shape[1:], strict=True))
    expected = 1
    for stride, size in inner:
        if size != 1 and stride != expected:
            raise Unsupported(f"{name}: a block is not contiguous (shape {tuple(tensor.shape)}, "
                              f"strides {tensor.stride()})")  # fmt: skip
        expected *= size
    return split.as_strided((num_blocks, expected), (split.stride(0), 1))


def _pages(name: str, tensor: torch.Tensor, num_blocks: int, page_bytes: int) -> torch.Tensor:
    """Return a view of the pages of one layer's cache as bytes, (num_blocks, page_bytes): also what is behind its own.

    Raises:
        Unsupported: the first dimension is not that of blocks, or pages overlap or end outside the cache.
    """
    size, memory = tensor.element_size(), tensor.untyped_storage()
    stride, offset = tensor.stride(0) * (tensor.shape[0] // num_blocks) * size, tensor.storage_offset() * size
    if tensor.shape[0] % num_blocks or stride < page_bytes:
        raise Unsupported(f"{name}: pages of {page_bytes} bytes do not fit (shape {tuple(tensor.shape)}, "
                          f"strides {tensor.stride()}, {num_blocks} blocks)")  # fmt: skip
    if offset + (num_blocks - 1) * stride + page_bytes > memory.nbytes():
        raise Unsupported(f"{name}: the last page ends outside the cache")
    rows = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    return rows.set_(memory, offset, (num_blocks, page_bytes), (stride, 1))


def describe(name: str, tensor: torch.Tensor, num_blocks: int) -> str:
    """Describe a layout: sizes and their order in memory, without the number of blocks.

    Equal for two engines exactly when the bytes of a block have the same meaning.
    """
    order = sorted(range(tensor.dim()), key=lambda dim: (-tensor.stride(dim), dim))
    block_dim = 0 if tensor.shape[0] % num_blocks == 0 and tensor.shape[0] > 2 else 1
    sizes = [str(size) for size in tensor.shape]
    sizes[block_dim] = f"B*{tensor.shape[block_dim] // num_blocks}"
    return f"({','.join(sizes)}):{''.join(map(str, order))}"


class TorchCache:
    """The registered KV cache of one rank; see ``BlockCache``."""

    def __init__(
        self,
        layers: Mapping[str, torch.Tensor],
        num_blocks: int,
        widest: torch.dtype = torch.int64,
        groups: CacheGroups | None = None,
    ) -> None:
        """Args:
            layers: as vLLM registers them; layers of one group that share one tensor count once.
            widest: dtype as which bytes are copied, where they are aligned to it.
            groups: the cache groups; their text is part of the layout. None: one of plain full attention.

        Raises:
            Unsupported: see the module.
        """
        group_of = {
            name: number for number, group in enumerate(groups.groups if groups else ()) for name in group.layers
        }
        unique: dict[int, tuple[str, torch.Tensor]] = {}
        writers: dict[int, dict[int, str]] = {}
        for name in sorted(layers, key=_by_number):
            tensor = layers[name]
            if not isinstance(tensor, torch.Tensor):
                raise Unsupported(f"{name}: the cache is a {type(tensor).__name__}, not a tensor (a hybrid model?)")
            unique.setdefault(tensor.data_ptr(), (name, tensor))
            writers.setdefault(tensor.data_ptr(), {}).setdefault(group_of.get(name, 0), name)
        if not unique:
            raise Unsupported("there are no layers with a KV cache")
        forms = list(unique.values())
        if groups and groups.have_states:
            sizes = {group.page_bytes for group in groups.groups}
            planes = [_pages(name, tensor, num_blocks, max(sizes)) for name, tensor in forms]
            forms = [(name, layers[name]) for name in sorted(layers, key=_by_number)]
        else:
            planes = [plane for name, tensor in forms for plane in planes_of(name, tensor, num_blocks)]
            sizes = {plane.shape[1] * plane.element_size() for plane in planes}
        texts = list(dict.fromkeys(describe(name, tensor, num_blocks) for name, tensor in forms))
        if len(sizes) != 1:
            raise Unsupported(f"layers have blocks of different sizes ({sorted(sizes)} bytes)")
        (self.row_bytes,) = sizes
        self.num_blocks = num_blocks
        self.planes = len(planes)
        per_layer = self.planes // len(unique)
        self.layers: dict[str, tuple[int, int]] = {}
        """First plane of each layer that writes it, and the one after its last."""
        self.writers: dict[tuple[int, int], frozenset[str]] = {}
        """Layers that write the same planes: one of each cache group."""
        for number, pointer in enumerate(unique):
            place = (number * per_layer, (number + 1) * per_layer)
            self.writers[place] = frozenset(writers[pointer].values())
            self.layers |= dict.fromkeys(self.writers[place], place)
        self.block_bytes = self.row_bytes * self.planes
        text = groups.text if groups else ""
        if groups and groups.have_tails:
            text += f", layers {_digest(self.layers, group_of)}"
        self.layout = "|".join(texts) + (f" {text}" if text else "")
        self.dtype = "|".join(dict.fromkeys(str(tensor.dtype).removeprefix("torch.") for _, tensor in forms))
        self.device = planes[0].device
        self.on_gpu = self.device.type == "cuda"
        self._planes = [_as_wide(plane, widest) for plane in planes]

    def index(self, blocks: Sequence[int]) -> torch.Tensor:
        if blocks and not 0 <= min(blocks) <= max(blocks) < self.num_blocks:
            raise IndexError(f"a block outside the cache of {self.num_blocks} blocks")
        return torch.tensor(blocks, dtype=torch.int64).to(self.device)

    def gather(self, plane: int, index: torch.Tensor, out: torch.Tensor) -> None:
        rows = self._planes[plane]
        torch.index_select(rows, 0, index, out=out.view(rows.dtype).view(len(index), rows.shape[1]))

    def scatter(self, plane: int, index: torch.Tensor, rows: torch.Tensor) -> None:
        self._scatter(self._planes[plane], index, rows)

    def _scatter(self, target: torch.Tensor, index: torch.Tensor, rows: torch.Tensor) -> None:
        target.index_copy_(0, index, rows.view(target.dtype).view(len(index), target.shape[1]))

    def warm(self, first: torch.Tensor, second: torch.Tensor) -> None:
        """Run the kernels of ``gather`` and ``scatter`` once, between these buffers; the cache is only read."""
        for count in _ROWS_OF_KERNELS:
            size = count * self.row_bytes
            if size <= min(len(first), len(second)):
                index = self.index([0] * count)
                self.gather(0, index, first[:size])
                self._scatter(second[:size].view(self._planes[0].dtype).view(count, -1), index, first[:size])

    def addresses(self) -> list[tuple[int, int]]:
        return [(plane.data_ptr(), plane.stride(0) * plane.element_size()) for plane in self._planes]

    def rows_in(self, region: torch.Tensor, offset: int, stride: int, count: int) -> torch.Tensor:
        """Return rows of a plane of another engine's cache, which lies in ``region``, a tensor of bytes."""
        return _as_wide(region.as_strided((count, self.row_bytes), (stride, 1), offset), torch.int64)

    def take(self, rows: torch.Tensor, index: torch.Tensor, out: torch.Tensor) -> None:
        """Copy some of the ``rows`` of ``rows_in`` into ``out``, as ``gather`` does with rows of this cache."""
        torch.index_select(rows, 0, index, out=out.view(rows.dtype).view(len(index), rows.shape[1]))

    def take_into(self, rows: torch.Tensor, index: torch.Tensor, plane: int, first: int) -> bool:
        """Copy some of the ``rows`` of ``rows_in`` to the adjacent rows of a plane from ``first`` on, without a buffer.

        False if that is impossible here.
        """
        target = self._planes[plane][first : first + len(index)]
        if target.dtype != rows.dtype or not target.is_contiguous():
            return False
        torch.index_select(rows, 0, index, out=target)
        return True

    def buffer(self, size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.uint8, device=self.device)

    def new_stream(self) -> Any:
        return torch.cuda.Stream(self.device) if self.on_gpu else None

    def on_stream(self, stream: Any) -> AbstractContextManager[Any]:
        return torch.cuda.stream(stream) if stream is not None else contextlib.nullcontext()

    def mark(self) -> Any:
        """Record a CUDA event after all work enqueued so far on the calling thread's stream; None on a CPU."""
        if not self.on_gpu:
            return None
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        return event

    def wait(self, fence: Any) -> None:
        """Make later work on the current stream wait for the event."""
        if fence is not None:
            torch.cuda.current_stream(self.device).wait_event(fence)

    def layered(self, fence: StepFence) -> bool:
        return not fence.finished

    def join(self, fence: StepFence, planes: int) -> None:
        mark = fence.wait(planes, _STEP_SECONDS)
        if mark is not None:
            mark.synchronize()

    def synchronize(self) -> None:
        if self.on_gpu:
            torch.cuda.current_stream(self.device).synchronize()


def _as_wide(plane: torch.Tensor, widest: torch.dtype) -> torch.Tensor:
    """View the same bytes as the widest dtype that fits: the copy kernels move fewer elements."""
    for dtype in (widest, torch.int64, torch.int32, torch.int16):
        size = dtype.itemsize
        places = (plane.shape[1] * plane.element_size(), plane.stride(0) * plane.element_size(), plane.data_ptr())
        if size >= plane.element_size() and not any(place % size for place in places):
            return plane.view(dtype)
    return plane.view(torch.uint8)


def _digest(layers: Mapping[str, tuple[int, int]], groups: Mapping[str, int]) -> str:
    """Return 8 digits that are equal where each group has the same layers, in the same planes."""
    places = sorted((name, groups.get(name, 0), *place) for name, place in layers.items())
    return hashlib.sha256(repr(places).encode()).hexdigest()[:8]


def _by_number(name: str) -> tuple[Any, ...]:
    """Sort key for layer names in the model's order: digits compare as numbers."""
    parts: Iterable[str] = name.split(".")
    return tuple((0, int(part), "") if part.isdigit() else (1, 0, part) for part in parts)
