"""Hostile input, made in quantity, against the parts of the proxy that read it. Not installed; needs a checkout.

    python -m fuzz list
    python -m fuzz prepare --seconds 60 --seed 1

What each target holds true, how to run it guided by coverage, and what was found: docs/fuzzing.md.
"""
