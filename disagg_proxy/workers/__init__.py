"""Several processes behind one port: ``--workers N``. docs/workers.md describes what they share and how.

The supervisor serves no requests: it owns the ports, starts the workers, replaces those that die, and forwards the
instances' pings. Each worker is a complete proxy with its own registry, probes and requests. Limits that hold for the
machine as a whole are enforced through shared memory in which every word has exactly one writer: there are no locks, so
a slow, stopped or dead worker cannot block another one.
"""
