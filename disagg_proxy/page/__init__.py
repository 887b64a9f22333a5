"""The live page: one HTML document, and the feed of server-sent events that updates it.

Its routes are in ``server/asgi/page_routes.py``.
"""
