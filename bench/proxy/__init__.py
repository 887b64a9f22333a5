"""How much the proxy costs, against other proxies for prefill/decode disaggregation: docs/performance.md."""
