"""Where each request is prefilled, and which roles engines have: docs/elastic.md."""
