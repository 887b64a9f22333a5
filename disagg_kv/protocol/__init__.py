"""What travels between engines: frames, messages, the handshake and the names of transfers. No I/O, no torch."""
