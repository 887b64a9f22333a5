"""HTTP/1.1 on the wire, for both sides of the proxy: headers, heads seen before, chunked framing. Pure."""
