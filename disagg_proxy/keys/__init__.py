"""Several client keys: the table of API_KEYS_FILE in a running proxy, and the command ``disagg-proxy key``."""
