"""The proxy and its pair are those of tests/simulated.py."""

from tests.simulated import machine, pair

__all__ = ["machine", "pair"]
