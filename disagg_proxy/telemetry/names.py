"""How the names of all metrics begin."""

PREFIX = "disagg_proxy_"
