"""Engines' halves that are closed after the test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.kv.memory import Decode, Prefill


@pytest.fixture
def prefill() -> Iterator[Callable[..., Prefill]]:
    made: list[Prefill] = []

    def make(**arguments: Any) -> Prefill:
        made.append(Prefill(**arguments))
        return made[-1]

    yield make
    for one in made:
        one.server.close()


@pytest.fixture
def decode() -> Iterator[Callable[..., Decode]]:
    made: list[Decode] = []

    def make(**arguments: Any) -> Decode:
        made.append(Decode(**arguments))
        return made[-1]

    yield make
    for one in made:
        one.close()
