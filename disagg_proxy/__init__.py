"""One OpenAI endpoint in front of vLLM prefill and decode instances on one machine."""

__version__ = "0.1.0"
