"""Towards the instances: an HTTP/1.1 client with pooled connections on asyncio transports, and the KV control channel.

A client library would cost more CPU time for a small request than everything else together (docs/performance.md).
"""

from disagg_proxy.upstream.client import Resend, Upstream
from disagg_proxy.upstream.response import CompleteResponse, ReadUntil, Response, Sink

__all__ = ["CompleteResponse", "ReadUntil", "Resend", "Response", "Sink", "Upstream"]
