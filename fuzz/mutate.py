"""Bytes from a seed: known inputs with a few faults of the kinds that readers stumble over. No coverage, no state."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence


def mutants(seed: int, inputs: Sequence[bytes], words: Sequence[bytes]) -> Iterator[bytes]:
    """Without end; the same for the same arguments."""
    rng = random.Random(seed)
    while True:
        data = bytearray(rng.choice(inputs))
        for _ in range(rng.choice((0, 1, 1, 2, 3, 5, 8))):
            _change(rng, data, inputs, words)
        yield bytes(data)


def _change(rng: random.Random, data: bytearray, inputs: Sequence[bytes], words: Sequence[bytes]) -> None:
    at = rng.randrange(len(data) + 1)
    end = min(len(data), at + rng.choice((1, 1, 2, 4, 8, 60)))
    match rng.randrange(8):
        case 0:
            data[at : at + 1] = bytes([rng.randrange(256)])
        case 1:
            del data[at:end]
        case 2:
            data[at:at] = rng.choice(words)
        case 3:
            data[at:end] = rng.choice(words)
        case 4:
            data[at:at] = data[at:end] * rng.choice((1, 1, 2, 50))
        case 5:
            other = rng.choice(inputs)
            start = rng.randrange(len(other) + 1)
            data[at:at] = other[start : start + rng.choice((8, 60, 10_000))]
        case 6:
            del data[at:]
        case 7:
            data[at:at] = rng.randbytes(rng.choice((1, 2, 4)))
