"""``disagg-proxy top``: the live page in a terminal, from the same feed."""
