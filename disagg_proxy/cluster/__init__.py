"""Who is there and who may serve: instances, the registry that holds them, and the choice of a pair.

Nothing in this package does I/O or reads a clock of its own.
"""
