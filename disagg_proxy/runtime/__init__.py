"""How request coroutines, background work and timeouts run on the event loop; knows nothing of HTTP or engines."""
