"""The proxy and its pair are those of tests/machine.py."""

from tests.machine import machine, pair

__all__ = ["machine", "pair"]
