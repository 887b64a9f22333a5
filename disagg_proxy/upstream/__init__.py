"""The way to the instances: pooled HTTP/1.1 connections on asyncio transports.

Of its own, since a client library's share of a small request's cost is larger than everything else together
(docs/performance.md).
"""

from disagg_proxy.upstream.client import Resend, Upstream
from disagg_proxy.upstream.response import CompleteResponse, ReadUntil, Response, Sink

__all__ = ["CompleteResponse", "ReadUntil", "Resend", "Response", "Sink", "Upstream"]
