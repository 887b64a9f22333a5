"""HTTP/1.1 for both sides of the proxy: forwarded headers, head writer, head cache, chunked framing. Without I/O."""
