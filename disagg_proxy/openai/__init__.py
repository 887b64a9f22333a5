"""Rules of the OpenAI and Anthropic bodies of vLLM: pure functions on bytes, no I/O."""
