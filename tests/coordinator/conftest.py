"""A proxy with simulated engines; requests go to its coordinator."""

from tests.simulated import machine, pair  # noqa: F401
