"""What touches vLLM's own objects: the scheduler half, the worker half, cache layouts, versions, the announcement."""
