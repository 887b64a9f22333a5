"""The prefill side: which blocks wait to be fetched, and the threads that send them."""
