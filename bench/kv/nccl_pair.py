"""Two processes on two GPUs: bytes per second of a bare ncclSend/ncclRecv, and of this connector's NCCL transport.

    python -m bench.kv.nccl_pair [--tokens 8000] [--layers 36] > result.json

Needs torch with CUDA, vLLM (for its NCCL wrapper) and two GPUs; takes about a minute. The transport moves blocks with
random ids between two caches of the given shape, in both layouts that vLLM has had; what arrives is compared with what
was sent. A last case lets the sender disappear: the receiver has to come back with an error.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import socket
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

BLOCK, HEADS, WIDTH = 16, 8, 128


def _layers(shape: str, layers: int, blocks: int, seed: int) -> dict[str, Any]:
    """A cache of Qwen3-4B's kind; "split": FlashAttention of 0.21, "joined": FlashAttention 3 of 0.26."""
    import torch

    generator = torch.Generator("cuda").manual_seed(seed)
    result = {}
    for layer in range(layers):
        size = (2, blocks, BLOCK, HEADS, WIDTH) if shape == "split" else (blocks, BLOCK, HEADS, 2 * WIDTH)
        tensor = torch.randn(size, device="cuda", dtype=torch.bfloat16, generator=generator)
        result[f"model.layers.{layer}.attn"] = tensor if shape == "split" else tensor.permute(0, 2, 1, 3)
    return result


def _bare(rank: int, unique_id: bytes, pipe: Connection, total: int, chunk: int) -> dict[str, Any]:
    """The same bytes in chunks of the same size, straight from one buffer into another."""
    import torch
    from vllm.distributed.device_communicators.pynccl_wrapper import (
        NCCLLibrary,
        buffer_type,
        cudaStream_t,
        ncclDataTypeEnum,
    )

    nccl = NCCLLibrary()
    comm = nccl.ncclCommInitRank(2, nccl.unique_id_from_bytes(unique_id), rank)
    stream, buffer = torch.cuda.Stream(), torch.ones(chunk, dtype=torch.uint8, device="cuda")
    move = nccl.ncclSend if rank == 0 else nccl.ncclRecv
    times = []
    for _ in range(8):
        torch.cuda.synchronize()
        _meet(pipe)
        start = time.perf_counter()
        for at in range(0, total, chunk):
            move(buffer_type(buffer.data_ptr()), min(chunk, total - at), ncclDataTypeEnum.ncclUint8, 1 - rank, comm,
                 cudaStream_t(stream.cuda_stream))  # fmt: skip
        stream.synchronize()
        times.append(time.perf_counter() - start)
    nccl.ncclCommDestroy(comm)
    return {"ms": [round(value * 1e3, 2) for value in times], "gb_per_s": round(total / min(times[2:]) / 1e9, 1)}


def _silent(seconds: float = 600) -> Any:
    """An idle control connection, which the other side closes after some seconds."""
    from disagg_kv.transport.channel import Channel

    with socket.create_server(("127.0.0.1", 0)) as server:
        channel = Channel(socket.create_connection(server.getsockname()), 5)
        other, _ = server.accept()
    timer = threading.Timer(seconds, other.close)
    timer.daemon = True
    timer.start()
    return channel


def _passed(cache: Any) -> Any:
    from disagg_kv.engine.fences import StepFence

    fence = StepFence(cache.planes)
    fence.finish(cache.mark())
    return fence


def _meet(pipe: Connection) -> None:
    pipe.send("here")
    pipe.recv()


