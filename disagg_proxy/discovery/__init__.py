"""Discovery of instances: their pings over ZMQ, and the rules about who may register."""
