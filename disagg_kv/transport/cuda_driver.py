"""The few functions of CUDA's driver (libcuda.so.1) that torch does not offer: IPC handles and device identity.

The driver's interface is used instead of torch's ``UntypedStorage._share_cuda_``: it tells beforehand whether an
allocation can be shared (not with expandable segments, nor with vLLM's allocator for sleep mode), keeps no files for
reference counts, which a killed engine would leave behind, and unmaps at a defined moment.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

HANDLE_BYTES = 64
_LAZY_PEER_ACCESS = 1
_IS_IPC_CAPABLE = 10
"""CU_POINTER_ATTRIBUTE_IS_LEGACY_CUDA_IPC_CAPABLE."""


class CudaError(RuntimeError):
    """A call of the driver failed; the text has its name and the error's."""


class _Handle(ctypes.Structure):
    """``CUipcMemHandle``."""

    _fields_ = (("data", ctypes.c_ubyte * HANDLE_BYTES),)


@functools.cache
def _library() -> Any:
    library = ctypes.CDLL("libcuda.so.1")
    library.cuIpcOpenMemHandle_v2.argtypes = (ctypes.POINTER(ctypes.c_uint64), _Handle, ctypes.c_uint)
    library.cuIpcGetMemHandle.argtypes = (ctypes.POINTER(_Handle), ctypes.c_uint64)
    library.cuIpcCloseMemHandle.argtypes = (ctypes.c_uint64,)
    library.cuMemGetAddressRange_v2.argtypes = (
        ctypes.POINTER(ctypes.c_uint64), ctypes.POINTER(ctypes.c_size_t), ctypes.c_uint64,
    )  # fmt: skip
    library.cuPointerGetAttribute.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_uint64)
    return library


def _call(name: str, *arguments: Any) -> None:
    code = getattr(_library(), name)(*arguments)
    if code:
        text = ctypes.c_char_p()
        _library().cuGetErrorName(code, ctypes.byref(text))
        raise CudaError(f"{name}: {(text.value or str(code).encode()).decode()}")


def use_device(number: int) -> None:
    """Make the context that CUDA's runtime uses for this device current in this thread, unless one is.

    The runtime does so at a thread's first call, which torch may avoid.
    """
    context, device = ctypes.c_void_p(), ctypes.c_int()
    _call("cuCtxGetCurrent", ctypes.byref(context))
    if context.value:
        return
    _call("cuDeviceGet", ctypes.byref(device), number)
    _call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
    _call("cuCtxSetCurrent", context)


def allocation_of(address: int) -> tuple[int, int]:
    """Return address and size in bytes of the allocation that contains ``address``."""
    base, size = ctypes.c_uint64(), ctypes.c_size_t()
    _call("cuMemGetAddressRange_v2", ctypes.byref(base), ctypes.byref(size), address)
    return base.value, size.value


def can_share(address: int) -> bool:
    """Whether the allocation may be opened by other processes: it was made by ``cudaMalloc``."""
    value = ctypes.c_uint64()
    _call("cuPointerGetAttribute", ctypes.byref(value), _IS_IPC_CAPABLE, address)
    return value.value & 0xFF != 0


def share(base: int) -> bytes:
    """Return the handle of an allocation for other processes."""
    handle = _Handle()
    _call("cuIpcGetMemHandle", ctypes.byref(handle), base)
    return bytes(handle.data)


def open_handle(handle: bytes) -> int:
    """Map another process's allocation; return its address here. ``close_handle`` must follow."""
    value, address = _Handle(), ctypes.c_uint64()
    ctypes.memmove(ctypes.byref(value), handle, HANDLE_BYTES)
    _call("cuIpcOpenMemHandle_v2", ctypes.byref(address), value, _LAZY_PEER_ACCESS)
    return address.value


def close_handle(address: int) -> None:
    """Unmap. Until then the memory of a prefill engine that has ended is not free."""
    _call("cuIpcCloseMemHandle", address)


def current_gpu() -> tuple[str, bool]:
    """Return the UUID of the GPU or MIG partition that this thread uses, and whether it is a partition."""
    device, name, uuid = ctypes.c_int(), ctypes.create_string_buffer(256), (ctypes.c_ubyte * 16)()
    _call("cuCtxGetDevice", ctypes.byref(device))
    _call("cuDeviceGetName", name, len(name), device)
    _call("cuDeviceGetUuid_v2", ctypes.byref(uuid), device)
    return f"GPU-{bytes(uuid).hex()}", b" MIG " in name.value
