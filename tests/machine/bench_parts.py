"""What the tests of `bench` share: parts, options, and the message of a refusal."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from disagg_machine.messages import MachineError
from disagg_machine.parts import ALIVE, Part
from disagg_machine.vllm_facts import VllmFacts

NEW = VllmFacts("0.33.0", command=("/a b/vllm",))


def part(name: str, **fields: str) -> Part:
    """A part that is alive."""
    return Part(name, 4711, ALIVE, {"pid": "4711", "role": name.rstrip("0123456789"), **fields})


def option(words: list[str], name: str) -> list[str]:
    """The values of an option that may be given several times."""
    return [words[at + 1] for at, word in enumerate(words) if word == name]


@contextlib.contextmanager
def refused(key: str, *arguments: object, code: int = 1) -> Iterator[None]:
    """Within, a command ends with this message and exit code."""
    with pytest.raises(MachineError) as caught:
        yield
    assert (caught.value.code, caught.value.key) == (code, key)
    assert not arguments or caught.value.arguments == arguments
    assert str(caught.value)
