"""How instances become known: their pings over ZMQ, the rule about who may send them, and the probes over HTTP."""
