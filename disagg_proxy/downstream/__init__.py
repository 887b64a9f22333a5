"""Towards the client: the reply of one request, its streamed body, and responses made from an engine's refusal."""
