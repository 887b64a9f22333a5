"""The proxy and its pair are those of tests/machine.py."""

from tests.machine import REQUESTS, events, machine, pair, text_of_events

__all__ = ["REQUESTS", "events", "machine", "pair", "text_of_events"]
