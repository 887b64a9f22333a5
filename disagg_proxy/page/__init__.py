"""The live page: one document, and the feed that keeps every open one up to date.

Its routes are in ``server/asgi/page_routes.py``.
"""
