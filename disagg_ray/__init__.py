"""The same service over a Ray cluster: Ray Serve runs the processes, this project's own sockets carry the data.

Each Serve replica owns one process: an engine or a proxy. No request and no KV passes through Ray (docs/cluster.md).
"""
