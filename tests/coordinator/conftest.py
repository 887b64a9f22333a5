"""A proxy with simulated engines; requests go to its coordinator."""

from tests.machine import machine, pair  # noqa: F401
