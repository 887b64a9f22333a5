"""Code that uses vLLM's objects: scheduler and worker side, cache layouts, versions, announcement."""
