"""CUDA IPC with torch on a CPU and a stand-in for libcuda: what is shared, mapped, copied, refused, and unmapped.

Needs torch, without a GPU. On a real GPU bench/gpu_shared runs it.
"""

from __future__ import annotations

import contextlib
import ctypes
from dataclasses import replace
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from disagg_kv.engine.layout import TorchCache  # noqa: E402
from disagg_kv.protocol.frames import MAX_FRAME, Kind, WireError, encode  # noqa: E402
from disagg_kv.protocol.handshake import Identity  # noqa: E402
from disagg_kv.settings import Settings  # noqa: E402
from disagg_kv.trace import Trace  # noqa: E402
from disagg_kv.transport import cuda_driver  # noqa: E402
from disagg_kv.transport.cuda_memory import CannotShare, CudaMemoryReader, ExportedCudaMemory  # noqa: E402
from disagg_kv.transport.factory import RankContext, set_up_ipc  # noqa: E402
from tests.kv.memory import SHAPE  # noqa: E402

BLOCKS = 10


class Driver:
    """libcuda of a process whose allocations are tensors on the CPU; a handle is the address of one."""

    def __init__(self) -> None:
        self.allocations: dict[int, int] = {}
        self.open: list[int] = []
        self.capable, self.fails = True, ""
        self.context: int | None = None
        self.name = b"NVIDIA H200"

    def own(self, *tensors: Any) -> None:
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self.allocations[storage.data_ptr()] = storage.nbytes()

    def cuCtxGetCurrent(self, context: Any) -> int:  # noqa: N802
        context._obj.value = self.context
        return 0

    def cuDeviceGet(self, device: Any, number: int) -> int:  # noqa: N802
        device._obj.value = number
        return 0

    def cuDevicePrimaryCtxRetain(self, context: Any, device: Any) -> int:  # noqa: N802
        context._obj.value = 4711 + device.value
        return 0

    def cuCtxSetCurrent(self, context: Any) -> int:  # noqa: N802
        self.context = context.value
        return 0

    def cuCtxGetDevice(self, device: Any) -> int:  # noqa: N802
        device._obj.value = 0
        return 0

    def cuDeviceGetName(self, name: Any, size: int, device: Any) -> int:  # noqa: N802
        name.value = self.name
        return 0

    def cuDeviceGetUuid_v2(self, uuid: Any, device: Any) -> int:  # noqa: N802
        uuid._obj[:] = list(range(0x1A, 0x2A))
        return 0

    def cuGetErrorName(self, code: int, text: Any) -> int:  # noqa: N802
        ctypes.cast(text, ctypes.POINTER(ctypes.c_char_p))[0] = b"CUDA_ERROR_MAP_FAILED"
        return 0

    def cuMemGetAddressRange_v2(self, base: Any, size: Any, address: int) -> int:  # noqa: N802
        for start, length in self.allocations.items():
            if start <= address < start + length:
                base._obj.value, size._obj.value = start, length
                return 0
        base._obj.value, size._obj.value = address, 4096
        return 0

    def cuPointerGetAttribute(self, value: Any, attribute: int, address: int) -> int:  # noqa: N802
        assert attribute == 10
        value._obj.value = int(self.capable)
        return 0

    def cuIpcGetMemHandle(self, handle: Any, base: int) -> int:  # noqa: N802
        ctypes.memmove(handle, base.to_bytes(64, "little"), 64)
        return 1 if self.fails == "share" else 0

    def cuIpcOpenMemHandle_v2(self, address: Any, handle: Any, flags: int) -> int:  # noqa: N802
        assert flags == 1
        address._obj.value = int.from_bytes(bytes(handle.data), "little")
        self.open.append(address._obj.value)
        return 1 if self.fails == "open" else 0

    def cuIpcCloseMemHandle(self, address: int) -> int:  # noqa: N802
        self.open.remove(address)
        return 0


class _Event:
    def record(self, stream: Any) -> None: ...

    def query(self) -> bool:
        return True


class _Stream:
    def __init__(self, *arguments: Any, **options: Any) -> None: ...

    def synchronize(self) -> None: ...


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    one = Driver()
    monkeypatch.setattr(cuda_driver, "_library", lambda: one)
    for name, value in (("set_device", lambda device: None), ("synchronize", lambda device: None),
                        ("Stream", _Stream), ("stream", lambda stream: contextlib.nullcontext()),
                        ("Event", _Event)):  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    return one


def _layers(joint: bool, dtype: Any = torch.bfloat16) -> dict[str, Any]:
    """Two layers, in one allocation or in one each."""
    if not joint:
        return {f"layers.{n}": torch.rand(BLOCKS, 2, 8, 16).to(dtype) for n in range(2)}
    both = torch.rand(2, BLOCKS, 2, 8, 16).to(dtype)
    return {"layers.0": both[0], "layers.1": both[1]}


