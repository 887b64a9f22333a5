"""The decode engine's half: which requests wait for blocks, and the threads that receive them."""
