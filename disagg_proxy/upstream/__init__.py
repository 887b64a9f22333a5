"""The way to the instances: one shared, pooled HTTP client. The only place that knows aiohttp's client."""

from disagg_proxy.upstream.client import Answer, Upstream, WholeAnswer

__all__ = ["Answer", "Upstream", "WholeAnswer"]
