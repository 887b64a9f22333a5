"""Instances, the registry that holds them, and the selection of a pair for a request.

Nothing in this package does I/O or reads a clock; times are passed in or come from the registry's clock.
"""
