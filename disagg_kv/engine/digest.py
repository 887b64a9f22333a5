"""Digests of what determines KV besides the tokens: a model's configuration and weights, and LoRA adapters.

Reading all weights would take minutes, so they are sampled. Every safetensors tensor counts with its name, dtype,
shape and 4 KiB samples spread over its data. Other formats count with their size, their last MiB (where a PyTorch
archive keeps the checksums of its records) and samples spread over the file. The digest depends neither on file names
nor on how tensors are distributed over files.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

SAMPLE_BYTES = 4096
MAX_SAMPLES = 32768
"""Samples over all files; if there are more tensors than this, one of each."""
SAMPLES_PER_TENSOR = 8
_SAMPLES_PER_FILE = 1024
_TAIL_BYTES = 1 << 20
_MAX_HEADER_BYTES = 100_000_000
"""The limit of the safetensors format."""
_PATTERNS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf", "*.tensors")
_CONSOLIDATED = "consolidated*.safetensors"
_NOT_WEIGHTS = ("training_args.bin", "optimizer.bin", "optimizer.pt", "scheduler.pt", "scaler.pt")
_INCIDENTAL = ("_name_or_path", "_commit_hash", "transformers_version")
"""Fields of a configuration that tell its origin and nothing about the model."""


class Unreadable(Exception):
    """No digest can be made; the text is the reason."""


class _Tensor(NamedTuple):
    start: int
    """Byte in the file at which the data begins."""
    size: int
    text: bytes
    """Name, dtype and shape."""


def model_digest(weights: Path | None, config: Path, facts: Mapping[str, str], load_format: str = "auto") -> str:
    """32 hexadecimal digits for a model.

    Args:
        weights: folder or file of the weights; None where they follow from the configuration (dummy weights).
        config: folder of config.json, or the file that holds the configuration itself (GGUF).
        facts: settings of the engine that change the KV of the same weights.
        load_format: vLLM's ``--load-format``, which decides between several formats in one folder.

    Raises:
        Unreadable: no configuration, no weights, or not in a known form.
    """
    digest = hashlib.sha256()
    try:
        for text in (*_configuration(config, bool(facts.get("quantization"))), *map("=".join, sorted(facts.items()))):
            digest.update(len(text).to_bytes(8, "big") + text.encode())
        if weights is not None:
            digest.update(weights_digest(weight_files(weights, load_format)))
    except (OSError, ValueError) as error:
        raise Unreadable(str(error)) from error
    return digest.hexdigest()[:32]


def version_digest(version: str) -> str:
    """Return 32 hexadecimal digits for ``model_version``."""
    return hashlib.sha256(f"model_version:{version}".encode()).hexdigest()[:32]


def adapter_files(folder: Path) -> list[Path]:
    """Return the files of a LoRA adapter: its configuration, then its weights.

    Raises:
        Unreadable: one of them is missing.
    """
    return [folder / "adapter_config.json", *weight_files(folder)]


def adapter_digest(files: Sequence[Path]) -> str:
    """Return 32 hexadecimal digits for the files of :func:`adapter_files`.

    Raises:
        Unreadable: a file cannot be read or parsed.
    """
    try:
        config = _canonical(json.loads(files[0].read_bytes()))
        return hashlib.sha256(config.encode() + weights_digest(files[1:])).hexdigest()[:32]
    except (OSError, ValueError) as error:
        raise Unreadable(str(error)) from error


def weight_files(source: Path, load_format: str = "auto") -> list[Path]:
    """Return the files that vLLM loads (0.32, model_executor/model_loader/default_loader.py).

    Of the first format that the folder has, without shards that the index does not name.

    Raises:
        Unreadable: there are none.
    """
    if source.is_file():
        return [source]
    patterns: tuple[str, ...] = {"pt": ("*.pt",), "npcache": ("*.bin",)}.get(load_format, _PATTERNS)
    if load_format in ("auto", "mistral"):
        patterns = (_CONSOLIDATED, *patterns)
    for pattern in patterns:
        found = sorted(path for path in source.glob(pattern) if path.name not in _NOT_WEIGHTS)
        if found:
            name = "consolidated" if pattern == _CONSOLIDATED else "model"
            index = source / f"{name}.safetensors.index.json"
            if pattern.endswith(".safetensors") and index.is_file():
                named = set(json.loads(index.read_bytes())["weight_map"].values())
                found = [path for path in found if path.name in named] or found
            return found
    raise Unreadable(f"no weights in {source}")


def weights_digest(files: Sequence[Path]) -> bytes:
    """Return a digest of 32 bytes.

    Raises:
        OSError, ValueError: a file cannot be read.
    """
    if files[0].suffix == ".safetensors":
        found = [(path, _header(path)) for path in files]
        count = _clamp(MAX_SAMPLES // max(1, sum(len(tensors) for _, tensors in found)), 1, SAMPLES_PER_TENSOR)
        rows = [row for path, tensors in found for row in _rows(path, tensors, count)]
    else:
        rows = [_file_digest(path, _clamp(MAX_SAMPLES // len(files), 1, _SAMPLES_PER_FILE)) for path in files]
    return hashlib.sha256(b"".join(sorted(rows))).digest()


def identity(files: Sequence[Path]) -> tuple[tuple[int, ...], ...]:
    """Return device, inode, size and times of each file; they differ when a file was written or replaced.

    Raises:
        OSError: a file is gone.
    """
    return tuple((s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for s in map(os.stat, files))


def _configuration(config: Path, quantized: bool) -> Iterator[str]:
    """Yield the contents of the configuration files that vLLM reads, without incidental fields."""
    if config.is_file():
        return
    names = [name for name in ("config.json", "params.json") if (config / name).is_file()][:1]
    if not names:
        raise Unreadable(f"no config.json in {config}")
    if quantized:
        names += [name for name in ("hf_quant_config.json", "quantize_config.json") if (config / name).is_file()]
    for name in names:
        yield _canonical(json.loads((config / name).read_bytes()))


def _canonical(value: Any) -> str:
    if isinstance(value, dict):
        value = {name: field for name, field in value.items() if name not in _INCIDENTAL}
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def _header(path: Path) -> list[_Tensor]:
    """Return the tensors of a safetensors file in the order of their data.

    The format is 8 bytes of length, a JSON object, the data.
    """
    with _opened(path) as file:
        size = int.from_bytes(_read(file, 0, 8), "little")
        if size > _MAX_HEADER_BYTES:
            raise ValueError(f"{path} is not a safetensors file")
        head = json.loads(_read(file, 8, size))
    found = []
    try:
        for name, entry in head.items():
            if name != "__metadata__":
                first, last = entry["data_offsets"]
                text = f"{name}:{entry['dtype']}:{entry['shape']}"
                found.append(_Tensor(8 + size + first, last - first, text.encode()))
    except (AttributeError, KeyError, TypeError, ValueError):
        raise ValueError(f"{path} is not a safetensors file") from None
    return sorted(found)


def _rows(path: Path, tensors: Sequence[_Tensor], count: int) -> list[bytes]:
    """A digest of each tensor."""
    plans = [(tensor, _samples(tensor.start, tensor.size, count)) for tensor in tensors]
    with _opened(path) as file:
        for _, samples in plans:
            _prefetch(file, samples)
        return [_hash(file, tensor.text, samples) for tensor, samples in plans]


def _file_digest(path: Path, count: int) -> bytes:
    with _opened(path) as file:
        size = os.fstat(file).st_size
        tail = min(size, _TAIL_BYTES)
        samples = [*_samples(0, size - tail, count), (size - tail, tail)]
        _prefetch(file, samples)
        return _hash(file, str(size).encode(), samples)


def _samples(start: int, size: int, count: int) -> list[tuple[int, int]]:
    """Return where to read and how many bytes.

    ``count`` samples from the first byte to the last (one: from the middle), or everything where that is less.
    """
    if size <= count * SAMPLE_BYTES:
        # A length of 0 means "to the end of the file" to posix_fadvise.
        return [(start, size)] if size else []
    rest = size - SAMPLE_BYTES
    if count == 1:
        return [(start + rest // 2, SAMPLE_BYTES)]
    return [(start + rest * place // (count - 1), SAMPLE_BYTES) for place in range(count)]


def _prefetch(file: int, samples: Sequence[tuple[int, int]]) -> None:
    """Ask the kernel to read ahead all samples, so that a disk handles many requests at once."""
    for start, size in samples:
        os.posix_fadvise(file, start, size, os.POSIX_FADV_WILLNEED)


def _hash(file: int, text: bytes, samples: Sequence[tuple[int, int]]) -> bytes:
    digest = hashlib.sha256(text)
    for start, size in samples:
        digest.update(_read(file, start, size))
    return digest.digest()


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        # Without this the kernel reads up to 128 KiB ahead of each sample.
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_RANDOM)
        yield file
    finally:
        os.close(file)


def _read(file: int, start: int, size: int) -> bytes:
    """Read exactly ``size`` bytes.

    Raises:
        OSError, ValueError: they are not there (a truncated file).
    """
    data = os.pread(file, size, start)
    while len(data) < size:
        more = os.pread(file, size - len(data), start + len(data))
        if not more:
            raise ValueError("a weight file is truncated")
        data += more
    return data


def _clamp(value: int, low: int, high: int) -> int:
    return max(low, min(value, high))
