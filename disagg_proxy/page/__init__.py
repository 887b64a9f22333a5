"""The live page: one document, and the feed that keeps every open one up to date. Quart's routes: http/page.py."""