@pytest.mark.parametrize("target_blocks", [[1, 2, 8, 0, 5], [4, 5, 6, 7, 8]])
@pytest.mark.parametrize("scratch", [3, 64])
@pytest.mark.parametrize("joint", [True, False])
def test_blocks_are_copied_out_of_the_mapped_memory(
    driver: Driver, joint: bool, scratch: int, target_blocks: list[int]
) -> None:
    theirs, mine = _layers(joint), _layers(False)
    driver.own(*theirs.values())
    source, target = TorchCache(theirs, BLOCKS), TorchCache(mine, BLOCKS)
    before = {name: layer.clone() for name, layer in mine.items()}
    exported = ExportedCudaMemory(source)
    memory = exported.describe()
    assert len(memory["regions"]) == (2 if joint else 3), "the last one has the nonce"
    reader = CudaMemoryReader(target, memory, scratch * source.row_bytes)
    reader.read([7, 0, 3, 9, 4], target_blocks, None, 5.0)
    for name, layer in mine.items():
        for one, other in zip([7, 0, 3, 9, 4], target_blocks, strict=True):
            assert torch.equal(theirs[name][one], layer[other])
        for block in set(range(BLOCKS)) - set(target_blocks):
            assert torch.equal(before[name][block], layer[block])
    assert len(driver.open) == len(memory["regions"])
    assert driver.context == 4711, "the thread had none"
    reader.close()
    reader.close()
    assert driver.open == []


def test_what_is_not_of_cuda_malloc_cannot_be_shared(driver: Driver) -> None:
    layers = _layers(True)
    driver.own(*layers.values())
    driver.capable = False
    with pytest.raises(CannotShare, match="expandable segments or sleep mode"):
        ExportedCudaMemory(TorchCache(layers, BLOCKS))
    driver.capable, driver.fails = True, "share"
    with pytest.raises(CannotShare, match="cuIpcGetMemHandle: CUDA_ERROR_MAP_FAILED"):
        ExportedCudaMemory(TorchCache(layers, BLOCKS))


def test_memory_that_cannot_be_mapped(driver: Driver) -> None:
    layers = _layers(False)
    driver.own(*layers.values())
    cache = TorchCache(layers, BLOCKS)
    exported = ExportedCudaMemory(cache)
    memory = exported.describe()
    driver.fails = "open"
    with pytest.raises(cuda_driver.CudaError, match="cuIpcOpenMemHandle_v2"):
        CudaMemoryReader(cache, memory, 1 << 16)


@pytest.mark.parametrize("capable", [True, False])
@pytest.mark.parametrize("role", ["kv_producer", "kv_consumer", "kv_both"])
def test_an_engine_finds_out_whether_it_can_use_ipc(driver: Driver, role: str, capable: bool) -> None:
    layers = _layers(True)
    driver.own(*layers.values())
    driver.capable, driver.name = capable, b"NVIDIA H200 MIG 1g.18gb"
    cache = TorchCache(layers, BLOCKS)
    cache.on_gpu = True
    context = RankContext(Identity("prefill", "boot", 0, SHAPE), Settings(), cache, Trace(""))
    if role != "kv_producer":
        context.identity = replace(context.identity, role="decode")
    set_up_ipc(context, offers=role != "kv_consumer")
    # What a kv_both engine serves with; see ConnectorWorker.register.
    serving = replace(context, identity=replace(context.identity, role="prefill"))
    assert ("ipc" in serving.transports()) is (role != "kv_consumer" and capable)
    assert context.place.gpu == "GPU-1a1b1c1d1e1f20212223242526272829" and context.place.partition
    if role != "kv_consumer" and not capable:
        assert "sleep mode" in context.place.without["ipc"] and context.memory is None
        assert context.transports() == ["nccl", "tcp"]
    else:
        assert context.transports() == ["nccl", "ipc", "tcp"]
        assert (context.memory is not None) is (role != "kv_consumer")


@pytest.mark.parametrize(("change", "error"), [
    ({"nonce": "00" * 16}, ConnectionError),
    ({"blocks": BLOCKS * 1000}, WireError),
    ({"regions": []}, WireError), ({"regions": [["zz", 4096]] * 3}, WireError),
    ({"regions": [["00", 9]] * 3}, WireError),
    ({"regions": [5, 6, 7]}, WireError), ({"probe": [9, 0]}, WireError), ({"probe": [0, -1]}, WireError),
    ({"probe": [0, 1 << 40]}, WireError), ({"probe": None}, WireError), ({"planes": [[0, 1 << 40, 8]] * 2}, WireError),
])  # fmt: skip
def test_a_bad_description_is_refused_and_nothing_stays_mapped(
    driver: Driver, change: dict[str, Any], error: type[Exception]
) -> None:
    layers = _layers(False)
    driver.own(*layers.values())
    cache = TorchCache(layers, BLOCKS)
    exported = ExportedCudaMemory(cache)
    memory = exported.describe() | change
    with pytest.raises(error):
        CudaMemoryReader(cache, memory, 1 << 16)
    assert driver.open == []


def test_the_description_of_a_large_model_fits_into_a_message(driver: Driver) -> None:
    layers = {f"layers.{n}": torch.zeros(2, BLOCKS, 2, 8, 16) for n in range(160)}
    driver.own(*layers.values())
    memory = ExportedCudaMemory(TorchCache(layers, BLOCKS)).describe()
    assert len(memory["planes"]) == 320
    assert len(encode(Kind.READY, {"transport": "ipc", "memory": memory})) < MAX_FRAME
