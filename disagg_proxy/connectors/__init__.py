"""One module for each KV transfer protocol between prefill and decode; ``run()`` is one attempt from top to bottom."""
