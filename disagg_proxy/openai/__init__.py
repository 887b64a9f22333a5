"""Text rules of vLLM's HTTP side and of its P2P NCCL connector: pure functions on bytes and headers, no I/O."""
