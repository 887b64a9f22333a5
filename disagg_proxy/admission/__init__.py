"""How many requests the engines get at once: limits, the queue in front of them, and the KV that a prompt will take."""
