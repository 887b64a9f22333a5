"""KV transfer of a simulated engine, by connector: vLLM's P2pNcclConnector and NixlConnector, and ``disagg_kv``."""
