"""Plain engines, every static split and elastic placement on the same GPUs: goodput against rate.

    python -m bench.elastic                 everything in docs/elastic.md
    python -m bench.elastic --short         a few minutes: two GPUs, two seeds
    python -m bench.elastic --json FILE --plots FOLDER

workloads  requests of published shapes
arms       what is compared: how each arm uses its GPUs
trial      one run on a virtual clock
bound      an upper bound on any use of the same GPUs
sweep      rates, knees and goals
report     tables and plots

The clock, the engines and the proxy's parts are those of :mod:`bench.virtual`, the engines' figures those of a profile
(:mod:`disagg_sim.step_model`).
"""
