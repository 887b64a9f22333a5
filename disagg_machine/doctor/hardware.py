"""Checks of GPUs and memory: they exist, what the engines will take is free, and how GPUs are connected."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from disagg_machine import gpus
from disagg_machine.commands import memory_share
from disagg_machine.doctor.machine import Machine
from disagg_machine.doctor.verdict import Verdict, error, ok, warning
from disagg_machine.gpus import Gpu
from disagg_machine.layout import Place

MIB = 1 << 20
BESIDE_MIB = 1024
"""What NCCL and CUDA want outside of vLLM's share of a GPU, about."""
STAGING_MIB = 3 * 64
"""Staging buffers of this project's connector, for each engine of the other role."""
SHM_MIB = 1024
OPEN_FILES = 4096


def check_gpus(machine: Machine) -> Iterator[Verdict]:
    """The GPUs that this user may use."""
    if machine.uses_gpus and machine.shares_gpu:
        yield warning("doc_shared_gpu", ", ".join(machine.layout.shared_gpus), machine.kv_cache_mib)
    elif len(machine.gpus) < 2:
        if machine.settings.engine == "vllm":
            yield error("too_few_gpus", len(machine.gpus))
        else:
            yield warning("doc_few_gpus", len(machine.gpus))
    for gpu in machine.gpus:
        yield ok("doc_gpu", gpu.index, gpu.name, gpu.free_mib, gpu.total_mib)


def check_gpu_memory(machine: Machine) -> Iterator[Verdict]:
    """For each engine: its GPUs exist, and what it will take of them is free."""
    if not machine.uses_gpus:
        return
    roles: dict[int, str] = {}
    thousandths: dict[int, int] = defaultdict(int)
    for place in machine.layout.engines:
        for word in place.gpus:
            gpu = gpus.find(machine.gpus, word)
            if gpu is None:
                yield error("no_such_gpu", word, place.name, gpus.indexes(machine.gpus))
                continue
            if roles.get(gpu.index, place.role) != place.role and not machine.shares_gpu:
                yield error("gpu_shared", gpu.index)
            roles[gpu.index] = place.role
            thousandths[gpu.index] += round(float(memory_share(machine.placed, place.role, machine.connector)) * 1000)
            wanted = gpu.total_mib * thousandths[gpu.index] // 1000
            yield _memory(machine, place, gpu, thousandths[gpu.index], wanted)
            if machine.own_connector:
                yield _staging(machine, place, gpu, gpu.total_mib - wanted)
            elif place.role == "decode":
                yield _kv_buffer(machine, place, gpu, gpu.total_mib - wanted)


def _memory(machine: Machine, place: Place, gpu: Gpu, thousandths: int, wanted: int) -> Verdict:
    """``wanted``: MiB of this engine and those before it on the same GPU."""
    if thousandths > 1000:
        return error("doc_gpu_over", gpu.index, thousandths // 10)
    part = machine.alive.get(place.name)
    if part is not None:
        return ok("part_runs", place.name, part.pid)
    if gpu.free_mib < wanted:
        return error("doc_gpu_busy", gpu.index, gpu.free_mib, wanted, place.name)
    return ok("doc_gpu_free", gpu.index, gpu.free_mib, wanted, place.name)


def _kv_buffer(machine: Machine, place: Place, gpu: Gpu, left: int) -> Verdict:
    """P2pNcclConnector keeps arrived KV outside of vLLM's share of the GPU."""
    wanted = machine.settings.kv_buffer_size.whole() // MIB + BESIDE_MIB
    if left < wanted:
        return error("doc_buffer_big", place.name, gpu.index, left, wanted)
    return ok("doc_buffer", place.name, gpu.index, left, wanted)


def _staging(machine: Machine, place: Place, gpu: Gpu, left: int) -> Verdict:
    """This project's connector stages KV outside of vLLM's share of the GPU."""
    layout = machine.layout
    peers = len(layout.decodes if place.role == "prefill" else layout.prefills)
    wanted = STAGING_MIB * peers + BESIDE_MIB
    if left < wanted:
        return warning("doc_staging_big", place.name, gpu.index, left, wanted)
    return ok("doc_staging", place.name, gpu.index, left, wanted)


def check_links(machine: Machine) -> Iterator[Verdict]:
    """For each pair of engines: how their first GPUs are connected, and whether each can access the other's memory."""
    if not machine.uses_gpus:
        return
    for prefill in machine.layout.prefills:
        for decode in machine.layout.decodes:
            source, target = (gpus.find(machine.gpus, place.gpus[0]) for place in (prefill, decode))
            if source and target and source != target:
                yield _link(prefill, decode, gpus.matrix_entry(machine.links, source.index, target.index))
                yield from _peer(prefill, decode, gpus.matrix_entry(machine.peers, source.index, target.index))


def _link(prefill: Place, decode: Place, link: str) -> Verdict:
    if link.startswith("NV"):
        return ok("doc_link_nvlink", prefill.name, decode.name, link)
    if link in ("PIX", "PXB", "PHB", "NODE", "SYS"):
        return warning("doc_link_pci", prefill.name, decode.name, link)
    return warning("doc_link_unknown", prefill.name, decode.name)


def _peer(prefill: Place, decode: Place, peer: str) -> Iterator[Verdict]:
    if peer == "OK":
        yield ok("doc_peer", prefill.name, decode.name)
    elif peer:
        yield warning("doc_no_peer", prefill.name, decode.name, peer)


def check_pinned_memory(machine: Machine) -> Iterator[Verdict]:
    """P2pNcclConnector's pinned pools: for each decode GPU MEM_POOL_SIZE_GB, rounded up to a power of two, for each
    prefill GPU 1 GiB."""
    if not machine.wants_vllm or machine.own_connector:
        return
    layout = machine.layout
    pool = 1 << (machine.settings.mem_pool_size_gb - 1).bit_length()
    wanted = layout.tensor_parallel * (len(layout.decodes) * pool + len(layout.prefills))
    if machine.available_gib < wanted:
        yield error("doc_pool_big", wanted, machine.available_gib)
    else:
        yield ok("doc_pool", wanted, machine.available_gib)


def check_disk(machine: Machine) -> Iterator[Verdict]:
    """Room for logs."""
    folder = machine.settings.log_dir
    free = machine.free_gib(folder)
    yield warning("doc_log_disk", folder) if free < 1 else ok("doc_disk", folder, free)


def check_limits(machine: Machine) -> Iterator[Verdict]:
    """Open files; shared memory where an engine has several ranks."""
    files = machine.open_files
    if files is not None and files < OPEN_FILES:
        yield warning("doc_files_low", files)
    else:
        yield ok("doc_files", "unlimited" if files is None else files)
    if machine.layout.tensor_parallel > 1 and machine.shm_mib < SHM_MIB:
        yield warning("doc_shm", machine.shm_mib)
