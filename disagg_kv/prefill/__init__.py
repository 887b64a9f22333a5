"""The prefill engine's half: which blocks wait to be fetched, and the threads that send them."""
