"""Several processes behind one port: ``--workers N``. What they share and how: docs/workers.md.

The supervisor serves nothing: it has the ports, starts the workers, replaces those that die, and passes on what
instances announce. Each worker is a whole proxy with a registry, probes and requests of its own. What must hold for
the machine as a whole stands in memory that all have mapped, in which every word has exactly one writer: nobody waits
for a lock, so nobody can be held up by a worker that is slow, stopped or dead.
"""
