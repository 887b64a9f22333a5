"""What CUDA does when a process dies whose memory another one has mapped and reads; and how fast such reads are.

No engine is involved. Three processes use one GPU (or two, exporter and reader on one each): this one only watches. The
exporter owns a cache of random bytes; the reader maps it with the connector's own code and measures. Then the exporter
is killed while the reader's copies run, and the reader says whether a copy failed, whether bytes changed, and whether
the memory is free after it has unmapped it.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
LAYERS, BLOCK_BYTES = 36, 65536
"""As Qwen3-4B: 16 tokens of one layer."""
BLOCKS = 2048
"""36 x 2048 x 64 KiB are 4.8 GB."""
READ_BLOCKS = 500
"""8,000 tokens: 1.18 GB."""


def _cache(seed: int) -> Any:
    import torch

    from disagg_kv.engine.layout import TorchCache

    torch.manual_seed(seed)
    shape = (BLOCKS, 8, 16, BLOCK_BYTES // 8 // 16 // 2)
    layers = {f"layers.{n}": torch.randint(-999, 999, shape, dtype=torch.int16, device="cuda") for n in range(LAYERS)}
    return TorchCache(layers, BLOCKS)


def export() -> None:
    """The exporter's process: describe the cache in one line, then wait."""
    import torch

    from disagg_kv.transport.cuda_memory import ExportedCudaMemory

    cache = _cache(1)
    torch.cuda.synchronize()
    exported = ExportedCudaMemory(cache)
    print(json.dumps(exported.describe()), flush=True)
    sys.stdin.read()


def read() -> None:
    """The reader's process: a line of JSON for each finding. Its input is the description, then a line after the
    kill."""
    import torch

    from disagg_kv.transport.cuda_memory import CudaMemoryReader

    memory = json.loads(sys.stdin.readline())
    mine = _cache(2)
    torch.cuda.synchronize()
    free_before = torch.cuda.mem_get_info()[0]
    start = time.monotonic()
    reader = CudaMemoryReader(mine, memory, 64 << 20)
    _say(open_ms=round((time.monotonic() - start) * 1000, 1))
    rnd = random.Random(7)
    source, target = rnd.sample(range(BLOCKS), READ_BLOCKS), rnd.sample(range(BLOCKS), READ_BLOCKS)
    for name, these, those in (("random", source, target), ("adjacent", range(READ_BLOCKS), range(READ_BLOCKS))):
        times = []
        for _ in range(8):
            start = time.monotonic()
            reader.read(list(these), list(those), None, 30.0)
            times.append(time.monotonic() - start)
        size = READ_BLOCKS * mine.block_bytes
        _say(blocks=name, ms=round(min(times) * 1000, 2), gb_per_s=round(size / min(times) / 1e9, 1))
    reader.read(source, target, None, 30.0)
    there, here = torch.tensor(source, device="cuda"), torch.tensor(target, device="cuda")
    before = [plane[here] for plane in mine._planes]
    same = all(torch.equal(rows[there], copy) for rows, copy in zip(reader._planes, before, strict=True))
    _say(equal_before=same, ready_for_kill=True)
    count, end, error = 0, time.monotonic() + 4, ""
    try:
        while time.monotonic() < end:
            reader.read(source, target, None, 30.0)
            count += 1
    except Exception as found:
        error = f"{type(found).__name__}: {str(found)[:300]}"
    _say(reads_around_the_kill=count, error=error)
    sys.stdin.readline()
    try:
        reader.read(source, target, None, 30.0)
        same = all(torch.equal(plane[here], copy) for plane, copy in zip(mine._planes, before, strict=True))
        _say(equal_after_the_kill=same)
    except Exception as found:
        _say(equal_after_the_kill=None, error=f"{type(found).__name__}: {str(found)[:300]}")
    try:
        mapped = torch.cuda.mem_get_info()[0]
        reader.close()
        torch.cuda.synchronize()
        free = torch.cuda.mem_get_info()[0]
        _say(free_gb_before=_gb(free_before), while_mapped=_gb(mapped), after_unmapping=_gb(free))
        check = torch.ones(1 << 20, device="cuda").sum().item()
        _say(context_usable=check == 1 << 20)
    except Exception as found:
        _say(context_usable=False, error=f"{type(found).__name__}: {str(found)[:300]}")


def _gb(size: int) -> float:
    return round(size / 1e9, 2)


def _say(**found: Any) -> None:
    print(json.dumps(found), flush=True)


def run(gpus: tuple[str, str], folder: Path, limit: float) -> Iterator[dict[str, Any]]:
    """Run the experiment in two processes; yields the findings as they come."""
    command = [sys.executable, "-m", "bench.gpu_shared.mapping"]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    log = (folder / "mapping.log").open("ab")
    end = time.monotonic() + limit
    processes = [
        subprocess.Popen(
            [*command, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": gpu, "CUDA_DEVICE_ORDER": "PCI_BUS_ID", "PYTHONPATH": path},
        )
        for name, gpu in zip(("export", "read"), gpus, strict=True)
    ]  # fmt: skip
    exporter, reader = processes
    killer = subprocess.Popen(  # the run ends, whatever hangs
        ["sh", "-c", f"sleep {limit:.0f}; kill -9 {exporter.pid} {reader.pid} 2>/dev/null"], start_new_session=True
    )
    try:
        assert exporter.stdout and reader.stdout and reader.stdin
        reader.stdin.write(exporter.stdout.readline())
        reader.stdin.flush()
        for line in reader.stdout:
            found = json.loads(line)
            yield found
            if found.get("ready_for_kill"):
                time.sleep(1.5)
                os.kill(exporter.pid, signal.SIGKILL)
                exporter.wait()
                yield {"exporter_killed": True}
                reader.stdin.write("\n")
                reader.stdin.flush()
        yield {"reader_exit": reader.wait(max(1, end - time.monotonic()))}
    finally:
        os.killpg(killer.pid, signal.SIGKILL)
        for process in processes:
            process.kill()
            process.wait()
        log.close()


if __name__ == "__main__":
    {"export": export, "read": read}[sys.argv[1]]()
