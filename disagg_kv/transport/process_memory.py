"""Reading another process's memory on Linux (``process_vm_readv``): IPC between CPU engines of one host.

The kernel allows it between processes of one user, unless Yama's ``kernel.yama.ptrace_scope`` forbids it. A prefill
engine with ``transport: ipc`` lifts level 1 for itself (``PR_SET_PTRACER``), as MPI libraries do.
"""

from __future__ import annotations

import ctypes
import errno
import os
import secrets
from collections.abc import Iterator, Sequence
from typing import Any

from disagg_kv.protocol.frames import WireError
from disagg_kv.transport.base import BlockCache
from disagg_kv.transport.ipc import NONCE_BYTES, check_nonce, read_nonce, read_planes

KIND = "process"
_MAX_VECTORS = 1024
"""IOV_MAX of Linux."""
_PR_SET_PTRACER, _ANY = 0x59616D61, ctypes.c_ulong(-1)


class _Vector(ctypes.Structure):
    """``struct iovec``."""

    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


def _library() -> Any:
    library = ctypes.CDLL(None, use_errno=True)
    library.process_vm_readv.restype = ctypes.c_ssize_t
    library.process_vm_readv.argtypes = (
        ctypes.c_int, ctypes.POINTER(_Vector), ctypes.c_ulong, ctypes.POINTER(_Vector), ctypes.c_ulong, ctypes.c_ulong,
    )  # fmt: skip
    return library


def why_unavailable() -> str:
    """Why this system has no ``process_vm_readv``; "" if it has."""
    return "" if hasattr(ctypes.CDLL(None), "process_vm_readv") else "this system has no process_vm_readv"


class ExportedProcessMemory:
    """Prefill's side: what decode needs to read the cache."""

    def __init__(self, cache: BlockCache) -> None:
        self._planes = [[0, address, stride] for address, stride in cache.addresses()]
        self._blocks = cache.num_blocks
        self._nonce = secrets.token_bytes(NONCE_BYTES)
        self._probe = ctypes.create_string_buffer(self._nonce, NONCE_BYTES)
        ctypes.CDLL(None).prctl(_PR_SET_PTRACER, _ANY, 0, 0, 0)  # fails without Yama, which is fine

    def describe(self) -> dict[str, Any]:
        """Fields of READY."""
        return {"kind": KIND, "pid": os.getpid(), "planes": self._planes, "blocks": self._blocks,
                "nonce": self._nonce.hex(), "probe": ctypes.addressof(self._probe)}  # fmt: skip


class ProcessMemoryReader:
    """See ``MemoryReader``. Copies are synchronous, so there is nothing to wait for at the end."""

    def __init__(self, cache: BlockCache, memory: dict[str, Any]) -> None:
        """Open the memory that READY describes.

        Raises:
            WireError: malformed fields.
            OSError: it cannot be read, or is another process's.
        """
        pid, probe = memory.get("pid"), memory.get("probe")
        if type(pid) is not int or not 0 < pid < 1 << 31 or type(probe) is not int or probe <= 0:
            raise WireError("prefill's process is missing or invalid")
        self._pid, self._row_bytes = pid, cache.row_bytes
        self._source = [(address, stride) for _, address, stride in read_planes(memory, cache.planes, 1)]
        self._target = cache.addresses()
        self._library = _library()
        found = ctypes.create_string_buffer(NONCE_BYTES)
        self._copy([(probe, ctypes.addressof(found), NONCE_BYTES)])
        check_nonce(found.raw, read_nonce(memory))

    def read(self, source: Sequence[int], target: Sequence[int], fence: Any, seconds: float) -> None:
        spans: list[tuple[int, int, int]] = []
        for span in self._spans(source, target):
            spans.append(span)
            if len(spans) == _MAX_VECTORS:
                self._copy(spans)
                spans = []
        if spans:
            self._copy(spans)

    def close(self) -> None:
        pass

    def _spans(self, source: Sequence[int], target: Sequence[int]) -> Iterator[tuple[int, int, int]]:
        """Yield (address there, address here, bytes), rows that follow each other on both sides joined."""
        size = self._row_bytes
        for (there, there_stride), (here, here_stride) in zip(self._source, self._target, strict=True):
            last: tuple[int, int, int] | None = None
            for one, other in zip(source, target, strict=True):
                start, end = there + one * there_stride, here + other * here_stride
                if last is not None and (last[0] + last[2], last[1] + last[2]) == (start, end):
                    last = (last[0], last[1], last[2] + size)
                    continue
                if last is not None:
                    yield last
                last = (start, end, size)
            if last is not None:
                yield last

    def _copy(self, spans: Sequence[tuple[int, int, int]]) -> None:
        there = (_Vector * len(spans))(*(_Vector(start, size) for start, _, size in spans))
        here = (_Vector * len(spans))(*(_Vector(start, size) for _, start, size in spans))
        count = self._library.process_vm_readv(self._pid, here, len(spans), there, len(spans), 0)
        if count == sum(size for _, _, size in spans):
            return
        # The kernel copies less where an address is invalid.
        number = ctypes.get_errno() if count < 0 else errno.EFAULT
        hint = " (another user, or kernel.yama.ptrace_scope)" if number == errno.EPERM else ""
        raise OSError(number, f"process_vm_readv: {os.strerror(number)}{hint}")