def _transport(
    rank: int, unique_id: bytes, pipe: Connection, shape: str, layers: int, tokens: int, staging: int, slots: int
) -> dict[str, Any]:
    import torch

    from disagg_kv.engine.layout import TorchCache
    from disagg_kv.transport.nccl import NcclTransport

    count = -(-tokens // BLOCK)
    total_blocks = 2 * count
    cache = TorchCache(_layers(shape, layers, total_blocks, seed=rank), total_blocks)
    generator = torch.Generator().manual_seed(7 + rank)
    blocks = torch.randperm(total_blocks, generator=generator)[:count].tolist()
    start = time.perf_counter()
    transport = NcclTransport(cache, rank, unique_id, staging, slots, 10, _silent())
    opened, times = time.perf_counter() - start, []
    for _ in range(8):
        torch.cuda.synchronize()
        _meet(pipe)
        start = time.perf_counter()
        if rank == 0:
            transport.send(blocks, _passed(cache), False)
        else:
            transport.receive(blocks, count, cache.mark(), False)
        times.append(time.perf_counter() - start)
    wrong = 0
    if rank == 1:
        sent = TorchCache(_layers(shape, layers, total_blocks, seed=0), total_blocks)
        order = torch.randperm(total_blocks, generator=torch.Generator().manual_seed(7))[:count].tolist()
        mine, theirs = cache.buffer(count * cache.row_bytes), cache.buffer(count * cache.row_bytes)
        for plane in range(cache.planes):
            cache.gather(plane, cache.index(blocks), mine)
            sent.gather(plane, sent.index(order), theirs)
            wrong += int(not torch.equal(mine, theirs))
    transport.close()
    total = count * cache.block_bytes
    return {"shape": shape, "staging_mb": staging >> 20, "slots": slots, "bytes": total, "open_s": round(opened, 2),
            "ms": [round(value * 1e3, 2) for value in times], "gb_per_s": round(total / min(times[2:]) / 1e9, 1),
            "wrong_planes": wrong}  # fmt: skip


def _copies(rank: int, unique_id: bytes, pipe: Connection, shape: str, layers: int, tokens: int) -> dict[str, Any]:
    """Gathering and scattering alone, with elements of 8 and of 16 bytes."""
    import torch

    from disagg_kv.engine.layout import TorchCache

    count, result = -(-tokens // BLOCK), {}
    tensors = _layers(shape, layers, 2 * count, seed=rank)
    blocks = torch.randperm(2 * count)[:count].tolist()
    for dtype in (torch.int64, torch.complex128):
        cache = TorchCache(tensors, 2 * count, dtype)
        index, buffer = cache.index(blocks), cache.buffer(count * cache.row_bytes)
        for name, move in (("gather", cache.gather), ("scatter", cache.scatter)):
            times = []
            for _ in range(5):
                torch.cuda.synchronize()
                start = time.perf_counter()
                for plane in range(cache.planes):
                    move(plane, index, buffer)
                torch.cuda.synchronize()
                times.append(time.perf_counter() - start)
            result[f"{name} {dtype}"] = {"ms": round(min(times) * 1e3, 2),
                                         "gb_per_s": round(count * cache.block_bytes / min(times) / 1e9)}  # fmt: skip
    return result


def _vanish(rank: int, unique_id: bytes, pipe: Connection) -> dict[str, Any]:
    """Measure how long the receiver is blocked after the sender has stopped sending."""
    from disagg_kv.engine.layout import TorchCache
    from disagg_kv.transport.base import Stalled
    from disagg_kv.transport.nccl import NcclTransport

    cache = TorchCache(_layers("joined", 4, 64, seed=rank), 64)
    transport = NcclTransport(cache, rank, unique_id, 1 << 20, 2, 30, _silent(1.0 if rank == 1 else 60.0))
    _meet(pipe)
    result = "sender"
    start = time.monotonic()
    if rank == 1:
        try:
            transport.receive(list(range(32)), 32, None, False)
            result = "it returned without an error"
        except Stalled as error:
            result = str(error)
    else:
        time.sleep(2)
    raised = time.monotonic() - start
    transport.close()
    return {"result": result, "raised_after_s": round(raised, 2), "closed_after_s": round(time.monotonic() - start, 2)}


def _process(rank: int, pipe: Connection, results: Connection, arguments: argparse.Namespace) -> None:
    import torch

    torch.cuda.set_device(rank)
    total = -(-arguments.tokens // BLOCK) * BLOCK * HEADS * WIDTH * 4 * arguments.layers

    def case(name: str, function: Callable[..., dict[str, Any]], *more: Any) -> None:
        from disagg_kv.transport.nccl import new_unique_id

        if rank == 0:
            unique_id = new_unique_id()
            pipe.send(unique_id)
        else:
            unique_id = pipe.recv()
        try:
            results.send((name, rank, function(rank, unique_id, pipe, *more)))
        except Exception as error:
            results.send((name, rank, {"error": f"{type(error).__name__}: {error}"}))
            raise

    for shape in ("split", "joined"):
        case(f"copies {shape}", _copies, shape, arguments.layers, arguments.tokens)
    for chunk in (32, 64, 256):
        case(f"bare {chunk} MiB", _bare, total, chunk << 20)
    for shape in ("split", "joined"):
        for staging, slots in ((32, 3), (64, 3), (128, 2)):
            case(f"transport {shape} {staging}x{slots}", _transport, shape, arguments.layers, arguments.tokens,
                 staging << 20, slots)  # fmt: skip
    case("sender vanishes", _vanish)
    results.send(None)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8000)
    parser.add_argument("--layers", type=int, default=36)
    parser.add_argument("--limit", type=float, default=180, help="seconds after which what there is is printed")
    arguments = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    left, right = context.Pipe()
    receivers, processes = [], []
    for rank, pipe in ((0, left), (1, right)):
        reading, writing = context.Pipe(False)
        receivers.append(reading)
        processes.append(context.Process(target=_process, args=(rank, pipe, writing, arguments), daemon=True))
        processes[-1].start()
    out: dict[str, Any] = {}
    deadline, open_ends = time.monotonic() + arguments.limit, list(receivers)
    while open_ends and time.monotonic() < deadline:
        for ready in multiprocessing.connection.wait(open_ends, 1.0):
            reading = next(one for one in open_ends if one is ready)
            try:
                item = reading.recv()
            except EOFError:
                item = None
            if item is None:
                open_ends.remove(reading)
            else:
                name, rank, values = item
                out.setdefault(name, {})["sends" if rank == 0 else "receives"] = values
                print(name, rank, values, file=sys.stderr)
    for process in processes:
        process.kill()
    out["complete"] = not open_ends
    print(json.dumps(out, indent=1))
    return 0 if out["complete"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
