"""Which policy serves which load best: engines on a virtual clock, the proxy's own code for every choice.

    python -m bench.policies                    everything in docs/policies.md; about ten minutes on one core
    python -m bench.policies --short            under a minute
    python -m bench.policies --trace FILE       a Mooncake trace (JSON lines with hash_ids of 512 tokens) as well
    python -m bench.policies --capacity         how much load each policy carries

engines    prefill and decode engines; the constants and where they are from
workloads  who asks what when; the published shapes and where they are from
trial      one run: the real Registry, Pairing, Gate, leases and policies between the two
capacity   the highest load that a policy carries
report     tables, JSON and plots

The clock, the step model, the prefix cache and the proxy's parts are those of :mod:`bench.virtual`.
"""
