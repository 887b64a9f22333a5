"""The HTTP server for clients: connections, request heads, the fast path of generation, and the application."""
